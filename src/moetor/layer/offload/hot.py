"""Which experts deserve a place in the cache: those chosen most in the last steps.

Shape letters: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NOWHERE = -1
# A newcomer must have been chosen so much more often than the expert that makes room: each change
# costs a copy of an expert.
_FACTOR, _MORE = 1.25, 1.0


@dataclass(frozen=True, slots=True)
class Move:
    """An expert that takes a slot of its layer, and the one that leaves it (`NOWHERE`: none)."""

    layer: int
    expert: int
    slot: int
    leaves: int


class HotExperts:
    """Scores, slots, and the moves that follow from them; frequency with decay decides.

    Args:
        num_experts: E of every layer; layers may differ.
        slots: of every layer; its first experts have them at the beginning.
        decay: what earlier choices count in the next step.

    Attributes:
        slot_LE: int32, the slot of an expert, or `NOWHERE`.
        score_LE: choices so far, each step's worth `decay` of the next one's.
        choices, hits: how many there were, and how many of these were of experts in the cache when
            they were counted.
    """

    def __init__(self, num_experts: list[int], slots: int, decay: float) -> None:
        most = max(num_experts)
        self.num_experts, self.decay = num_experts, decay
        self.choices, self.hits = 0, 0
        self.slot_LE = np.full((len(num_experts), most), NOWHERE, dtype=np.int32)
        self.score_LE = np.zeros((len(num_experts), most))
        self._exists_LE = np.arange(most)[None] < np.array(num_experts)[:, None]
        for layer, experts in enumerate(num_experts):
            held = min(slots, experts)
            self.slot_LE[layer, :held] = np.arange(held)

    def note(self, counts_LE: npt.NDArray[np.int32]) -> None:
        """Takes in how often each expert was chosen in a step."""
        self.choices += int(counts_LE.sum())
        self.hits += int(counts_LE[self.slot_LE != NOWHERE].sum())
        self.score_LE = self.score_LE * self.decay + counts_LE

    def moves(self, most: int) -> list[Move]:
        """The most useful changes, over all layers; `begin` and `finish` then make them."""
        held_LE = self.slot_LE != NOWHERE
        wanted_LE = np.where(self._exists_LE & ~held_LE, self.score_LE, -np.inf)
        kept_LE = np.where(held_LE, self.score_LE, np.inf)
        found: list[Move] = []
        layers = np.arange(len(self.num_experts))
        for _ in range(most):
            comes_L, leaves_L = wanted_LE.argmax(axis=1), kept_LE.argmin(axis=1)
            best_L, worst_L = wanted_LE[layers, comes_L], kept_LE[layers, leaves_L]
            gain_L = np.where(np.isfinite(best_L) & np.isfinite(worst_L), best_L - worst_L, -np.inf)
            layer = int(gain_L.argmax())
            best, worst = best_L[layer], worst_L[layer]
            if not np.isfinite(gain_L[layer]) or best < worst * _FACTOR + _MORE:
                break
            comes, leaves = int(comes_L[layer]), int(leaves_L[layer])
            found.append(Move(layer, comes, int(self.slot_LE[layer, leaves]), leaves))
            wanted_LE[layer, comes], kept_LE[layer, leaves] = -np.inf, np.inf
        return found

    def begin(self, moves: list[Move]) -> None:
        """Takes those that leave out of their slots."""
        for move in moves:
            self.slot_LE[move.layer, move.leaves] = NOWHERE

    def finish(self, moves: list[Move]) -> None:
        """Puts those that have arrived into their slots."""
        for move in moves:
            self.slot_LE[move.layer, move.expert] = move.slot

    def absent(self, layer: int) -> list[int]:
        """Experts of a layer without a slot, in order."""
        return [
            expert
            for expert in range(self.num_experts[layer])
            if self.slot_LE[layer, expert] == NOWHERE
        ]

    def tables(self, slots: int) -> npt.NDArray[np.int32]:
        """Int32 [L, 3, E + 1] by expert id, of which the last of a layer, E, is a dropped slot:

        - its slot in the cache, or the number of slots;
        - itself where the host computes it, else E;
        - its place among those that are not in the cache, else E.
        """
        layers, width = self.slot_LE.shape
        tables = np.empty((layers, 3, width + 1), dtype=np.int32)
        for layer, experts in enumerate(self.num_experts):
            held_E = self.slot_LE[layer, :experts] != NOWHERE
            tables[layer, 0] = min(slots, experts)
            tables[layer, 1:] = experts
            tables[layer, 0, :experts][held_E] = self.slot_LE[layer, :experts][held_E]
            tables[layer, 1, :experts][~held_E] = np.flatnonzero(~held_E)
            tables[layer, 2, :experts][~held_E] = np.arange(int((~held_E).sum()))
        return tables
