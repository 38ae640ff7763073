"""Sizes that are no multiple of 16 bytes, which Transformers' grouped product cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moetor
from moetor.tools.tiny import logits_of, tiny_inputs, tiny_model

CASES = [
    ("qwen3_moe", {"moe_intermediate_size": 41}),
    ("deepseek_v3", {"moe_intermediate_size": 37}),
    ("gpt_oss", {"intermediate_size": 43}),
]
cases = pytest.mark.parametrize(("name", "settings"), CASES, ids=[name for name, _ in CASES])


def eager_logits(name: str, model: Any) -> torch.Tensor:
    model.set_experts_implementation("eager")
    return logits_of(name, model, tiny_inputs(name, model))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["block", "experts"])
def test_fused_and_proved(
    name: str, settings: dict[str, Any], dtype: torch.dtype, level: Any
) -> None:
    model = tiny_model(name, dtype, settings=settings)
    inputs = tiny_inputs(name, model)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        logits_of(name, model, inputs)
    expected = eager_logits(name, tiny_model(name, dtype, settings=settings))
    report = moetor.fuse(model, level=level)
    assert {block.level for block in report.blocks} == {level}
    assert all(block.max_error is not None for block in report.blocks)
    assert model.config._experts_implementation == "grouped_mm"
    deviation = (logits_of(name, model, inputs) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(deviation.median()) <= (1e-5 if dtype == torch.float32 else 0.03)


@cases
def test_verified(name: str, settings: dict[str, Any]) -> None:
    report = moetor.verify(tiny_model(name, settings=settings))
    assert report.ok
    assert {block.level for block in report.blocks} == {"block"}
    assert report.logits_error <= 1e-5


def test_another_failure_is_not_swallowed() -> None:
    from moetor.huggingface.any_size import call_original

    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        call_original(torch.nn.Linear(2, 2), fail)
