"""Which expert stands where, so that ranks have equally much to do.

The idea is DeepSeek's (EPLB, DeepSeek-V3, arXiv:2412.19437, section 3.4): the experts with most to
do get the redundant slots, and the copies are packed into parts of a fixed number of slots. Here
the packing is improved by exchanging slots, and an expert that may stay where it is stays. Shape
letters: E logical experts, P physical experts (slots).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetor.errors import ConfigError
from moetor.parallel.config import EplbConfig
from moetor.parallel.placement import ExpertPlacement

# Rounds of exchanges between the busiest and another part.
_EXCHANGES = 200


@dataclass(slots=True)
class _Part:
    """A part being filled: its copies as (load, expert)."""

    size: int
    copies: list[tuple[float, int]]

    @property
    def load(self) -> float:
        return sum(load for load, _ in self.copies)


def part_loads(placement: ExpertPlacement, loads_E: Sequence[float]) -> list[float]:
    """What each part has to do, where an expert's copies share its load equally."""
    shares = [load / len(copies) for load, copies in zip(loads_E, placement.copies(), strict=True)]
    return [sum(shares[expert] for expert in part) for part in placement.parts]


def balancedness(placement: ExpertPlacement, loads_E: Sequence[float]) -> float:
    """Mean over largest load of a part: 1 is even; 1 too where there is no load."""
    loads = part_loads(placement, loads_E)
    largest = max(loads)
    return sum(loads) / len(loads) / largest if largest else 1.0


def balance(
    current: ExpertPlacement,
    loads_E: Sequence[float],
    config: EplbConfig,
    num_groups: int = 1,
) -> ExpertPlacement:
    """A placement for these loads, with as many slots per part as the current one.

    Args:
        loads_E: choices of every logical expert.
        config: policy and nodes.
        num_groups: routing groups of consecutive experts, which `hierarchical` keeps on one node.

    Raises:
        ConfigError: `hierarchical` was named, and groups or parts do not divide by nodes.
    """
    sizes = [len(part) for part in current.parts]
    if not _hierarchical(config, num_groups, sizes, current.num_experts):
        experts = list(range(current.num_experts))
        parts, nodes = _fill(experts, loads_E, sizes), 1
    else:
        nodes = config.num_nodes
        parts = _fill_nodes(loads_E, sizes, nodes, num_groups)
    parts = _near_old(current, parts, nodes)
    return ExpertPlacement(current.num_experts, _keep_slots(current, parts))


