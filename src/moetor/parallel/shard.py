"""A rank's part of the routed experts: some of the experts, a slice of their intermediate size, or
both.

Shape letters: E experts, S slots of this rank, H hidden, I intermediate, J rows of the first
product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import ConfigError
from moetor.kernels.base import ExpertWeights

# Slices of an intermediate size that does not divide start at multiples of this where they can, so
# that vector loads stay aligned, and the longest slice is at most a quarter longer than needed.
_UNITS = (64, 32, 16, 8, 4, 2)
_SLACK = 1.25


def slice_bounds(size: int, parts: int, multiple: int = 1) -> list[tuple[int, int]]:
    """`size` in `parts` consecutive slices, equal where it divides, else in units of a power of two
    up to 64 that leave them nearly equal.

    Args:
        multiple: slices begin at multiples of it, where values share a scale.

    Raises:
        ConfigError: fewer elements, or runs of `multiple` of them, than parts.
    """
    most = -(-size // multiple)
    if most < parts:
        runs = "" if multiple == 1 else f" in runs of {multiple} that share a scale"
        raise ConfigError(
            f"an intermediate size of {size}{runs} cannot be split over {parts} ranks; possible: "
            f"at most {most} ranks, or enable_expert_parallel=True"
        )
    unit = multiple
    if size % (parts * multiple) == 0:
        unit = size // parts
    elif multiple == 1:
        unit = _unit(size, parts)
    units = -(-size // unit)
    bounds, start = [], 0
    for part in range(parts):
        share = units // parts + (part < units % parts)
        stop = min(start + share * unit, size)
        bounds.append((start, stop))
        start = stop
    return bounds


def _unit(size: int, parts: int) -> int:
    longest = _SLACK * -(-size // parts)
    for unit in _UNITS:
        units = -(-size // unit)
        if units >= parts and -(-units // parts) * unit <= longest:
            return unit
    return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertShard:
    """What one rank holds of a layer's routed experts.

    Attributes:
        experts: the logical expert in each of its slots.
        start, stop: its slice of the intermediate size.
        adds_bias: whether it is the one that adds the down product's bias, among the ranks that
            share its experts.
    """

    experts: tuple[int, ...]
    start: int
    stop: int
    adds_bias: bool = True

    def config(self, whole: ExpertsConfig) -> ExpertsConfig:
        """The form of this rank's part."""
        return replace(
            whole, num_experts=len(self.experts), intermediate_size=self.stop - self.start
        )

    def up_rows(self, whole: ExpertsConfig) -> list[tuple[int, int]]:
        """Ranges of the J rows of the first product that belong to the slice, in order."""
        if not whole.gated:
            return [(self.start, self.stop)]
        if whole.interleaved:
            return [(2 * self.start, 2 * self.stop)]
        size = whole.intermediate_size
        return [(self.start, self.stop), (size + self.start, size + self.stop)]

    def take(self, weights: ExpertWeights, whole: ExpertsConfig) -> ExpertWeights:
        """Copies of this rank's part of a layer's unquantised weights."""
        up_axis, down_axis = (2, 1) if whole.transposed else (1, 2)
        rows = self.up_rows(whole)
        inner = [(self.start, self.stop)]
        down_bias = self._take(weights.down_bias, 1, [(0, whole.hidden_size)])
        if down_bias is not None and not self.adds_bias:
            down_bias = torch.zeros_like(down_bias)
        gate_up = self._take(weights.gate_up, up_axis, rows)
        down = self._take(weights.down, down_axis, inner)
        assert gate_up is not None, "there are weights"
        assert down is not None, "there are weights"
        return ExpertWeights(
            gate_up=gate_up,
            down=down,
            gate_up_bias=self._take(weights.gate_up_bias, 1, rows),
            down_bias=down_bias,
            post_norm=weights.post_norm,
        )

    def _take(
        self, tensor: Tensor | None, axis: int, ranges: list[tuple[int, int]]
    ) -> Tensor | None:
        if tensor is None:
            return None
        parts = [tensor.detach().narrow(axis, start, stop - start) for start, stop in ranges]
        index = torch.tensor(self.experts, device=tensor.device)
        return torch.cat([part.index_select(0, index) for part in parts], dim=axis).contiguous()
