"""Quantising a model's experts on the fly: what it costs in quality, what it saves, what is
refused, and what stays untouched."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import moetor
from huggingface.tiny import GPT_OSS, QWEN2, QWEN3, Tiny
from moetor.errors import ConfigError, FusionError, InputError, KernelRefusedError
from moetor.huggingface import verifying
from moetor.huggingface.loading import load_model
from moetor.huggingface.modules import fused_modules
from moetor.huggingface.verifying import perplexity
from moetor.kernels.dequantize import dequantize_expert
from moetor.layer.quantized_experts import QuantizedExperts
from moetor.quant_config import PRESETS, QuantConfig


@cache
def demo() -> tuple[nn.Module, Tensor, float]:
    """The demo model, its held-out tokens and its perplexity."""
    model = load_model("demo")
    ids = verifying._demo_ids(model)
    return model, ids, perplexity(model, ids)


@pytest.mark.parametrize(
    ("quantization", "limit"),
    [
        *((name, 1.01) for name in ("fp8", "fp8_block", "fp8_tensor", "int8", "mxfp8")),
        *((name, 1.03) for name in ("int4", "int4_zp", "int4_g128", "nvfp4")),
        ("mxfp4", 1.05),
    ],
)
def test_the_demo_keeps_its_perplexity(quantization: str, limit: float) -> None:
    model, ids, before = demo()
    model = copy.deepcopy(model)
    report = moetor.fuse(model, quantization=quantization, verify=False)
    after = perplexity(model, ids)
    assert after != before
    assert after <= before * limit
    assert report.quantized is not None
    assert report.quantized.startswith(f"experts: 64 of 64 quantised ({quantization}), 0.00586 -> ")
    for block in report.blocks:
        assert block.quantization == quantization
        assert block.quantization_error is not None
        assert 0 < block.quantization_error < 0.25
        assert block.expert_bytes is not None
        assert block.expert_bytes[1] < 0.55 * block.expert_bytes[0]


def experts_of(model: nn.Module) -> list[QuantizedExperts]:
    found = [module.routed_experts for _, module in fused_modules(model)]
    assert found
    for experts in found:
        assert isinstance(experts, QuantizedExperts)
    return found


@pytest.mark.parametrize("tiny", [QWEN3, GPT_OSS], ids=["qwen3", "gpt_oss"])
@pytest.mark.parametrize("level", ["block", "experts"])
@pytest.mark.parametrize("quantization", ["int8_w8a16", "int4_zp", "fp8_block"])
def test_the_model_computes_with_its_rounded_weights(
    tiny: Tiny, level: str, quantization: str
) -> None:
    """A copy of the original whose experts are overwritten by the dequantised weights, in the
    original's own layout, has the same logits."""
    model = tiny.build()
    twin = copy.deepcopy(model)
    quant = replace(PRESETS[quantization], activations="unquantized")
    moetor.fuse(model, level=level, quantization=quant, kernel="torch")
    originals = [
        module
        for module in twin.modules()
        if getattr(module, "down_proj", None) is not None
        and isinstance(module.down_proj, nn.Parameter)
    ]
    for experts, original in zip(experts_of(model), originals, strict=True):
        weights = experts.quantized_weights
        for expert in range(experts.config.num_experts):
            gate_up = dequantize_expert(weights.gate_up, expert)
            down = dequantize_expert(weights.down, expert)
            if tiny is GPT_OSS:  # transposed, gate and up in turn
                gate_up = torch.stack(gate_up.chunk(2), dim=1).flatten(0, 1).T
                down = down.T
            original.gate_up_proj.data[expert] = gate_up
            original.down_proj.data[expert] = down
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, expected = model(input_ids=ids).logits, twin(input_ids=ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_everything_but_the_experts_stays_as_it_is() -> None:
    model = QWEN2.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moetor.fuse(model, quantization="int8")
    after = model.state_dict()
    kept = [name for name in before if ".experts." not in name]
    assert any("shared_expert" in name for name in kept)
    for name in kept:
        assert torch.equal(after[name], before[name])
    packed = [name for name, value in after.items() if value.dtype == torch.int8]
    assert packed == [name for name in before if ".experts." in name]


@pytest.mark.parametrize("level", ["block", "experts"])
def test_original_weights_are_released(level: str) -> None:
    model = QWEN3.build()
    originals = [
        weakref.ref(parameter)
        for name, parameter in model.named_parameters()
        if ".experts." in name
    ]
    assert originals
    moetor.fuse(model, level=level, quantization="int4")
    gc.collect()
    assert [ref for ref in originals if ref() is not None] == []


def test_unfuse_and_save_are_refused(tmp_path: object) -> None:
    model = QWEN3.build()
    moetor.fuse(model, quantization="int4")
    before = dict(model.named_modules())
    with pytest.raises(FusionError, match=r"quantised \(int4\).*load the model again"):
        moetor.unfuse(model)
    assert dict(model.named_modules()) == before
    with pytest.raises(InputError, match="moetor quantize"):
        model.save_pretrained(tmp_path)
    with pytest.raises(FusionError, match="fused already"):
        moetor.fuse(model, quantization="int4")


def test_casting_leaves_codes_and_scales_alone() -> None:
    for level in ("block", "experts"):
        model = GPT_OSS.build()
        moetor.fuse(model, level=level, quantization="fp8")
        experts = experts_of(model)[0]
        codes = experts.quantized_weights
        model.to(torch.bfloat16)
        after = experts_of(model)[0].quantized_weights
        assert torch.equal(
            after.gate_up.values.view(torch.uint8), codes.gate_up.values.view(torch.uint8)
        )
        assert torch.equal(after.down.scales, codes.down.scales)
        assert after.down.scales.dtype == torch.float32
        assert after.down_bias is not None
        assert after.down_bias.dtype == experts.dtype == torch.bfloat16
        ids = torch.randint(0, 40, (1, 4))
        with torch.no_grad():
            assert model(input_ids=ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(poison: float) -> None:
    model = QWEN3.build()
    path = "model.layers.1.mlp"
    model.get_submodule(path).experts.down_proj.data[2, 1, 1] = poison
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(FusionError, match=r"model\.layers\.1\.mlp.*down of expert 2.*nothing was"):
        moetor.fuse(model, quantization="int8", verify=False)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("int3", r"'int3' is not known here; possible: None, fp8"),
        (4, r"quantization=4 is not known here; possible: None, fp8"),
        ({"format": "int4"}, r"is not known here; possible: .* or a QuantConfig"),
        (
            BitsAndBytesConfig(load_in_4bit=True),
            r"BitsAndBytesConfig is.*use int4 in its place",
        ),
        (
            BitsAndBytesConfig(load_in_8bit=True),
            r"BitsAndBytesConfig is.*use int8 in its place",
        ),
        ("load_in_4bit", "use int4 in its place"),
        ("bitsandbytes", "use int8 in its place"),
        ("nf4", "use int4 in its place"),
    ],
)
def test_unknown_names_are_refused_with_what_works(asked: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        moetor.fuse(QWEN3.build(), quantization=asked)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "int5"}, "int5.*fp8, int8"),
        ({"format": "int4", "group_size": 48}, "group_size=48; possible: 32, 64, 128"),
        ({"format": "int4", "granularity": "channel"}, "no granularity 'channel'; possible: group"),
        ({"format": "int8", "group_size": 32}, "no meaning with granularity 'channel'"),
        ({"format": "fp8", "symmetric": False}, "int4 alone"),
        ({"format": "int4", "activations": "dynamic"}, "not quantised"),
        ({"format": "fp8", "activations": "static"}, "not dynamic or unquantized"),
    ],
)
def test_contradictory_configurations_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuantConfig(**fields)  # type: ignore[arg-type]


def test_a_kernel_that_does_not_read_the_format_is_refused_before_anything_changes() -> None:
    model = QWEN3.build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(KernelRefusedError, match=r"'native'.*fp8_block128x128.*torch"):
        moetor.fuse(model, quantization="fp8_block", kernel="native")
    assert [type(module) for module in model.modules()] == kinds


def test_verify_reports_what_quantising_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "PERPLEXITY_TOKENS", 256)
    report = moetor.verify("demo", quantization="int4")
    assert report.ok
    assert report.logits_tolerance is None
    assert report.logits_error > 0
    assert all(block.quantization_error and block.max_error for block in report.blocks)
    monkeypatch.setitem(verifying.PERPLEXITY_LIMITS, "int4", 0.5)
    assert not moetor.verify("demo", quantization="int4").ok


def test_verify_gives_a_live_model_back_as_it_was() -> None:
    model = QWEN3.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = moetor.verify(model, quantization="int8")
    assert report.ok
    assert report.quantized is not None
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
