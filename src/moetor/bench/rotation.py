"""Which weights and which routing each timed call uses, so that weights come from memory.

A call that uses the experts of the call before it reads them from the last-level cache and looks
faster than any model's layer is. So the calls walk through a rotation of steps; each step has its
own routing, and its experts are relabelled to be those that were used longest ago (among several
sets of weights where one is not enough). Relabelling keeps every count of tokens per expert.
Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetor.layer.routing.simulator import Pattern, SimulatedRouter

# Steps and sets that are tried, the fewest first. More sets than these help only layers so small
# that no model has them.
STEP_COUNTS = (4, 8, 16, 32, 64)
SET_COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Step:
    """One call's weights and routing.

    Attributes:
        number: its place in the rotation.
        weight_set: number of the set of weights.
        topk_weights: float32 [T, K].
        topk_ids: int32 [T, K].
    """

    number: int
    weight_set: int
    topk_weights: Tensor
    topk_ids: Tensor

    def to(self, device: str) -> Step:
        """The same step with its routing on `device`."""
        return Step(
            self.number, self.weight_set, self.topk_weights.to(device), self.topk_ids.to(device)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """The steps, in the order in which calls take them, over and over.

    Attributes:
        num_sets: sets of weights in use.
        active_experts: mean number of experts with a token.
        reuse_bytes: least number of weight bytes read between two uses of one expert.
        target_bytes: what that number should be for the caches to be cold.
    """

    steps: tuple[Step, ...]
    num_sets: int
    active_experts: float
    reuse_bytes: int
    target_bytes: int

    @property
    def cold(self) -> bool:
        """Whether every call reads its weights from memory."""
        return self.reuse_bytes >= self.target_bytes

    @property
    def slots(self) -> int:
        """Pairs of a token and an expert in a call."""
        return self.steps[0].topk_ids.numel()


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationRequest:
    """What a rotation is made for.

    Attributes:
        pattern: of the routing; `fixed` sends every token of a call to the same K experts.
        expert_bytes: weights of one expert, in bytes.
        target_bytes: wished distance between two uses of an expert, in bytes.
        max_sets: how many sets of weights memory allows, at least 1.
    """

    num_experts: int
    top_k: int
    tokens: int
    pattern: Pattern
    seed: int
    expert_bytes: int
    target_bytes: int
    max_sets: int


def plan_rotation(request: RotationRequest) -> Rotation:
    """The smallest rotation that keeps weights cold; the coldest one where none does."""
    router = SimulatedRouter(request.num_experts, request.top_k, request.pattern, seed=request.seed)
    tokens = torch.empty((request.tokens, 0))
    drawn: list[tuple[Tensor, Tensor]] = []
    best: Rotation | None = None
    for num_sets in SET_COUNTS:
        if num_sets > request.max_sets:
            break
        for count in STEP_COUNTS:
            if count < num_sets:
                continue
            drawn += [router(tokens) for _ in range(count - len(drawn))]
            rotation = _rotation(request, num_sets, drawn[:count])
            if rotation.cold:
                return rotation
            if best is None or rotation.reuse_bytes > best.reuse_bytes:
                best = rotation
    assert best is not None, "max_sets is at least 1"
    return best


def _rotation(
    request: RotationRequest, num_sets: int, drawn: Sequence[tuple[Tensor, Tensor]]
) -> Rotation:
    generator = torch.Generator().manual_seed(request.seed)
    # Experts of each set, the one used longest ago first.
    queues = [
        torch.randperm(request.num_experts, generator=generator).tolist() for _ in range(num_sets)
    ]
    steps = []
    for number, (weights_TK, drawn_TK) in enumerate(drawn):
        weight_set = number % num_sets
        ids_TK = _relabel(drawn_TK, queues[weight_set], request.num_experts)
        steps.append(Step(number, weight_set, weights_TK, ids_TK))
    used = [(step.weight_set, _active(step.topk_ids)) for step in steps]
    return Rotation(
        steps=tuple(steps),
        num_sets=num_sets,
        active_experts=sum(len(experts) for _, experts in used) / len(used),
        reuse_bytes=least_reuse(used) * request.expert_bytes,
        target_bytes=request.target_bytes,
    )


def _active(ids_TK: Tensor) -> list[int]:
    active: list[int] = ids_TK.unique().tolist()
    return active


def _relabel(ids_TK: Tensor, queue: list[int], num_experts: int) -> Tensor:
    """`ids_TK` with its experts renamed to the first of `queue`, which then go to its end."""
    drawn = _active(ids_TK)
    # Ascending among themselves, as a kernel visits them: an expert that was early in the last
    # call is early in this one, which leaves as much as possible between the two uses.
    taken = sorted(queue[: len(drawn)])
    queue[:] = queue[len(drawn) :] + taken
    names = torch.zeros(num_experts, dtype=torch.int32)
    names[drawn] = torch.tensor(taken, dtype=torch.int32)
    return names[ids_TK.long()]


def least_reuse(steps: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Least number of experts read between two uses of the same expert of the same set.

    Args:
        steps: set and experts of each step, in the order in which they are read; after the last
            step comes the first again.
    """
    reads = [(weight_set, expert) for weight_set, experts in steps for expert in experts]
    last: dict[tuple[int, int], int] = {}
    least = len(reads)
    for at, read in enumerate(reads + reads):
        if read in last:
            least = min(least, at - last[read])
        last[read] = at
    return least - 1