def _hierarchical(config: EplbConfig, num_groups: int, sizes: list[int], num_experts: int) -> bool:
    nodes = config.num_nodes
    fits = (
        nodes > 1
        and num_groups % nodes == 0
        and num_experts % num_groups == 0
        and len(sizes) % nodes == 0
        and sum(sizes[: len(sizes) // nodes]) >= num_experts // nodes
    )
    if config.policy == "hierarchical" and not fits:
        raise ConfigError(
            f"policy='hierarchical' needs num_nodes of at least 2 that divides the {num_groups} "
            f"routing groups and the {len(sizes)} ranks, not {nodes}; use 'global'"
        )
    return config.policy != "global" and fits


def _fill_nodes(
    loads_E: Sequence[float], sizes: list[int], nodes: int, num_groups: int
) -> list[list[int]]:
    """Groups to nodes, then experts to the parts of their node."""
    per_group, per_node = len(loads_E) // num_groups, len(sizes) // nodes
    members = [list(range(g * per_group, (g + 1) * per_group)) for g in range(num_groups)]
    group_loads = [sum(loads_E[expert] for expert in group) for group in members]
    packed = _pack(
        sorted(((load, group) for group, load in enumerate(group_loads)), reverse=True),
        [num_groups // nodes] * nodes,
    )
    parts: list[list[int]] = []
    for node, own in enumerate(packed):
        experts = sorted(expert for _, group in own.copies for expert in members[group])
        own_sizes = sizes[node * per_node : (node + 1) * per_node]
        parts += _fill(experts, loads_E, own_sizes)
    return parts


def _fill(experts: list[int], loads_E: Sequence[float], sizes: list[int]) -> list[list[int]]:
    """Copies for the busiest experts, packed into parts of these sizes."""
    spare, most = sum(sizes) - len(experts), len(sizes)
    copies = dict.fromkeys(experts, 1)
    busiest = [(-loads_E[expert], expert) for expert in experts]
    heapq.heapify(busiest)
    while spare:
        _, expert = heapq.heappop(busiest)
        copies[expert] += 1
        spare -= 1
        if copies[expert] < most:  # one copy a part is as much as helps
            heapq.heappush(busiest, (-loads_E[expert] / copies[expert], expert))
    each = [
        (loads_E[expert] / count, expert) for expert, count in copies.items() for _ in range(count)
    ]
    parts = _pack(sorted(each, reverse=True), sizes)
    _exchange(parts)
    return [[expert for _, expert in part.copies] for part in parts]


def _pack(largest_first: list[tuple[float, int]], sizes: list[int]) -> list[_Part]:
    """Each copy into the part with least to do that has room and does not hold its expert."""
    parts = [_Part(size, []) for size in sizes]
    for copy in largest_first:
        open_parts = [part for part in parts if len(part.copies) < part.size]
        fresh = [part for part in open_parts if all(e != copy[1] for _, e in part.copies)]
        min(fresh or open_parts, key=lambda part: part.load).copies.append(copy)
    return parts


def _exchange(parts: list[_Part]) -> None:
    """Swaps copies between the busiest part and another one while that lowers both's maximum."""
    for _ in range(_EXCHANGES):
        top = max(parts, key=lambda part: part.load)
        best: tuple[float, _Part, int, int] | None = None
        for other in parts:
            found = None if other is top else _best_swap(top, other)
            if found is not None and (best is None or found[0] > best[0]):
                best = (found[0], other, *found[1:])
        if best is None:
            return
        _, other, mine, theirs = best
        top.copies[mine], other.copies[theirs] = other.copies[theirs], top.copies[mine]


def _best_swap(top: _Part, other: _Part) -> tuple[float, int, int] | None:
    """By how much the best swap lowers the larger of two parts' loads, and the two places."""
    loads_M, loads_N = _column(top, 0)[:, None], _column(other, 0)[None, :]
    gap = top.load - other.load
    gain_MN = np.minimum(loads_M - loads_N, gap - (loads_M - loads_N))
    experts_M, experts_N = _column(top, 1), _column(other, 1)
    gain_MN[np.isin(experts_M, experts_N), :] = 0  # an expert twice in one part helps nobody
    gain_MN[:, np.isin(experts_N, experts_M)] = 0
    mine, theirs = divmod(int(gain_MN.argmax()), gain_MN.shape[1])
    gain = float(gain_MN[mine, theirs])
    return (gain, mine, theirs) if gain > 1e-9 * top.load else None


def _column(part: _Part, which: int) -> np.ndarray:
    return np.array([copy[which] for copy in part.copies], dtype=np.float64)


def _near_old(current: ExpertPlacement, parts: list[list[int]], nodes: int) -> list[list[int]]:
    """The parts in an order in which many experts stay on their rank, node by node."""
    ordered = list(parts)
    per_node = len(parts) // nodes
    for first in range(0, len(parts), per_node):
        own = range(first, first + per_node)
        free_old, free_new = set(own), set(own)
        overlaps = sorted(
            (
                (len(set(current.parts[old]) & set(parts[new])), -old, -new)
                for old in own
                for new in own
                if len(current.parts[old]) == len(parts[new])
            ),
            reverse=True,
        )
        for _, minus_old, minus_new in overlaps:
            if -minus_old in free_old and -minus_new in free_new:
                ordered[-minus_old] = parts[-minus_new]
                free_old.remove(-minus_old)
                free_new.remove(-minus_new)
    return ordered


def _keep_slots(current: ExpertPlacement, parts: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """Experts that stay on their part stay in their slot."""
    placed = []
    for old, wanted in zip(current.parts, parts, strict=True):
        left = list(wanted)
        slots: list[int | None] = []
        for expert in old:
            stays = expert in left
            slots.append(expert if stays else None)
            if stays:
                left.remove(expert)
        placed.append(tuple(left.pop() if slot is None else slot for slot in slots))
    return tuple(placed)
