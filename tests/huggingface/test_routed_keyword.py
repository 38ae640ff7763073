"""`return_routed_experts=True` of a fused model's forward and `generate`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import moetor
from moetor.errors import InputError
from moetor.tools.tiny import tiny_model


@pytest.fixture
def model() -> Any:
    made = tiny_model("qwen3_moe")
    moetor.fuse(made)
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 100, (2, 11), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_forward_tells_what_was_recorded(model: Any, ids: torch.Tensor) -> None:
    with moetor.record_routing(model) as record:
        plain = model(ids)
    out = model(ids, return_routed_experts=True)
    assert out.routed_experts.shape == (22, 2, 3)
    assert out.routed_experts.dtype == torch.int32
    assert torch.equal(out["routed_experts"], record.ids)
    assert torch.equal(out.logits, plain.logits)
    assert "routed_experts" not in plain
    assert "routed_experts" not in model(ids, return_routed_experts=False)


@torch.no_grad()
def test_an_outer_record_sees_it_too(model: Any, ids: torch.Tensor) -> None:
    with moetor.record_routing(model) as record:
        out = model(ids, return_routed_experts=True)
        model(ids[:, :3])
    assert torch.equal(record.ids[:22], out.routed_experts)
    assert record.ids.shape[0] == 22 + 6


@torch.no_grad()
def test_what_generate_tells_replays_in_one_forward(model: Any, ids: torch.Tensor) -> None:
    out = model.generate(
        ids,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        return_routed_experts=True,
    )
    read = out.sequences[:, :-1]
    assert out.routed_experts.shape == (read.numel(), 2, 3)
    whole = model(read, return_routed_experts=True)
    assert torch.equal(whole.routed_experts.sort(-1).values, out.routed_experts.sort(-1).values)
    with moetor.replay_routing(model, out.routed_experts):
        replayed = model(read).logits
    torch.testing.assert_close(replayed[:, -6:], torch.stack(out.logits, 1), rtol=1e-4, atol=1e-4)


def test_generate_without_it_is_the_model_s_own(model: Any, ids: torch.Tensor) -> None:
    ours = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    theirs = type(model).generate(model, ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "return_dict_in_generate=True"),
        ({"return_dict_in_generate": True, "num_beams": 2}, "beams"),
        ({"return_dict_in_generate": True, "prompt_lookup_num_tokens": 2}, "prompt_lookup"),
    ],
)
def test_what_generate_cannot_tell_is_refused(
    model: Any, ids: torch.Tensor, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        model.generate(ids, max_new_tokens=2, return_routed_experts=True, **options)


def test_tuples_are_refused(model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="named outputs"):
        model(ids, return_dict=False, return_routed_experts=True)


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind(model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(IndexError):
        model(ids + 10_000, return_routed_experts=True)
    assert "routed_experts" not in model(ids)
    assert model(ids, return_routed_experts=True).routed_experts.shape == (22, 2, 3)


@torch.no_grad()
def test_copies_have_their_own(model: Any, ids: torch.Tensor) -> None:
    expected = model(ids, return_routed_experts=True).routed_experts
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.generate.model is twin
        assert torch.equal(twin(ids, return_routed_experts=True).routed_experts, expected)


def test_unfused_models_do_not_know_it(model: Any, ids: torch.Tensor) -> None:
    moetor.unfuse(model)
    assert "generate" not in model.__dict__
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="return_routed_experts"):
        model.generate(ids, max_new_tokens=2, return_routed_experts=True)


@torch.no_grad()
def test_layers_that_see_different_tokens_are_told_by_path() -> None:
    model = tiny_model("switch_transformers")
    moetor.fuse(model)
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, decoder_input_ids=ids[:, :4], return_routed_experts=True)
    assert {tuple(one.shape) for one in out.routed_experts.values()} == {(18, 1), (8, 1)}
    with moetor.replay_routing(model, out.routed_experts):
        again = model(input_ids=ids, decoder_input_ids=ids[:, :4])
    assert torch.equal(again.logits, out.logits)


@torch.no_grad()
def test_a_whole_model_still_compiles_as_one_graph(model: Any, ids: torch.Tensor) -> None:
    torch._dynamo.reset()
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
