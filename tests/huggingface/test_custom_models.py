"""Blocks from somebody's own file: a list of experts and a gate, fused and given back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from custom_models import TinyModel, tiny_custom
from torch import Tensor, nn

import moetor
from moetor.errors import FusionMismatchError
from moetor.huggingface.trial import relative_error

STYLES = ("own", "mixtral", "grok", "deepseek")
ROUTING = {
    "own": "softmax top-3 of 8, renormalised",
    "mixtral": "softmax top-3 of 8, renormalised",
    "grok": "softmax top-3 of 8",
    "deepseek": "softmax top-3 of 8, groups 2/4, x 2.5",
}
styles = pytest.mark.parametrize("style", STYLES)


@torch.no_grad()
def logits_of(model: TinyModel) -> Tensor:
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(3))
    logits: Tensor = model(ids).logits
    return logits


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@styles
@pytest.mark.parametrize("bias", [False, True])
def test_fused_whole_and_given_back(style: str, bias: bool) -> None:
    model = tiny_custom(style, bias=bias)
    before, saved = logits_of(model), states(model)
    report = moetor.fuse(model, level="block")
    assert [block.level for block in report.blocks] == ["block", "block"]
    assert {block.router for block in report.blocks} == {ROUTING[style]}
    experts = sum(t.nbytes for name, t in saved.items() if ".experts." in name)
    assert sum(block.packed_bytes for block in report.blocks) == experts
    assert "experts of 2 blocks packed once" in str(report)
    assert relative_error(logits_of(model), before) <= 1e-5
    assert_same_states(states(model), saved)
    moetor.unfuse(model)
    assert torch.equal(logits_of(model), before)
    assert_same_states(states(model), saved)


@styles
def test_bfloat16(style: str) -> None:
    model = tiny_custom(style).to(torch.bfloat16)
    before = logits_of(model).float()
    report = moetor.fuse(model)
    assert {block.level for block in report.blocks} == {"block"}
    assert relative_error(logits_of(model).float(), before) <= 0.05


def test_more_experts_than_columns() -> None:
    model = tiny_custom("own", num_experts=40, hidden_size=16)
    before = logits_of(model)
    report = moetor.fuse(model, level="block")
    assert report.blocks[0].router == "softmax top-3 of 40, renormalised"
    assert relative_error(logits_of(model), before) <= 1e-5


def test_the_block_still_returns_its_router_logits() -> None:
    model = tiny_custom("mixtral")
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    before = model.layers[0].mlp(hidden)
    moetor.fuse(model)
    after = model.layers[0].mlp(hidden)
    assert relative_error(after[0], before[0]) <= 1e-5
    assert relative_error(after[1], before[1]) <= 1e-5


@styles
def test_weights_are_held_once(style: str) -> None:
    model = tiny_custom(style)
    size = sum(t.numel() for t in model.state_dict().values())
    moetor.fuse(model)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for module in (model, *(m.__dict__.get("_original") for m in model.modules()))
        if isinstance(module, nn.Module)
        for t in module.parameters()
    }
    assert sum(held.values()) == 4 * size


@styles
def test_a_saved_model_loads_unfused(style: str, tmp_path: Path) -> None:
    model = tiny_custom(style)
    before, saved = logits_of(model), states(model)
    moetor.fuse(model)
    model.save_pretrained(tmp_path)
    again = TinyModel.from_pretrained(tmp_path).eval()
    assert_same_states(states(again), saved)
    assert torch.equal(logits_of(again), before)


@styles
def test_a_state_loads_into_a_fused_model(style: str) -> None:
    model, other = tiny_custom(style), tiny_custom(style, seed=1)
    moetor.fuse(model)
    model.load_state_dict(other.state_dict())
    assert relative_error(logits_of(model), logits_of(other)) <= 1e-5


def test_a_missing_and_a_wrong_tensor_are_named() -> None:
    model = tiny_custom("mixtral")
    moetor.fuse(model)
    state = dict(model.state_dict())
    name = "layers.1.mlp.experts.2.w3.weight"
    value = state.pop(name)
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        model.load_state_dict(state)
    state[name] = value[:-1]
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}"):
        model.load_state_dict(state)


@styles
def test_moved_copied_and_pickled(style: str) -> None:
    model = tiny_custom(style)
    before = logits_of(model)
    moetor.fuse(model)
    fused = logits_of(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), fused)
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), fused)
    twin.to(torch.float64)
    assert relative_error(logits_of(twin).float(), before) <= 1e-5
    moetor.unfuse(twin)
    assert relative_error(logits_of(twin).float(), before) <= 1e-5
    assert torch.equal(logits_of(model), fused)


@styles
def test_a_failure_gives_every_weight_back(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block fails when the first has been packed."""
    model = tiny_custom(style)
    before, saved = logits_of(model), states(model)
    original = type(model.layers[1].mlp.experts[0]).forward
    odd = model.layers[1].mlp.experts[5]
    monkeypatch.setattr(
        type(odd), "forward", lambda self, x: original(self, x) * (2 if self is odd else 1)
    )
    with pytest.raises(FusionMismatchError, match=r"layers\.1\.mlp"):
        moetor.fuse(model)
    monkeypatch.undo()
    assert torch.equal(logits_of(model), before)
    assert_same_states(states(model), saved)


def test_an_expert_with_more_in_it_is_left_alone() -> None:
    model = tiny_custom("own")
    model.layers[0].mlp.experts[3].add_module("norm", nn.LayerNorm(32))
    before = logits_of(model)
    report = moetor.fuse(model)
    assert [block.level for block in report.blocks] == ["none", "block"]
    assert "experts.3.norm.weight" in report.blocks[0].reason
    assert relative_error(logits_of(model), before) <= 1e-5


def test_explain_needs_no_weights() -> None:
    from moetor.config import RunnerConfig
    from moetor.huggingface.block_form import find_blocks, recognise_block, router_label
    from moetor.huggingface.experts_form import Unrecognised

    for style in STYLES:
        model = tiny_custom(style).to("meta")
        for path, block, source in find_blocks(model):
            plan = recognise_block(
                path, block, source, quantization=None, runner=RunnerConfig(), hint=None
            )
            assert not isinstance(plan, Unrecognised), plan.reason
            assert router_label(plan) == ROUTING[style]


@styles
def test_routing_is_recorded_and_replayed(style: str) -> None:
    model = tiny_custom(style)
    moetor.fuse(model)
    fused = logits_of(model)
    with moetor.record_routing(model) as record:
        logits_of(model)
    assert record.ids.shape == (26, 2, 3)
    with moetor.replay_routing(model, record.ids):
        assert torch.equal(logits_of(model), fused)
