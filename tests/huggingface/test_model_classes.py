"""`MoEForCausalLM` and `MoEForMultimodalLM`: what they give, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    DEEPSEEK_V3,
    FAMILIES,
    GPT_OSS,
    OLMOE,
    QWEN2,
    Tiny,
    fused_blocks,
    logits_of,
    safetensors_of,
    same_tensors,
    some_ids,
    tensors_of,
)
from torch import nn

import moetor
from moetor import ParallelConfig
from moetor.errors import (
    ConfigError,
    FusionError,
    FusionMismatchError,
    InputError,
    KernelRefusedError,
    UnsupportedError,
)
from moetor.huggingface import loading, model_classes, preparing
from moetor.huggingface.modules import FusedMoEBlock
from moetor.tools.tiny import logits_of as family_logits
from moetor.tools.tiny import tiny_inputs, tiny_model


def saved(tiny: Tiny, folder: Path, **options: Any) -> Path:
    tiny.build(**options).save_pretrained(folder)
    return folder


# Those whose odd sizes Transformers' own grouped product refuses have no original to compare with.
USUAL = [tiny for tiny in FAMILIES if tiny.implementation is None]


@pytest.mark.parametrize("tiny", USUAL, ids=lambda tiny: tiny.id)
def test_a_fused_model_of_the_familys_class(tiny: Tiny, tmp_path: Path) -> None:
    original = tiny.build()
    original.save_pretrained(tmp_path)
    model = moetor.MoEForCausalLM.from_pretrained(str(tmp_path))
    assert type(model) is type(original)
    assert len(fused_blocks(model)) == tiny.blocks
    assert model.fusion_report.count("block") == tiny.blocks
    fused = original.from_pretrained(tmp_path)
    moetor.fuse(fused)
    assert same_tensors(tensors_of(model), tensors_of(fused)) == []
    with torch.no_grad():
        for tensor in fused.parameters():
            tensor.data = tensor.data.clone()  # mapped files are not aligned
    assert torch.equal(logits_of(model), logits_of(fused))
    assert not model.training


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "gemma4", "kimi_k25"])
def test_multimodal(name: str, tmp_path: Path) -> None:
    original = tiny_model(name)
    original.save_pretrained(tmp_path)
    model = moetor.MoEForMultimodalLM.from_pretrained(str(tmp_path))
    assert type(model) is type(original)
    report = model.fusion_report
    assert report.count("block") + report.count("experts") == len(report.blocks) > 0
    inputs = tiny_inputs(name, original)
    ours, theirs = family_logits(name, model, inputs), family_logits(name, original, inputs)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_saved_as_the_original(tmp_path: Path) -> None:
    """A checkpoint that plain Transformers loads: the very bytes that were streamed."""
    folder = saved(GPT_OSS, tmp_path / "before", dtype=torch.bfloat16)
    model = moetor.MoEForCausalLM.from_pretrained(str(folder))
    model.save_pretrained(tmp_path / "after")
    assert same_tensors(safetensors_of(tmp_path / "after"), safetensors_of(folder)) == []
    again = type(model).from_pretrained(tmp_path / "after")
    assert same_tensors(tensors_of(again), tensors_of(GPT_OSS.build(dtype=torch.bfloat16))) == []


def test_generates_with_the_checkpoints_settings(tmp_path: Path) -> None:
    original = QWEN2.build()
    original.generation_config.max_new_tokens = 5
    original.save_pretrained(tmp_path)
    model = moetor.MoEForCausalLM.from_pretrained(str(tmp_path))
    assert model.generation_config.max_new_tokens == 5
    ids = some_ids(1, 7)
    mask = torch.ones_like(ids)
    ours = model.generate(ids, attention_mask=mask, do_sample=False)
    theirs = original.generate(ids, attention_mask=mask, do_sample=False)
    assert ours.shape == (1, 12)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wanted", ["bfloat16", torch.bfloat16])
def test_dtype_and_device(wanted: Any, tmp_path: Path) -> None:
    folder = saved(QWEN2, tmp_path)
    model = moetor.MoEForCausalLM.from_pretrained(
        str(folder), dtype=wanted, device=torch.device("cpu"), kernel="torch"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert model.fusion_report.kernels == ("torch",)


def count_comparisons(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    asked: list[bool] = []
    own = preparing.try_block

    def spy(plans: Any, *, compare: bool) -> Any:
        asked.append(compare)
        return own(plans, compare=compare)

    monkeypatch.setattr(preparing, "try_block", spy)
    return asked


@pytest.mark.parametrize(
    ("verify", "compared"),
    [("sample", [True, False, False]), ("all", [True] * 3), ("off", [False] * 3)],
)
def test_how_much_is_verified(
    verify: Any, compared: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(OLMOE, tmp_path, num_hidden_layers=3)
    asked = count_comparisons(monkeypatch)
    model = moetor.MoEForCausalLM.from_pretrained(str(folder), verify=verify)
    assert asked == compared
    errors = [block.max_error is not None for block in model.fusion_report.blocks]
    assert errors == compared


def test_a_sample_of_each_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks whose clamps differ are different forms, though their class is the same."""
    model = tiny_model("step3p7")
    asked = count_comparisons(monkeypatch)
    moetor.fuse(model, verify="sample")
    forms = {block.config.experts for block in model.modules() if isinstance(block, FusedMoEBlock)}
    assert sum(asked) == len(forms) > 1


