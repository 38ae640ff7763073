"""Recording which experts tokens go to, and replaying it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import moetor
from moetor.demo import model_path
from moetor.errors import FusionError, InputError, UnsupportedError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    loaded = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    moetor.fuse(loaded)
    return loaded


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(5, 1000, (2, 11), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def test_recorded_ids_are_the_router_s_choice(model: nn.Module, ids: torch.Tensor) -> None:
    with moetor.record_routing(model) as record, torch.no_grad():
        out = model(ids, output_router_logits=True)
    assert record.ids.shape == (22, 4, 4)
    assert record.layers == tuple(f"model.layers.{layer}.mlp" for layer in range(4))
    for layer, router_logits in enumerate(out.router_logits):
        chosen = router_logits.float().softmax(-1).topk(4).indices.sort(-1).values
        assert torch.equal(record.ids[:, layer].sort(-1).values.long(), chosen)
        assert torch.equal(record.ids_of(record.layers[layer]), record.ids[:, layer])


def test_calls_are_recorded_one_after_the_other(model: nn.Module, ids: torch.Tensor) -> None:
    with moetor.record_routing(model) as record:
        logits(model, ids[:1])
        logits(model, ids[1:])
    with moetor.record_routing(model) as whole:
        logits(model, ids)
    assert torch.equal(record.ids, whole.ids)


def test_replaying_a_model_s_own_ids_changes_no_bit(model: nn.Module, ids: torch.Tensor) -> None:
    expected = logits(model, ids)
    with moetor.record_routing(model) as record:
        logits(model, ids)
    with moetor.replay_routing(model, record.ids):
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), expected)


def test_other_ids_are_really_used(model: nn.Module, ids: torch.Tensor) -> None:
    with moetor.record_routing(model) as record:
        expected = logits(model, ids)
    other = (record.ids + 1) % 16
    with moetor.replay_routing(model, other):
        assert (logits(model, ids) - expected).abs().max() > 0.1


def test_a_copy_has_a_record_of_its_own(model: nn.Module, ids: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    with moetor.record_routing(twin) as record:
        logits(model, ids)
    with pytest.raises(InputError, match="no routing was recorded"):
        _ = record.ids


def test_experts_alone_replay_their_own_choice(ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    moetor.fuse(model, level="experts")
    with moetor.record_routing(model) as record:
        expected = logits(model, ids)
    assert record.ids.shape == (22, 4, 4)
    with moetor.replay_routing(model, record.ids):
        assert torch.equal(logits(model, ids), expected)
    with (
        moetor.replay_routing(model, (record.ids + 1) % 16),
        pytest.raises(UnsupportedError, match="routed outside of Moetor"),
    ):
        logits(model, ids)


def test_ids_that_name_no_expert_are_refused(model: nn.Module, ids: torch.Tensor) -> None:
    with (
        moetor.replay_routing(model, torch.full((22, 4, 4), 16)),
        pytest.raises(InputError, match="they are 0 to 15"),
    ):
        logits(model, ids)


def test_a_monolithic_method_is_refused(ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    moetor.fuse(model, quantization="unquantized_monolithic")
    with (
        moetor.record_routing(model),
        pytest.raises(UnsupportedError, match="routes inside its kernel"),
    ):
        logits(model, ids)


def test_too_few_ids_are_refused(model: nn.Module, ids: torch.Tensor) -> None:
    with moetor.record_routing(model) as record:
        logits(model, ids)
    with (
        moetor.replay_routing(model, record.ids[:5]),
        pytest.raises(InputError, match="end at 5"),
    ):
        logits(model, ids)


@pytest.mark.parametrize("shape", [(22, 4), (22, 3, 4)])
def test_ids_of_another_model_are_refused(model: nn.Module, shape: tuple[int, ...]) -> None:
    with (
        pytest.raises(InputError, match=r"takes integers \[tokens, 4, top_k\]"),
        moetor.replay_routing(model, torch.zeros(shape, dtype=torch.int32)),
    ):
        pass


def test_ids_of_another_top_k_are_refused(model: nn.Module, ids: torch.Tensor) -> None:
    with (
        moetor.replay_routing(model, torch.zeros((22, 4, 3), dtype=torch.int32)),
        pytest.raises(InputError, match="chooses 4 of 16 experts"),
    ):
        logits(model, ids)


def test_a_model_that_is_not_fused_is_refused() -> None:
    with (
        pytest.raises(FusionError, match=r"call moetor\.fuse"),
        moetor.record_routing(nn.Linear(2, 2)),
    ):
        pass
