"""Checkpoints that do not fit, told with file and tensor before a model is handed back; and names
that are not the family's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MIXTRAL, OLMOE, Tiny, logits_of, same_tensors, tensors_of
from torch import Tensor

import moetor
from moetor.errors import CheckpointError
from moetor.huggingface import loading
from moetor.tools.tiny import tiny_model

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.experts"
Tensors = dict[str, Tensor]


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    OLMOE.build().save_pretrained(tmp_path)
    return tmp_path


def _missing(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.5.up_proj.weight"]


def _expert_missing(tensors: Tensors) -> None:
    for part in ("gate", "up", "down"):
        del tensors[f"{LAYER}.5.{part}_proj.weight"]


def _part_missing(tensors: Tensors) -> None:
    for number in range(8):
        del tensors[f"{LAYER}.{number}.up_proj.weight"]


def _layer_missing(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(LAYER)]:
        del tensors[name]


def _shape(tensors: Tensors) -> None:
    name = f"{LAYER}.3.down_proj.weight"
    tensors[name] = tensors[name][:, :-1]


def _other_name(tensors: Tensors) -> None:
    tensors[f"{LAYER}.5.w3.weight"] = tensors.pop(f"{LAYER}.5.up_proj.weight")


def _some_other_names(tensors: Tensors) -> None:
    for number in range(4, 8):
        for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            name = f"{LAYER}.{number}.{theirs}_proj.weight"
            tensors[f"{LAYER}.{number}.{ours}.weight"] = tensors.pop(name)


def _twice(tensors: Tensors) -> None:
    tensors[f"{LAYER}.down_proj"] = torch.stack(
        [tensors[f"{LAYER}.{number}.down_proj.weight"] for number in range(8)]
    )


def _twice_under_other_names(tensors: Tensors) -> None:
    tensors[f"{LAYER}.5.w3.weight"] = tensors[f"{LAYER}.5.up_proj.weight"].clone()


def _too_many(tensors: Tensors) -> None:
    for part in ("gate", "up", "down"):
        name = f"{LAYER}.7.{part}_proj.weight"
        tensors[name.replace(".7.", ".8.")] = tensors[name].clone()


def _layer_too_many(tensors: Tensors) -> None:
    tensors["model.layers.9.mlp.experts.0.up_proj.weight"] = torch.zeros(2, 2)


def _bias(tensors: Tensors) -> None:
    tensors[f"{LAYER}.5.up_proj.bias"] = torch.zeros(4)


@dataclass(frozen=True)
class Fault:
    change: Callable[[Tensors], None]
    names: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.change.__name__.removeprefix("_")


FAULTS = (
    Fault(_missing, (f"{LAYER}.5.up_proj.weight",)),
    Fault(_expert_missing, (f"{LAYER}.5.down_proj.weight",)),
    Fault(_part_missing, ("up_proj", f"{LAYER}.gate_up_proj")),
    Fault(_layer_missing, (f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj")),
    Fault(_shape, (f"{LAYER}.3.down_proj.weight", "(64, 23)")),
    Fault(_other_name, (f"{LAYER}.5.up_proj.weight", f"{LAYER}.5.w3.weight")),
    Fault(_some_other_names, (f"{LAYER}.4.down_proj.weight", f"{LAYER}.4.w1.weight")),
    Fault(_twice, (f"{LAYER}.0.down_proj.weight", f"{LAYER}.down_proj")),
    Fault(_twice_under_other_names, (f"{LAYER}.5.w3.weight",)),
    Fault(_too_many, (f"{LAYER}.8.down_proj.weight", "8 experts")),
    Fault(_layer_too_many, ("model.layers.9.mlp.experts.0.up_proj.weight",)),
    Fault(_bias, (f"{LAYER}.5.up_proj.bias",)),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_is_told_with_file_and_tensor(fault: Fault, folder: Path) -> None:
    edit(folder, fault.change)
    with pytest.raises(CheckpointError) as caught:
        moetor.MoEForCausalLM.from_pretrained(str(folder))
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    if fault.change is not _layer_missing:
        assert WEIGHTS in text
    for name in fault.names:
        assert name in text


def test_shard_of_a_missing_expert(tmp_path: Path) -> None:
    """The file that is named is the one beside which the tensor is missing."""
    OLMOE.build().save_pretrained(tmp_path, max_shard_size="60KB")
    name = f"{LAYER}.5.up_proj.weight"
    file = next(file for file in tmp_path.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path))
    assert file.name in str(caught.value)


def test_tensor_in_two_files(tmp_path: Path) -> None:
    OLMOE.build().save_pretrained(tmp_path, max_shard_size="60KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        loading.load_model(str(tmp_path))
    assert first.name in str(caught.value)
    assert second.name in str(caught.value)


def test_no_weight_is_read_before_all_is_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetor.huggingface.checkpoint.safe_open", lambda *_: pytest.fail("read"))
    edit(folder, _missing)
    with pytest.raises(CheckpointError, match="lacks"):
        loading.load_model(str(folder))


# Names that the family's own checkpoints do not use: what Transformers would call unexpected.
RENAMED = (
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    {"gate_proj": "linear", "up_proj": "linear_v", "down_proj": "linear_1"},
)


@pytest.mark.parametrize("names", RENAMED, ids=lambda names: names["down_proj"])
@pytest.mark.parametrize("place", ["mlp.experts", "block_sparse_moe.experts", "moe_block.experts"])
def test_experts_under_other_names(
    names: dict[str, str], place: str, folder: Path, tmp_path: Path
) -> None:
    before = loading.load_model(str(folder))

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            renamed = name.replace("mlp.experts", place)
            for theirs, ours in names.items():
                renamed = renamed.replace(f".{theirs}.", f".{ours}.")
            tensors[renamed] = tensors.pop(name)

    edit(folder, rename)
    model = moetor.MoEForCausalLM.from_pretrained(str(folder))
    assert same_tensors(tensors_of(model), tensors_of(before)) == []
    model.save_pretrained(tmp_path / "after")  # under the family's names, or plainly packed
    plain = OLMOE.model_class.from_pretrained(tmp_path / "after")
    assert same_tensors(tensors_of(plain), tensors_of(before)) == []


def test_names_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """A whole checkpoint under other names: Transformers' key_mapping, and ours for the experts."""
    before = loading.load_model(str(folder))

    def rename(tensors: Tensors) -> None:
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts"
            for number in range(8):
                gate = tensors.pop(f"{prefix}.{number}.gate_proj.weight")
                up = tensors.pop(f"{prefix}.{number}.up_proj.weight")
                down = tensors.pop(f"{prefix}.{number}.down_proj.weight")
                mixed = torch.stack([gate, up], 1).flatten(0, 1)
                tensors[f"{prefix}.{number}.into.weight"] = mixed
                tensors[f"{prefix}.{number}.out.weight"] = down.T
            tensors[f"model.layers.{layer}.mlp.router.weight"] = tensors.pop(
                f"model.layers.{layer}.mlp.gate.weight"
            )

    edit(folder, rename)
    options = {"key_mapping": {r"\.router\.": ".gate."}}
    with pytest.raises(CheckpointError, match=r"into\.weight"):
        moetor.MoEForCausalLM.from_pretrained(str(folder), **options)
    names = moetor.ExpertNames(gate_up="into", down="out", interleaved=True)
    model = moetor.MoEForCausalLM.from_pretrained(str(folder), expert_names=names, **options)
    assert same_tensors(tensors_of(model), tensors_of(before)) == []
    model.save_pretrained(tmp_path / "after")
    plain = OLMOE.model_class.from_pretrained(tmp_path / "after")
    assert same_tensors(tensors_of(plain), tensors_of(before)) == []


