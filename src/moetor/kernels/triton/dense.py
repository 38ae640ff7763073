"""The launches of `dense_kernels` on inputs that `moetor.kernels.dense` has checked.

Shape letters: T tokens, H hidden, N outputs, I intermediate, Hq and Hkv heads, D width of queries
and keys, Dv of values, R rotated part of D, B tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moetor.config import Activation
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import activation_constants, next_power_of_2

if TYPE_CHECKING:
    from moetor.kernels.dense import CacheSlots, Norm, RotaryForm

FEW_OUTPUTS = 512
_MANY_OUTPUTS = 32768
_HEADS = 4  # heads of a program of `rotate` and `write_to_cache`


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """Tile of a product with few rows.

    Attributes:
        outputs: BN.
        depth: BK, of a step.
        warps, stages: of a program.
        ahead: ask for all of a program's weights while the launch before is running.
    """

    outputs: int
    depth: int
    warps: int
    stages: int
    ahead: bool = False


def rows_plan(outputs: int, depth: int, rows: int, itemsize: int, *, gated: bool) -> RowsPlan:
    """Tiles for `rows` rows: enough programs for every multiprocessor, and 16 bytes a load."""
    held = next_power_of_2(rows) * (2 if gated else 1)
    most = 4096 // itemsize
    if outputs <= FEW_OUTPUTS:
        block, step, warps = (2 if held <= 2 else 1), most, 4
    elif outputs >= _MANY_OUTPUTS:
        block, step, warps = 4, most, 4
    else:
        block, step, warps = 4, most // 2, 8
    step = min(next_power_of_2(depth), step)
    while block * step * held > 8192 and step > 256:
        step //= 2
    return RowsPlan(outputs=block, depth=step, warps=warps, stages=1)


def overlap(tensor: Tensor) -> bool:
    """Whether a launch may start while the one before it ends (compute capability 9.0)."""
    return tensor.is_cuda and support.device_of(tensor).capability >= (9, 0)


def _options(pdl: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if pdl else {}


def add_rms_norm(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm of x + residual [..., H], and the sum."""
    from moetor.kernels.triton import dense_kernels

    width = x.shape[-1]
    rows = _rows(x)
    out = x.new_empty(x.shape)
    total = x if residual is None else x.new_empty(x.shape)
    if rows.shape[0] == 0:
        return out, total
    added = rows if residual is None else _rows(residual)
    pdl = overlap(x)
    padded = next_power_of_2(width)
    with support.on_device_of(x):
        dense_kernels.add_rms_norm[(rows.shape[0],)](
            rows,
            added,
            support.flat(norm.weight, x),
            total,
            out,
            rows.stride(0),
            added.stride(0),
            float(norm.eps),
            H=width,
            HP=padded,
            RESIDUAL=residual is not None,
            OFFSET=float(norm.offset),
            HAS_WEIGHT=norm.weight is not None,
            PDL=pdl,
            num_warps=1 if padded <= 256 else 4 if padded <= 2048 else 8,
            **_options(pdl),
        )
    return out, total


