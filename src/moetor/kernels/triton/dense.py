"""The launches of `dense_kernels` on inputs that `moetor.kernels.dense` has checked.

Shape letters: T tokens, H hidden, I intermediate, Hq and Hkv heads, D width of queries
and keys, Dv of values, R rotated part of D, B tokens of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moetor.config import Activation
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import activation_constants, next_power_of_2

if TYPE_CHECKING:
    from moetor.kernels.dense import CacheSlots, Norm, RotaryForm

_HEADS = 4  # heads of a program of `write_to_cache`


def add_rms_norm(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm of x + residual [..., H], and the sum."""
    from moetor.kernels.triton import dense_kernels

    width = x.shape[-1]
    rows = support.rows_of(x)
    out = x.new_empty(x.shape)
    total = x if residual is None else x.new_empty(x.shape)
    if rows.shape[0] == 0:
        return out, total
    added = rows if residual is None else support.rows_of(residual)
    pdl = support.overlap(x)
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
            **support.chained(pdl),
        )
    return out, total


def rotate_tile(tokens: int) -> tuple[int, int]:
    """Heads and warps of a program of `rotate`: few tokens are a matter of latency."""
    return (8, 4) if tokens > 256 else (4, 2)


def head_norms(
    query_norm: Norm | None, key_norm: Norm | None
) -> tuple[list[Tensor | None], str | None, float, float]:
    """Weights of both norms, what the kernels call them, eps and offset."""
    if query_norm is None or key_norm is None:
        return [None, None], None, 0.0, 0.0
    kind = "plain" if query_norm.weight is None else "weighted"
    weights = [query_norm.weight, key_norm.weight]
    return weights, kind, float(query_norm.eps), float(query_norm.offset)


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
    pdl = support.overlap(query)
    held, warps = rotate_tile(tokens)
    blocks = -(-heads // held) + (1 if cache is None else 2) * -(-kv_heads // held)
    weights, norm, eps, offset = head_norms(query_norm, key_norm)
    with support.on_device_of(query):
        dense_kernels.rotate_and_cache[(tokens, blocks)](
            query,
            key,
            value,
            cos,
            sin,
            *(support.flat(weight, out) for weight in weights),
            out,
            key_out,
            value_out,
            out if cache is None else cache.slots,
            eps,
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
            HB=held,
            PAIRS=form.pairs,
            STEP=2 if form.table == "twice" else 1,
            FULL=form.table == "halves",
            NORM=norm,
            OFFSET=offset,
            CACHED=cache is not None,
            PDL=pdl,
            num_warps=warps,
            **support.chained(pdl),
        )
    return out, key_out


def write_to_cache(key: Tensor, value: Tensor, cache: CacheSlots) -> None:
    """Keys [T, Hkv, D] and values [T, Hkv, Dv] to their slots."""
    from moetor.kernels.triton import dense_kernels

    tokens, heads, width = key.shape
    if tokens == 0:
        return
    key, value = _dense_rows(key), _dense_rows(value)
    pdl = support.overlap(key)
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
            **support.chained(pdl),
        )


def gated_activation(x: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up of [..., 2 I]."""
    from moetor.kernels.triton import dense_kernels

    rows, size = support.rows_of(x), x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    if rows.shape[0] == 0:
        return out
    pdl = support.overlap(x)
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
            **support.chained(pdl),
        )
    return out


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
