"""Routing against the oracle: every scoring, order, group form and correction of a weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from layer.routing_cases import CASES, RoutingCase, draw
from moetor.config import RouterConfig
from moetor.kernels.routing import Routing, route


def dense(routing: Routing, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """[T, E] weights of the experts, and [T] of the token itself."""
    tokens = routing.topk_ids.shape[0]
    weights = torch.zeros(tokens, config.num_experts + 1, dtype=torch.float64)
    weights.scatter_add_(1, routing.topk_ids.long(), routing.topk_weights.double())
    assert not weights[:, config.num_experts].any(), "a dropped slot has weight 0"
    identity = routing.identity_weights
    if config.num_zero_experts:
        assert identity is not None
        assert identity.dtype == torch.float32
        return weights[:, :-1], identity.double()
    assert identity is None
    return weights[:, :-1], torch.zeros(tokens, dtype=torch.float64)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_the_oracle(case: RoutingCase, dtype: torch.dtype, rng: torch.Generator) -> None:
    config = case.config
    logits, bias = draw(case, dtype, rng)
    before = logits.clone()
    judged = oracle.route(logits, config, bias, dtype)
    expected = judged.dense(config.num_logits)
    routing = route(logits, config, bias, dtype)
    assert torch.equal(logits, before)
    assert routing.topk_weights.dtype == torch.float32
    assert routing.topk_ids.dtype == torch.int32
    assert routing.topk_ids.shape == routing.topk_weights.shape == (case.tokens, config.top_k)
    for found, ids in zip(routing.topk_ids.tolist(), judged.ids, strict=True):
        assert sorted(found) == sorted(min(expert, config.num_experts) for expert in ids)
    weights, identity = dense(routing, config)
    # Weights are relative quantities: exp and divisions of float32, a dozen roundings at most. One
    # rounded to the model's dtype may fall to the neighbouring number.
    relative = 32 * torch.finfo(torch.float32).eps
    if config.weights_precision == "model":
        relative += torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
        assert torch.equal(routing.topk_weights, routing.topk_weights.to(dtype).float())
    wanted = expected[:, : config.num_experts]
    assert ((weights - wanted).abs() <= relative * wanted).all()
    wanted_identity = expected[:, config.num_experts :].sum(dim=1)
    assert ((identity - wanted_identity).abs() <= relative * wanted_identity).all()


def test_a_zero_mask_lets_masked_experts_win_over_negative_scores() -> None:
    """Group 0 wins with scores -0.2 and -0.1; group 1 is masked to 0 and 0, and is chosen."""
    config = RouterConfig(
        num_experts=4,
        top_k=2,
        scoring="sigmoid",
        num_groups=2,
        top_k_groups=1,
        selection_bias=True,
        group_mask="zero",
    )
    logits = torch.tensor([[0.3, 0.4, -0.5, -0.6]])
    bias = torch.tensor([-0.2, -0.1, -0.4, -0.3]) - torch.sigmoid(logits[0])
    routing = route(logits, config, bias, torch.float32)
    assert sorted(routing.topk_ids[0].tolist()) == [2, 3]
    expected = oracle.route(logits, config, bias, torch.float32)
    assert sorted(expected.ids[0]) == [2, 3]
    weights, _ = dense(routing, config)
    torch.testing.assert_close(weights, expected.dense(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights[0, 2:].float(), torch.sigmoid(logits[0, 2:]))


@pytest.mark.parametrize("group_mask", ["zero", "-inf"])
def test_the_mask_decides_who_fills_up_a_mixed_group(group_mask: Any) -> None:
    """The kept group has one positive and one negative score: 0 beats the negative, -inf not."""
    config = RouterConfig(
        num_experts=6,
        top_k=2,
        scoring="sigmoid",
        num_groups=3,
        top_k_groups=1,
        selection_bias=True,
        group_mask=group_mask,
    )
    logits = torch.tensor([[1.0, 0.5, 0.2, 0.1, -0.4, -0.8]])
    bias = torch.tensor([0.9, -0.3, 0.2, 0.1, 0.3, 0.4]) - torch.sigmoid(logits[0])
    ids = route(logits, config, bias, torch.float32).topk_ids[0].tolist()
    assert 0 in ids
    assert (1 in ids) == (group_mask == "-inf")


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("score_order", ["before_topk", "after_topk"])
def test_ties_are_settled_the_same_way_everywhere(
    tokens: int, score_order: Any, rng: torch.Generator
) -> None:
    """Logits of few values, so that most choices are ties: valid, repeatable, row by row."""
    config = RouterConfig(num_experts=16, top_k=6, score_order=score_order)
    logits = torch.randint(0, 3, (tokens, 16), generator=rng).float()
    routing = route(logits, config, None, torch.float32)
    again = route(logits.clone(), config, None, torch.float32)
    assert torch.equal(routing.topk_ids, again.topk_ids)
    chosen = logits.gather(1, routing.topk_ids.long())
    best = logits.sort(dim=1, descending=True).values[:, :6]
    assert torch.equal(chosen.sort(dim=1, descending=True).values, best)
    assert all(len(set(row)) == 6 for row in routing.topk_ids.tolist())
    for row in range(0, tokens, 7):
        alone = route(logits[row : row + 1], config, None, torch.float32)
        assert torch.equal(alone.topk_ids, routing.topk_ids[row : row + 1])


def test_the_bias_selects_and_does_not_weigh(rng: torch.Generator) -> None:
    config = RouterConfig(num_experts=6, top_k=2, scoring="sigmoid", selection_bias=True)
    logits = torch.randn(4, 6, generator=rng)
    bias = torch.tensor([0.0, 5.0, 0.0, 0.0, 6.0, 0.0])
    routing = route(logits, config, bias, torch.float32)
    assert all(sorted(row) == [1, 4] for row in routing.topk_ids.tolist())
    weights, _ = dense(routing, config)
    torch.testing.assert_close(weights[:, [1, 4]].float(), torch.sigmoid(logits[:, [1, 4]]))


def test_gives_the_same_bits_twice(rng: torch.Generator) -> None:
    for case in CASES:
        logits, bias = draw(case, torch.bfloat16, rng)
        first = route(logits, case.config, bias, torch.bfloat16)
        second = route(logits, case.config, bias, torch.bfloat16)
        for a, b in zip(first, second, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_in_the_model_s_dtype(dtype: torch.dtype, rng: torch.Generator) -> None:
    """Every step after the gate rounds to the logits' dtype, as Mistral 4 computes."""
    config = RouterConfig(
        num_experts=16, top_k=3, renormalize=True, scaling_factor=1.7, score_precision="model"
    )
    logits = torch.randn((64, 16), generator=rng).to(dtype)
    kept, ids = logits.softmax(-1).topk(3, dim=-1)
    weights = kept / kept.sum(-1, keepdim=True) * 1.7
    assert weights.dtype == dtype
    found = route(logits, config, None, dtype)
    assert torch.equal(found.topk_ids.long(), ids)
    assert torch.equal(found.topk_weights, weights.float())
    wide = route(logits, replace(config, score_precision="float32"), None, dtype)
    assert not torch.equal(wide.topk_weights, found.topk_weights)
