"""Watches the load of a model's experts and moves them, between forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moetor.parallel.config import EplbConfig
from moetor.parallel.eplb.balance import balance, balancedness, part_loads
from moetor.parallel.eplb.load import ExpertLoad
from moetor.parallel.eplb.rearrange import LayerMove
from moetor.parallel.placement import ExpertMap


@dataclass(frozen=True, kw_only=True)
class BalancedLayer:
    """What the balancer needs of one layer.

    Attributes:
        weights: gives this rank's expert tensors, one expert per slot along dimension 0.
        ranks: for every part the global rank that holds it, with this rank's slice.
        num_groups: routing groups.
    """

    name: str
    weights: Callable[[], Sequence[Tensor]]
    experts: ExpertMap
    part: int
    ranks: Sequence[int]
    load: ExpertLoad
    num_groups: int = 1


@dataclass(slots=True)
class BalanceStats:
    """What the balancer has done so far, on this rank."""

    looks: int = 0
    layers_moved: int = 0
    experts_moved: int = 0
    bytes_received: int = 0
    most_bytes_in_a_step: int = 0
    balancedness: dict[str, float] = field(default_factory=dict)
    """Of every layer, at the last look, before it was moved."""


class ExpertBalancer:
    """Every rank calls `step` after each forward pass, and all call it equally often.

    Args:
        layers: in the order in which they are moved.
        group: all ranks that share the experts.
    """

    def __init__(
        self, layers: Sequence[BalancedLayer], config: EplbConfig, group: dist.ProcessGroup
    ) -> None:
        self.layers = list(layers)
        self.config = config
        self.group = group
        self.stats = BalanceStats()
        self._passes = 0
        self._seen: list[tuple[BalancedLayer, list[float]]] = []
        self._moving: tuple[BalancedLayer, LayerMove] | None = None

    @property
    def busy(self) -> bool:
        """Whether layers are still to be planned or experts are on their way."""
        return self._moving is not None or bool(self._seen)

    def step(self) -> None:
        """Between two forward passes: looks at the loads when it is time to, else plans one layer
        or moves some of its experts.

        At most `max_bytes_per_step` arrive at a rank, or one expert.
        """
        self._passes += 1
        if self._moving is not None:
            self._move(*self._moving)
        elif self._seen:
            self._plan(*self._seen.pop(0))
        elif self._passes >= self.config.interval:
            self._passes = 0
            self.look()

    def forget(self) -> None:
        """What was computed so far were no users' tokens."""
        for layer in self.layers:
            layer.load.clear()

    def look(self) -> None:
        """Adds the ranks' loads up; the steps that follow act on them, layer by layer."""
        device = self.layers[0].weights()[0].device
        told = torch.stack([layer.load.read() for layer in self.layers]).to(device)
        dist.all_reduce(told, group=self.group)
        self.stats.looks += 1
        self._seen = list(zip(self.layers, told.tolist(), strict=True))

    def _plan(self, layer: BalancedLayer, loads: list[float]) -> None:
        old = layer.experts.placement
        self.stats.balancedness[layer.name] = balancedness(old, loads)
        new = balance(old, loads, self.config, layer.num_groups)
        before, after = max(part_loads(old, loads)), max(part_loads(new, loads))
        if not after or before / after < self.config.min_gain:
            return
        move = LayerMove(
            layer.weights(),
            old,
            new,
            layer.ranks,
            layer.part,
            self.group,
            self.config.max_bytes_per_step,
        )
        self._moving = layer, move

    def _move(self, layer: BalancedLayer, move: LayerMove) -> None:
        if not move.finished:
            received = move.step()
            self.stats.bytes_received += received
            self.stats.most_bytes_in_a_step = max(self.stats.most_bytes_in_a_step, received)
        if move.finished:
            old, new = layer.experts.placement.parts, move.new.parts
            self.stats.experts_moved += sum(
                had != has
                for before, after in zip(old, new, strict=True)
                for had, has in zip(before, after, strict=True)
            )
            move.commit()
            layer.experts.update(move.new)
            self.stats.layers_moved += 1
            self._moving = None