@pytest.mark.parametrize("tiny", [OLMOE, MIXTRAL], ids=lambda tiny: tiny.id)
def test_packed_already(tiny: Tiny, tmp_path: Path) -> None:
    """A checkpoint of the model's own parameters, which Transformers also takes."""
    model = tiny.build()
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / WEIGHTS)
    streamed = loading.load_model(str(tmp_path))
    assert same_tensors(tensors_of(streamed), tensors_of(model)) == []


def test_rows_of_identity_experts_may_be_missing(tmp_path: Path) -> None:
    """LongCat-Flash allots weights to experts that have none; a checkpoint need not store them."""
    model = tiny_model("longcat_flash")
    model.save_pretrained(tmp_path)
    real = model.config.n_routed_experts

    def drop(tensors: Tensors) -> None:
        for name in list(tensors):
            number = re.search(r"experts\.(\d+)\.", name)
            if number is not None and int(number[1]) >= real:
                del tensors[name]

    count = len(load_file(tmp_path / WEIGHTS))
    edit(tmp_path, drop)
    assert len(load_file(tmp_path / WEIGHTS)) < count
    streamed = loading.load_model(str(tmp_path))
    for name, tensor in streamed.state_dict().items():
        wanted = model.state_dict()[name]
        if name.endswith("gate_up_proj"):
            assert torch.equal(tensor[:real], wanted[:real])
            assert int(tensor[real:].count_nonzero()) == 0
        else:
            assert torch.equal(tensor, wanted)
    ids = torch.arange(3, 20)[None]
    assert torch.allclose(logits_of(streamed, ids), logits_of(model, ids), atol=1e-5)
