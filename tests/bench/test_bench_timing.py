from __future__ import annotations

from collections import Counter

import pytest
import torch

from moetor.bench import timing
from moetor.bench.rotation import Step
from moetor.bench.timing import CpuSampler, endless, measure, spread, summarize


def test_spread_is_even() -> None:
    order = spread({"slow": 2, "fast": 6})
    assert Counter(order) == {"slow": 2, "fast": 6}
    first, second = (Counter(half) for half in (order[:4], order[4:]))
    assert first == second == {"slow": 1, "fast": 3}


def test_equal_counts_take_turns_in_changing_order() -> None:
    order = spread({"a": 20, "b": 20, "c": 20})
    rounds = [tuple(order[at : at + 3]) for at in range(0, 60, 3)]
    assert all(set(turn) == {"a", "b", "c"} for turn in rounds)
    assert len(set(rounds)) > 2


def test_summary() -> None:
    found = summarize([float(number) for number in range(1, 12)])
    assert (found.p10, found.median, found.p90, found.samples) == (2.0, 6.0, 10.0, 11)
    assert found.cuda_graph is None


def _steps(count: int) -> list[Step]:
    nothing = torch.empty(0)
    return [Step(number, 0, nothing, nothing) for number in range(count)]


def test_variants_walk_through_one_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    seen: list[tuple[str, int]] = []

    def variant(name: str) -> CpuSampler:
        def call(step: Step) -> torch.Tensor:
            seen.append((name, step.number))
            return step.topk_ids

        return CpuSampler(call, shared)

    shared = endless(_steps(5))
    found = measure({"a": variant("a"), "b": variant("b")}, {"a": 1.0, "b": 1.0})
    assert [number for _, number in seen] == [0, 1, 2, 3, 4] * 2
    assert all(result.samples == 5 for result in found.values())


def test_enough_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.3)
    sampler = CpuSampler(lambda step: step.topk_ids, endless(_steps(5)))
    found = measure({"a": sampler, "b": sampler}, {"a": 0.01, "b": 10.0})
    assert found["a"].samples == 30
    assert found["b"].samples == 5
