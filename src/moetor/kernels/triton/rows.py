"""The launches of `rows_kernels`: products of a few rows.

Shape letters: T tokens, H hidden, N outputs, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetor.config import Activation
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import activation_constants, next_power_of_2

FEW_OUTPUTS = 512
# Of a weight that stays near while a few rows after the other are multiplied with it: 128 x 2048,
# for which this was measured on an H200.
_NEAR = 2**18
_NEAR_ROWS = 2
_MANY_OUTPUTS = 32768


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """Tile of a product with few rows.

    Attributes:
        outputs: BN.
        depth: BK, of a step.
        warps, stages: of a program.
        rows: BT.
    """

    outputs: int
    depth: int
    warps: int
    stages: int
    rows: int


def most_rows(outputs: int, depth: int) -> int:
    """Up to how many rows vector sums are the faster ones: a product with one row, and one with few
    outputs and few rows (a router's), are bound by latency, which torch's own do not hide."""
    if outputs > FEW_OUTPUTS:
        return 1
    return 32 if outputs * depth <= _NEAR else 8


def rows_plan(outputs: int, depth: int, rows: int, itemsize: int, *, gated: bool) -> RowsPlan:
    """Tiles for `rows` rows: enough programs for every multiprocessor, and 16 bytes a load."""
    near = outputs * depth <= _NEAR
    together = min(next_power_of_2(rows), _NEAR_ROWS if near else 8)
    held = together * (2 if gated else 1)
    most = 4096 // itemsize
    if outputs > FEW_OUTPUTS and held == 1 and depth == 2 * most and outputs < _MANY_OUTPUTS:
        # The whole depth at once, so that all weights are on their way before the wait.
        block, step, warps = 2, 2 * most, 4
    elif outputs <= FEW_OUTPUTS:
        block, step, warps = (2 if held <= 2 else 1), most, 4
    elif outputs >= _MANY_OUTPUTS:
        block, step, warps = 4, most, 4
    else:
        block, step, warps = 4, most, 8
    step = min(next_power_of_2(depth), step)
    while block * step * held > 8192:
        if step > 256 or block == 1:
            step //= 2
        else:
            block //= 2
    return RowsPlan(outputs=block, depth=step, warps=warps, stages=1, rows=together)


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    plan: RowsPlan | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ weight.T + bias` by vector sums; with an activation, of gate and up in one.

    Args:
        x: [..., H]; weights are read once for every `plan.rows` rows.
        weight: [N, H], or [2 I, H] with an activation.
        plan: tiles; None chooses.
        dtype: of the result; None for that of `x`.
    """
    from moetor.kernels.triton import rows_kernels

    rows = support.rows_of(x)
    # The launch reads weights before the one ahead of it has ended; that one may be the copy's.
    early = weight.stride(1) == 1
    weight = weight if early else weight.contiguous()
    gated = activation is not None
    outputs, depth = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    out = x.new_empty((*x.shape[:-1], outputs), dtype=dtype or x.dtype)
    plan = plan or rows_plan(outputs, depth, rows.shape[0], x.element_size(), gated=gated)
    pdl = support.overlap(x) and early
    with support.on_device_of(x):
        rows_kernels.few_rows[(-(-outputs // plan.outputs), -(-rows.shape[0] // plan.rows))](
            rows,
            weight,
            support.flat(bias, x),
            out,
            rows.shape[0],
            outputs * weight.stride(0),
            rows.stride(0),
            weight.stride(0),
            BT=plan.rows,
            N=outputs,
            H=depth,
            HAS_BIAS=bias is not None,
            GATED=gated,
            ACT=None if activation is None else activation_constants(activation),
            BN=plan.outputs,
            BK=plan.depth,
            STAGES=plan.stages,
            PDL=pdl,
            num_warps=plan.warps,
            **support.chained(pdl),
        )
    return out
