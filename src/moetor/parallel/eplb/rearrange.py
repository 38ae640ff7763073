"""Experts that move between ranks while the model runs: a little between two forward passes.

What arrives waits beside the live weights, until all of a layer's experts are there on every rank;
then it takes their place, and the tables by which tokens find experts change, both in place. So
every forward pass sees one placement, whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetor.parallel.placement import ExpertPlacement


@dataclass(frozen=True, slots=True)
class Move:
    """An expert's weights from one slot into another, of the same part or another one."""

    from_part: int
    from_slot: int
    to_part: int
    to_slot: int


def moves_between(old: ExpertPlacement, new: ExpertPlacement) -> list[Move]:
    """What has to move; sources take turns, and a part's own copy is preferred."""
    homes: dict[int, list[tuple[int, int]]] = {}
    for part, experts in enumerate(old.parts):
        for slot, expert in enumerate(experts):
            homes.setdefault(expert, []).append((part, slot))
    sent = [0] * len(old.parts)
    moves = []
    for part, (before, after) in enumerate(zip(old.parts, new.parts, strict=True)):
        for slot, (had, wants) in enumerate(zip(before, after, strict=True)):
            if had == wants:
                continue
            choices = [(home[0] != part, sent[home[0]], home) for home in homes[wants]]
            source = min(choices)[2]
            sent[source[0]] += source[0] != part
            moves.append(Move(*source, part, slot))
    return moves


class LayerMove:
    """One layer on its way from one placement to another; every rank drives the same one.

    Args:
        weights: this rank's tensors, one expert per slot along dimension 0.
        ranks: for every part the global rank that holds it, of the ranks with the same slice.
        part: this rank's part.
        max_bytes: that a rank receives per step; at least one expert.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        old: ExpertPlacement,
        new: ExpertPlacement,
        ranks: Sequence[int],
        part: int,
        group: dist.ProcessGroup,
        max_bytes: int,
    ) -> None:
        self.weights = list(weights)
        self.new = new
        self.ranks = ranks
        self.part = part
        self.group = group
        bytes_per_expert = sum(tensor[0].nbytes for tensor in self.weights)
        self.rounds = _rounds(moves_between(old, new), max(1, max_bytes // bytes_per_expert))
        self._arrived: list[tuple[int, list[Tensor]]] = []

    @property
    def finished(self) -> bool:
        """Whether all weights have arrived, on every rank."""
        return not self.rounds

    def step(self) -> int:
        """Sends and receives what belongs to one step; the bytes that arrived here."""
        operations: list[dist.P2POp] = []
        received = 0
        for move in self.rounds.pop(0):
            if self.part not in (move.from_part, move.to_part):
                continue
            if move.to_part == self.part and move.from_part != self.part:
                targets = [torch.empty_like(tensor[0]) for tensor in self.weights]
                self._arrived.append((move.to_slot, targets))
                received += sum(target.nbytes for target in targets)
                peer = self.ranks[move.from_part]
                operations += [
                    dist.P2POp(dist.irecv, target, peer, self.group) for target in targets
                ]
                continue
            sources = [tensor[move.from_slot] for tensor in self.weights]
            if move.to_part == self.part:
                self._arrived.append((move.to_slot, [source.clone() for source in sources]))
                continue
            peer = self.ranks[move.to_part]
            operations += [
                dist.P2POp(dist.isend, source.contiguous(), peer, self.group) for source in sources
            ]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return received

    def commit(self) -> None:
        """Puts what has arrived into its slots."""
        for slot, tensors in self._arrived:
            for weight, arrived in zip(self.weights, tensors, strict=True):
                weight[slot].copy_(arrived)
        self._arrived = []


def _rounds(moves: list[Move], most: int) -> list[list[Move]]:
    """Moves in rounds in which no part receives more than `most` experts."""
    rounds: list[list[Move]] = []
    taken: dict[int, int] = {}
    for move in moves:
        number = taken.get(move.to_part, 0) // most
        taken[move.to_part] = taken.get(move.to_part, 0) + 1
        while len(rounds) <= number:
            rounds.append([])
        rounds[number].append(move)
    return rounds
