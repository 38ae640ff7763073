"""Quantised checkpoints that would be read as another model: refused, with the tensor's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from huggingface.checkpoint_formats import FORMATS, fp8_block, mxfp4, save_both, write
from huggingface.test_quantized_checkpoints import (
    EXPERT,
    SIZES,
    check_weights,
    edited,
    load,
    with_settings,
)
from huggingface.tiny import GPT_OSS, OLMOE
from moetor.errors import CheckpointError, MoetorError, UnsupportedError

DENSE = "model.layers.0.self_attn.q_proj"


def with_dense(tmp_path: Path, rng: torch.Generator, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in which a layer without experts is quantised too."""
    folder, tensors = edited(tmp_path, rng, kind)
    case = next(case for case in FORMATS if case.id == kind)
    made, _ = case.maker(*tensors.pop(f"{DENSE}.weight").shape, rng)
    return folder, tensors | {f"{DENSE}.{end}": tensor for end, tensor in made.items()}


def refused(folder: Path, tensors: dict[str, Tensor], words: str) -> None:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize("stem", [EXPERT + ".up_proj", DENSE])
@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("compressed_fp8", "weight_scale"),
        ("compressed_int8", "weight_scale"),
        ("compressed_int8", "weight"),
        ("compressed_int4", "weight_scale"),
        ("compressed_nvfp4", "weight_scale"),
        ("fp8_block", "weight_scale_inv"),
    ],
)
def test_codes_without_scales_and_scales_without_codes(
    kind: str, gone: str, stem: str, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = with_dense(tmp_path, rng, kind)
    del tensors[f"{stem}.{gone}"]
    refused(folder, tensors, rf"{stem}.* lacks the tensor {stem}\.{gone}")


@pytest.mark.parametrize("stem", [EXPERT + ".up_proj", DENSE])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("compressed_int8", "weight_zero_point"),
        ("fp8_block", "qzeros"),
        ("gptq_8bit", "weight_scale"),
    ],
)
def test_parts_of_another_kind(
    kind: str, name: str, stem: str, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = with_dense(tmp_path, rng, kind)
    tensors[f"{stem}.{name}"] = torch.ones(4, 1)
    refused(folder, tensors, rf"{stem}\.{name} .*belongs to no matrix")


@pytest.mark.parametrize("stem", [EXPERT + ".up_proj", DENSE])
def test_a_matrix_that_is_there_twice(stem: str, tmp_path: Path, rng: torch.Generator) -> None:
    folder, tensors = with_dense(tmp_path, rng, "compressed_int4")
    tensors[f"{stem}.weight"] = torch.randn(list(tensors[f"{stem}.weight_shape"]))
    refused(folder, tensors, rf"{stem}\.weight is there twice")


@pytest.mark.parametrize("stem", [EXPERT + ".up_proj", DENSE])
def test_values_that_are_numbers_beside_a_scale(
    stem: str, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = with_dense(tmp_path, rng, "fp8_block")
    tensors[f"{stem}.weight"] = tensors[f"{stem}.weight"].float()
    refused(folder, tensors, rf"{stem}\.weight_scale_inv .*belongs to no matrix")


@pytest.mark.parametrize("stem", [EXPERT + ".up_proj", DENSE])
def test_float8_values_that_are_nan(stem: str, tmp_path: Path, rng: torch.Generator) -> None:
    folder, tensors = with_dense(tmp_path, rng, "fp8_block")
    tensors[f"{stem}.weight"].view(torch.uint8)[0, 0] = 0xFF
    refused(folder, tensors, rf"tensor {stem}\.weight holds a NaN")


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("gptq_asymmetric", "qzeros", (1, 1)),
        ("gptq_asymmetric", "g_idx", (3,)),
        ("awq", "qzeros", (1, 1)),
        ("compressed_int4_zero", "weight_zero_point", (1, 1)),
    ],
)
def test_parts_of_another_shape(
    kind: str, name: str, shape: tuple[int, ...], tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = edited(tmp_path, rng, kind)
    tensors[f"{EXPERT}.up_proj.{name}"] = torch.zeros(shape, dtype=torch.int32)
    refused(folder, tensors, rf"{EXPERT}\.up_proj\.{name} has shape")


def changed_group(kind: str, part: str, **changes: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(next(c for c in FORMATS if c.id == kind).settings))
    settings["config_groups"]["group_0"][part] |= changes
    groups: dict[str, Any] = settings["config_groups"]
    return {"config_groups": groups}


INT8, INT4, FP8 = "compressed_int8", "compressed_int4", "compressed_fp8"


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gptq_asymmetric", {"desc_act": True}, r"desc_act=true.*desc_act=false"),
        ("gptq_symmetric", {"checkpoint_format": "marlin"}, "marlin is not read; read are gptq"),
        ("gptq_symmetric", {"bits": 0}, "makes no sense for gptq"),
        ("gptq_symmetric", {"group_size": None}, "makes no sense for gptq"),
        ("awq", {"zero_point": False}, "zero_point=False is not read"),
        ("fp8_block", {"weight_block_size": 128}, "makes no sense for fp8"),
        ("fp8_block", {"activation_scheme": "none"}, "activation_scheme=none"),
        ("fp8_block", {"fmt": "e5m2"}, "fmt=e5m2"),
        (INT4, {"transform_config": {"config_groups": {"R1": {}}}}, "rotates activations"),
        (INT4, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (INT4, {"config_groups": ["x"]}, "makes no sense for compressed-tensors"),
        (INT4, changed_group(INT4, "weights", actorder="group"), "actorder=group"),
        (INT8, changed_group(INT8, "weights", num_bits=4), "4 bits, stored one in a byte"),
        (INT8, changed_group(INT8, "weights", symmetric=False), "with zero points"),
        (INT8, changed_group(INT8, "weights", type="float"), "dtype I8.*type=float"),
        (INT8, changed_group(INT8, "weights", strategy="tensor"), "strategy=tensor"),
        (INT8, changed_group(INT8, "input_activations", symmetric=False), "with zero points"),
        (
            FP8,
            changed_group(FP8, "input_activations", strategy="group", group_size=64),
            "by group of 64",
        ),
    ],
)
def test_settings_that_say_something_else(
    kind: str, changes: dict[str, Any], words: str, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, _ = edited(tmp_path, rng, kind)
    with_settings(folder, **changes)
    with pytest.raises(MoetorError, match=words) as caught:
        load(folder)
    assert isinstance(caught.value, CheckpointError | UnsupportedError)


def test_settings_that_say_nothing_else(tmp_path: Path, rng: torch.Generator) -> None:
    """As llm-compressor writes it where there is neither sparsity nor a transform."""
    folder, _ = edited(tmp_path, rng, INT4)
    with_settings(folder, transform_config={}, sparsity_config={}, kv_cache_scheme=None)
    check_weights(load(folder), load(tmp_path / "dense"))


@pytest.mark.parametrize("size", [[16, 32], "16x32"])
def test_blocks_of_compressed_tensors(size: Any, tmp_path: Path, rng: torch.Generator) -> None:
    case = next(case for case in FORMATS if case.id == "fp8_block")
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": size}
    group = {"targets": ["Linear"], "weights": weights}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }

    def named(rows: int, depth: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        made, dense = fp8_block(rows, depth, rng)
        return {"weight": made["weight"], "weight_scale": made["weight_scale_inv"]}, dense

    blocks = type(case)("blocks", named, settings, case.weights)
    folder = write(OLMOE.build(**SIZES), blocks, tmp_path, rng)
    check_weights(load(folder), load(tmp_path / "dense"))


def test_a_quantised_checkpoint_keeps_what_is_no_part_of_it(
    tmp_path: Path, rng: torch.Generator
) -> None:
    """Scales of a quantised cache say nothing about weights."""
    folder, tensors = edited(tmp_path, rng, INT8)
    tensors["model.layers.0.self_attn.k_proj.output_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    check_weights(load(folder), load(tmp_path / "dense"))


def gpt_oss(tmp_path: Path, rng: torch.Generator) -> tuple[Path, dict[str, Tensor]]:
    model = GPT_OSS.build(hidden_size=64, intermediate_size=32)
    model.save_pretrained(tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    packed = dict(dense)
    for name in [name for name in dense if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, depth, rows = packed.pop(name).shape
        made = [mxfp4(rows, depth, rng)[0] for _ in range(experts)]
        packed |= {f"{name}_{end}": torch.stack([one[end] for one in made]) for end in made[0]}
    return save_both(tmp_path, dense, packed, {"quant_method": "mxfp4"}), packed


@pytest.mark.parametrize(
    ("end", "change", "words"),
    [
        ("blocks", lambda t: t.flatten(2), "has shape"),
        ("blocks", lambda t: t[..., :8], "has shape"),
        ("scales", lambda t: t[:, :3], "has shape"),
        ("scales", lambda t: t.float(), "has dtype F32, it must be U8"),
        ("scales", lambda t: t.fill_(255), "holds a scale that is NaN"),
    ],
)
def test_blocks_and_scales_of_gpt_oss(
    end: str, change: Any, words: str, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = gpt_oss(tmp_path, rng)
    name = f"model.layers.1.mlp.experts.down_proj_{end}"
    tensors[name] = change(tensors[name]).contiguous()
    refused(folder, tensors, f"{name} {words}")
