from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moetor.bench.rotation import (
    SET_COUNTS,
    STEP_COUNTS,
    RotationRequest,
    least_reuse,
    plan_rotation,
)
from moetor.layer.routing.simulator import SimulatedRouter

MB = 10**6
QWEN3 = RotationRequest(
    num_experts=128,
    top_k=8,
    tokens=1,
    pattern="uniform",
    seed=0,
    expert_bytes=9 * MB,
    target_bytes=520 * MB,
    max_sets=1,
)


def test_least_reuse_counts_the_reads_between_two_uses() -> None:
    assert least_reuse([(0, [0, 1]), (0, [2, 3])]) == 3
    assert least_reuse([(0, [0, 1]), (0, [1, 2])]) == 0
    assert least_reuse([(0, [0]), (1, [0]), (2, [0])]) == 2
    # Over the end: expert 3 is last in the second step and first in the first.
    assert least_reuse([(0, [3, 4, 5]), (0, [0, 1, 3])]) == 0


@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
@pytest.mark.parametrize("pattern", ["uniform", "zipf", "fixed"])
def test_two_sets_of_a_large_layer_are_cold(tokens: int, pattern: str) -> None:
    rotation = plan_rotation(replace(QWEN3, tokens=tokens, pattern=pattern, max_sets=2))
    assert rotation.cold
    assert len(rotation.steps) in STEP_COUNTS
    assert rotation.reuse_bytes >= 520 * MB


def test_consecutive_calls_of_one_token_share_no_expert() -> None:
    steps = plan_rotation(QWEN3).steps
    for step, following in zip(steps, steps[1:] + steps[:1], strict=True):
        assert not set(step.topk_ids.flatten().tolist()) & set(
            following.topk_ids.flatten().tolist()
        )


@pytest.mark.parametrize("pattern", ["uniform", "zipf", "fixed"])
def test_relabelling_keeps_how_tokens_share_experts(pattern: str) -> None:
    request = replace(QWEN3, tokens=32, pattern=pattern)
    rotation = plan_rotation(request)
    router = SimulatedRouter(128, 8, pattern, seed=0)
    counted = 0
    for step in rotation.steps:
        _, drawn = router(torch.empty(32, 0))
        ids = step.topk_ids
        assert ids.dtype == torch.int32
        assert all(len(set(row)) == 8 for row in ids.tolist())
        assert int(ids.min()) >= 0
        assert int(ids.max()) < 128
        # One name for each drawn expert, and back.
        pairs = set(zip(drawn.flatten().tolist(), ids.flatten().tolist(), strict=True))
        active = len(ids.unique())
        assert len(pairs) == len(drawn.unique()) == active
        counted += active
    assert rotation.active_experts == counted / len(rotation.steps)


def test_a_second_set_where_one_is_too_small() -> None:
    request = replace(QWEN3, num_experts=64, tokens=512, target_bytes=1000 * MB)
    alone = plan_rotation(request)
    assert not alone.cold
    assert alone.reuse_bytes == 63 * 9 * MB
    both = plan_rotation(replace(request, max_sets=4))
    assert both.cold
    assert both.num_sets > 1
    assert {step.weight_set for step in both.steps} == set(range(both.num_sets))


def test_tiny_layers_say_that_they_are_not_cold() -> None:
    tiny = replace(QWEN3, num_experts=4, top_k=2, expert_bytes=100, max_sets=10**6)
    rotation = plan_rotation(tiny)
    assert not rotation.cold
    assert rotation.num_sets in SET_COUNTS


def test_the_seed_decides() -> None:
    first, again = plan_rotation(QWEN3), plan_rotation(QWEN3)
    other = plan_rotation(replace(QWEN3, seed=1))
    assert torch.equal(first.steps[0].topk_ids, again.steps[0].topk_ids)
    assert not torch.equal(first.steps[0].topk_ids, other.steps[0].topk_ids)
