"""Every family's routing recorded, and replayed with equal logits."""

from __future__ import annotations

import pytest
import torch

import moetor
from moetor.errors import UnsupportedError
from moetor.tools.tiny import FAMILIES, logits_of, tiny_inputs, tiny_model

UNTOUCHED = ("doge", "nllb_moe", "vitpose_backbone")
CALLABLE = ("phimoe", "zaya", "inkling", "gemma4", "switch_transformers")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNTOUCHED])
def test_replaying_a_family_s_own_ids_gives_equal_logits(name: str) -> None:
    try:
        model = tiny_model(name)
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    inputs = tiny_inputs(name, model)
    moetor.fuse(model)
    fused = logits_of(name, model, inputs)
    with moetor.record_routing(model) as record:
        logits_of(name, model, inputs)
    by_layer = record.by_layer
    assert by_layer
    assert any(bool((ids != 0).any()) for ids in by_layer.values())
    with moetor.replay_routing(model, by_layer):
        assert torch.equal(logits_of(name, model, inputs), fused)


@pytest.mark.parametrize("name", CALLABLE)
def test_a_router_without_a_formula_replays_its_own_choice_alone(name: str) -> None:
    try:
        model = tiny_model(name)
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    inputs = tiny_inputs(name, model)
    report = moetor.fuse(model)
    if not any(block.router.startswith("callable") for block in report.blocks):
        pytest.skip("its router is a formula in this release of Transformers")
    with moetor.record_routing(model) as record:
        fused = logits_of(name, model, inputs)
    turned = {path: ids.flip(-1) for path, ids in record.by_layer.items()}
    with moetor.replay_routing(model, turned):
        torch.testing.assert_close(logits_of(name, model, inputs), fused, rtol=1e-4, atol=1e-5)
    other = {path: (ids + 1) % 8 for path, ids in record.by_layer.items()}
    with (
        moetor.replay_routing(model, other),
        pytest.raises(UnsupportedError, match="its own choice alone"),
    ):
        logits_of(name, model, inputs)


def test_identity_experts_are_recorded_by_their_ids() -> None:
    model = tiny_model("longcat_flash")
    inputs = tiny_inputs("longcat_flash", model)
    moetor.fuse(model)
    with moetor.record_routing(model) as record:
        logits_of("longcat_flash", model, inputs)
    assert 8 <= int(record.ids.max()) < 12
