"""`fuse(verify=False)` gives the same model, only without the proof."""

from __future__ import annotations

import pytest

import moetor
from moetor.huggingface.trial import relative_error
from moetor.tools.tiny import logits_of, tiny_inputs, tiny_model


# A mean of routed and shared experts, a scale that the block applies, a weight on the input.
@pytest.mark.parametrize("family", ["cohere2_moe", "laguna", "llama4", "qwen2_moe"])
def test_the_composition_is_found_without_a_proof(family: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(family, model)
    before = logits_of(family, model, inputs)
    report = moetor.fuse(model, verify=False)
    assert {block.level for block in report.blocks} == {"block"}
    assert all(block.max_error is None for block in report.blocks)
    assert relative_error(logits_of(family, model, inputs), before) < 1e-5