def rotate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    form: RotaryForm,
    query_norm: Norm | None,
    key_norm: Norm | None,
    cache: CacheSlots | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys normed and turned; with `cache` keys and values go there."""
    from moetor.kernels.triton import dense_kernels

    (tokens, heads, width), kv_heads = query.shape, key.shape[1]
    query, key, value = (_dense_rows(x) for x in (query, key, value))
    out = query.new_empty((tokens, heads, width))
    key_out = key.new_empty((tokens, kv_heads, width)) if cache is None else cache.keys
    if tokens == 0:
        return out, key_out
    value_out = value if cache is None else cache.values
    to_k = (0, *key_out.stride()[:2]) if cache is None else key_out.stride()[:3]
    to_v = (0, 0, 0) if cache is None else value_out.stride()[:3]
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    sin = sin if sin.stride(0) == cos.stride(0) else sin.contiguous()
    cos = cos if sin.stride(0) == cos.stride(0) else cos.contiguous()
    pdl = overlap(query)
    blocks = -(-heads // _HEADS) + (1 if cache is None else 2) * -(-kv_heads // _HEADS)
    weights = (
        [out, out]
        if query_norm is None or key_norm is None
        else [support.flat(norm.weight, out) for norm in (query_norm, key_norm)]
    )
    with support.on_device_of(query):
        dense_kernels.rotate_and_cache[(tokens, blocks)](
            query,
            key,
            value,
            cos,
            sin,
            *weights,
            out,
            key_out,
            value_out,
            out if cache is None else cache.slots,
            0.0 if query_norm is None else float(query_norm.eps),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            cos.stride(0),
            *to_k,
            *to_v,
            HQ=heads,
            HKV=kv_heads,
            D=width,
            DV=value.shape[2],
            DVP=next_power_of_2(value.shape[2]),
            R=form.width,
            RP=next_power_of_2(form.width // 2),
            EP=next_power_of_2(max(1, width - form.width)),
            BS=1 if cache is None else cache.keys.shape[1],
            HB=_HEADS,
            PAIRS=form.pairs,
            STEP=2 if form.table == "twice" else 1,
            FULL=form.table == "halves",
            NORM=query_norm is not None,
            OFFSET=0.0 if query_norm is None else float(query_norm.offset),
            CACHED=cache is not None,
            PDL=pdl,
            num_warps=2,
            **_options(pdl),
        )
    return out, key_out


def write_to_cache(key: Tensor, value: Tensor, cache: CacheSlots) -> None:
    """Keys [T, Hkv, D] and values [T, Hkv, Dv] to their slots."""
    from moetor.kernels.triton import dense_kernels

    tokens, heads, width = key.shape
    if tokens == 0:
        return
    key, value = _dense_rows(key), _dense_rows(value)
    pdl = overlap(key)
    with support.on_device_of(key):
        dense_kernels.write_to_cache[(tokens, -(-heads // _HEADS))](
            key,
            value,
            cache.keys,
            cache.values,
            cache.slots,
            *key.stride()[:2],
            *value.stride()[:2],
            *cache.keys.stride()[:3],
            *cache.values.stride()[:3],
            HKV=heads,
            D=width,
            DP=next_power_of_2(width),
            DV=value.shape[2],
            DVP=next_power_of_2(value.shape[2]),
            BS=cache.keys.shape[1],
            HB=_HEADS,
            PDL=pdl,
            num_warps=2,
            **_options(pdl),
        )


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
        x: [..., H] of few rows.
        weight: [N, H], or [2 I, H] with an activation.
        plan: tiles; None chooses.
        dtype: of the result; None for that of `x`.
    """
    from moetor.kernels.triton import dense_kernels

    rows = _rows(x)
    # The launch reads weights before the one ahead of it has ended; that one may be the copy's.
    ahead = weight.stride(1) == 1
    weight = weight if ahead else weight.contiguous()
    gated = activation is not None
    outputs, depth = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    out = x.new_empty((*x.shape[:-1], outputs), dtype=dtype or x.dtype)
    plan = plan or rows_plan(outputs, depth, rows.shape[0], x.element_size(), gated=gated)
    pdl = overlap(x) and ahead
    with support.on_device_of(x):
        dense_kernels.few_rows[(-(-outputs // plan.outputs),)](
            rows,
            weight,
            support.flat(bias, x),
            out,
            outputs * weight.stride(0),
            rows.stride(0),
            weight.stride(0),
            T=rows.shape[0],
            TP=next_power_of_2(rows.shape[0]),
            N=outputs,
            H=depth,
            HAS_BIAS=bias is not None,
            GATED=gated,
            ACT=None if activation is None else activation_constants(activation),
            BN=plan.outputs,
            BK=plan.depth,
            STAGES=plan.stages,
            LINES=next_power_of_2(depth * x.element_size() / 128) if plan.ahead and pdl else 0,
            PDL=pdl,
            num_warps=plan.warps,
            **_options(pdl),
        )
    return out


def gated_activation(x: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up of [..., 2 I]."""
    from moetor.kernels.triton import dense_kernels

    rows, size = _rows(x), x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    if rows.shape[0] == 0:
        return out
    pdl = overlap(x)
    block = min(1024, next_power_of_2(size))
    with support.on_device_of(x):
        dense_kernels.gated_activation[(rows.shape[0], -(-size // block))](
            rows,
            out,
            rows.stride(0),
            I=size,
            ACT=activation_constants(activation),
            BLOCK=block,
            PDL=pdl,
            num_warps=4,
            **_options(pdl),
        )
    return out


def _rows(x: Tensor) -> Tensor:
    """[..., H] as [T, H] with a contiguous last axis; a copy only where a view cannot do."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
