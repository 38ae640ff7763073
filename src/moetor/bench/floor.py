"""The least time that a call can take on a machine: the larger of reading the active experts'
weights once and doing their arithmetic.

Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moetor.bench.shapes import LayerShape

Bound = Literal["bytes", "flops"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one call must do.

    Attributes:
        read_bytes: weights and biases of the active experts, in bytes.
        flops: two per weight and slot.
    """

    read_bytes: float
    flops: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Least time of a call.

    Attributes:
        seconds: max(read_bytes / read bandwidth, flops / GEMM rate).
        bound: which of the two is larger.
    """

    seconds: float
    bound: Bound


def layer_work(shape: LayerShape, active_experts: float, slots: float, itemsize: int) -> Work:
    """The work of one call.

    Args:
        active_experts: experts with at least one token (a mean over several calls, so not always
            whole).
        slots: pairs of a token and one of its experts, T * K when none is dropped.
        itemsize: bytes of a weight.
    """
    return Work(
        read_bytes=active_experts * shape.parameters_per_expert * itemsize,
        flops=2.0 * slots * shape.experts.params_per_expert,
    )


def layer_floor(work: Work, read_bytes_per_s: float, flops_per_s: float) -> Floor:
    """The floor of `work` under two measured rates, in bytes/s and flop/s."""
    reading = work.read_bytes / read_bytes_per_s
    computing = work.flops / flops_per_s
    if reading >= computing:
        return Floor(seconds=reading, bound="bytes")
    return Floor(seconds=computing, bound="flops")