def test_a_wrong_block_is_found_by_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(OLMOE, tmp_path)
    own = FusedMoEBlock.forward

    def wrong(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(self, hidden_states * 1.01, *args, **kwargs)

    monkeypatch.setattr(FusedMoEBlock, "forward", wrong)
    with pytest.raises(FusionMismatchError):
        moetor.MoEForCausalLM.from_pretrained(str(folder))
    moetor.MoEForCausalLM.from_pretrained(str(folder), verify="off")


def test_what_is_not_possible_yet(tmp_path: Path) -> None:
    alone = ParallelConfig(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="needs 2 ranks, and 1 has joined"):
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path / "nowhere"), parallel=alone)
    with pytest.raises(ConfigError, match="'some' is not one of sample, all, off"):
        moetor.MoEForCausalLM.from_pretrained("demo", verify="some")  # type: ignore[arg-type]
    with pytest.raises(KernelRefusedError, match="'warp'"):
        moetor.MoEForCausalLM.from_pretrained("demo", kernel="warp")
    with pytest.raises(UnsupportedError, match="from_pretrained"):
        moetor.MoEForCausalLM()


def test_the_other_class_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_vl_moe").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"use moetor\.MoEForMultimodalLM"):
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"Qwen2Moe.*use moetor\.MoEForCausalLM"):
        moetor.MoEForMultimodalLM.from_pretrained("demo")


def test_neither_class(tmp_path: Path) -> None:
    tiny_model("switch_transformers").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"call moetor\.fuse"):
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path))


def test_nothing_to_fuse(tmp_path: Path) -> None:
    """A dense member of a family, and a family whose blocks are not recognised, are refused."""
    saved(QWEN2, tmp_path / "dense", mlp_only_layers=[0, 1])
    with pytest.raises(FusionError, match=r"no MoE block.*transformers\.Qwen2MoeForCausalLM"):
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path / "dense"))
    tiny_model("doge").save_pretrained(tmp_path / "doge")
    with pytest.raises(FusionError, match="product keys"):
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path / "doge"))


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle: no thread goes on, no file is left."""
    folder = saved(OLMOE, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    calls: list[int] = []

    def stop(done: int, total: int, item: str) -> None:
        calls.append(done)
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loading.load_model(str(folder), progress=stop)
    assert 1 < len(calls) < 30
    assert not [t for t in threading.enumerate() if t.name.startswith("moetor-load")]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert len(fused_blocks(moetor.MoEForCausalLM.from_pretrained(str(folder)))) == OLMOE.blocks


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown", [True, False])
def test_progress_on_a_terminal(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    moetor.MoEForCausalLM.from_pretrained("demo", progress=shown)
    text = terminal.getvalue()
    if shown:
        assert "loading demo" in text
        assert "tensors/s" in text
        assert "MB" in text
    else:
        assert text == ""


def test_no_progress_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    moetor.MoEForCausalLM.from_pretrained("demo")
    assert capfd.readouterr() == ("", "")


def _to_half(model: nn.Module) -> nn.Module:
    return model.half()


def _to_bfloat16(model: nn.Module) -> nn.Module:
    return model.to("cpu", torch.bfloat16)


def _deepcopied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    made: nn.Module = pickle.loads(pickle.dumps(model))
    return made


@pytest.mark.parametrize("change", [_to_half, _to_bfloat16, _deepcopied, _pickled])
@pytest.mark.parametrize("tiny", [QWEN2, DEEPSEEK_V3, GPT_OSS], ids=lambda tiny: tiny.id)
def test_moved_cast_and_copied(
    tiny: Tiny, change: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    """A streamed model afterwards is what a model fused after plain loading is."""
    folder = saved(tiny, tmp_path)
    streamed = change(moetor.MoEForCausalLM.from_pretrained(str(folder)))
    plain = tiny.build()
    moetor.fuse(plain)
    plain = change(plain)
    assert same_tensors(tensors_of(streamed), tensors_of(plain)) == []
    assert torch.equal(logits_of(streamed), logits_of(plain))
    assert len(fused_blocks(streamed)) == tiny.blocks


def test_a_copy_is_another_model(tmp_path: Path) -> None:
    model = moetor.MoEForCausalLM.from_pretrained(str(saved(QWEN2, tmp_path)))
    twin = copy.deepcopy(model)
    before = logits_of(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(model), before)
    moetor.unfuse(twin)
    assert twin.model.layers[0].mlp.experts.gate_up_proj.abs().max() == 0


def test_the_signature_is_the_same() -> None:
    causal = moetor.MoEForCausalLM.from_pretrained.__func__
    multimodal = moetor.MoEForMultimodalLM.from_pretrained.__func__
    assert causal is multimodal is model_classes._Streamed.from_pretrained.__func__
    assert issubclass(InputError, ValueError)
