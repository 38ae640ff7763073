"""Experts quantised while a checkpoint is read: the same codes as after loading it whole, and no
more memory than the quantised model and a few experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moetor
from huggingface.tiny import FAMILIES, OLMOE
from moetor.errors import CheckpointError, FusionMismatchError, KernelRefusedError
from moetor.huggingface import quantized_loading, streaming
from moetor.huggingface.dummy import dummy_model
from moetor.huggingface.modules import FusedMoEBlock, fused_modules
from moetor.layer.quantized_experts import QuantizedExperts
from moetor.quant_config import QuantConfig

# Transformers' own grouped product, which a loaded model has, refuses the odd sizes of the others.
USUAL = [tiny for tiny in FAMILIES if tiny.implementation is None]
IDS = torch.arange(2, 20).reshape(2, 9)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("quantization", ["int8", "int4_zp", "fp8_block", "nvfp4"])
@pytest.mark.parametrize("tiny", USUAL, ids=lambda tiny: tiny.id)
def test_streamed_experts_have_the_codes_of_loaded_ones(
    tiny: Any, quantization: str, tmp_path: Path
) -> None:
    model = tiny.build()
    model.save_pretrained(tmp_path)
    expected = moetor.fuse(model, quantization=quantization)
    streamed = moetor.MoEForCausalLM.from_pretrained(
        str(tmp_path), quantization=quantization, device="cpu"
    )
    report = streamed.fusion_report
    assert report.quantized == expected.quantized
    assert report.kernels == expected.kernels
    ours, theirs = streamed.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].float(), tensor.float()), name
    assert not any(tensor.is_meta for tensor in streamed.parameters())
    assert torch.equal(logits(streamed), logits(model))


def test_no_expert_is_held_unquantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch matrices alive at once: one for each reader."""
    OLMOE.build(num_experts=24).save_pretrained(tmp_path)
    alive: list[int] = []
    own = quantized_loading.QuantizingSink.place

    def place(self: quantized_loading.QuantizingSink, *args: object) -> torch.Tensor:
        made = own(self, *args)  # type: ignore[arg-type]
        alive.append(len(self._scratch))
        return made

    monkeypatch.setattr(quantized_loading.QuantizingSink, "place", place)
    model = moetor.MoEForCausalLM.from_pretrained(str(tmp_path), quantization="int4")
    assert len(alive) > 96
    assert max(alive) <= streaming.READERS
    assert all(isinstance(one.routed_experts, QuantizedExperts) for _, one in fused_modules(model))


def test_the_proof_still_proves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OLMOE.build().save_pretrained(tmp_path)
    own = FusedMoEBlock.forward

    def wrong(self: FusedMoEBlock, hidden_states: torch.Tensor, *args: object) -> object:
        return own(self, hidden_states * 1.01, *args)

    monkeypatch.setattr(FusedMoEBlock, "forward", wrong)
    with pytest.raises(FusionMismatchError):
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path), quantization="int8")


def test_a_configuration_is_taken_and_reported(tmp_path: Path) -> None:
    OLMOE.build().save_pretrained(tmp_path)
    quant = QuantConfig(format="int4", group_size=64, symmetric=False)
    model = moetor.MoEForCausalLM.from_pretrained(str(tmp_path), quantization=quant)
    assert {block.quantization for block in model.fusion_report.blocks} == {"int4_g64_zp"}


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = OLMOE.build()
    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1.*down_proj, expert 3: .*NaN"):
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path), quantization="int8")


def test_a_kernel_that_does_not_read_the_format_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OLMOE.build().save_pretrained(tmp_path)
    monkeypatch.setattr(quantized_loading.QuantizingSink, "place", None)
    with pytest.raises(KernelRefusedError, match=r"'native'.*fp8_block128x128"):
        moetor.MoEForCausalLM.from_pretrained(
            str(tmp_path), quantization="fp8_block", kernel="native"
        )


@pytest.mark.parametrize("quantization", ["int4", "int8", "fp8_block", "nvfp4"])
def test_a_dummy_model_is_made_quantised(quantization: str) -> None:
    """Its experts are never there unquantised, no two of a layer are equal unless blocks forbid it,
    and it runs."""
    model = dummy_model(
        OLMOE.config(), OLMOE.model_class, torch.bfloat16, torch.device("cpu"), 0, quantization
    )
    held = [p for name, p in model.named_parameters() if ".experts." in name]
    assert held
    assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in held)
    report = moetor.fuse(model, quantization=quantization)
    assert all(block.quantization == quantization for block in report.blocks)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    found = logits(model)
    assert found.isfinite().all()
    assert found.std() > 0
    again = dummy_model(
        OLMOE.config(), OLMOE.model_class, torch.bfloat16, torch.device("cpu"), 0, quantization
    )
    moetor.fuse(again, quantization=quantization)
    assert torch.equal(logits(again), found)
    weights = fused_modules(model)[0][1].routed_experts.quantized_weights  # type: ignore[attr-defined]
    if quantization != "fp8_block":
        first, second = (weights.down.values[e].view(torch.uint8) for e in (0, 1))
        assert not torch.equal(first, second)
