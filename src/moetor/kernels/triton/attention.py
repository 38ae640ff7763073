"""Attention over a paged cache on NVIDIA GPUs; its twin is `moetor.kernels.attention`.

Shape letters: T tokens, S sequences, N blocks, B tokens of a block, M blocks of a sequence,
Hq and Hkv heads, G = Hq / Hkv, D width of queries and keys, Dv of values.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.attention import check_paged
from moetor.kernels.dense import NewHeads, check_rotate
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import next_power_of_2
from moetor.kernels.triton.choose_attention import (
    AttentionPlan,
    attention_plan,
    key_columns,
    shared_bytes,
)
from moetor.kernels.triton.dense import head_norms

Only = Literal["all", "singles", "longer"]
_MAX_WIDTH = 1024
# Bytes of a head up to which two tiles of keys and values fit in registers.
_TURNED_BYTES = 512


def attention_refusal(
    device: str, dtype: torch.dtype, *, width: int, value_width: int
) -> str | None:
    """Why the kernel does not run, as half a sentence, or None.

    Args:
        device: a device type.
        dtype: of queries and cache.
        width, value_width: D and Dv.
    """
    if dtype not in support.DTYPES:
        return f"computes in bfloat16, float16 or float32, not {dtype}"
    if max(width, value_width) > _MAX_WIDTH:
        return f"takes heads of at most {_MAX_WIDTH}, not {max(width, value_width)}"
    return support.device_refusal(device)


def turning_refusal(query: Tensor, new: NewHeads) -> str | None:
    """Why the launch does not turn these heads itself, as half a sentence, or None."""
    width, widest = new.key.shape[2], max(new.key.shape[2], new.value.shape[2])
    if width & (width - 1):
        return f"turns heads whose width is a power of two, not {width}"
    if widest * query.element_size() > _TURNED_BYTES:
        return f"turns heads of at most {_TURNED_BYTES} bytes, not {widest} x {query.dtype}"
    return None


def worth_turning(query: Tensor, new: NewHeads) -> bool:
    """Whether turning [T, Hq, D] in the launch that attends is the faster way: while each program
    has a multiprocessor for itself. (More of them share one, and need its registers.)"""
    programs = query.shape[0] * new.key.shape[1]
    return turning_refusal(query, new) is None and programs <= support.device_of(query).sms


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    *,
    max_query_len: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    only: Only = "all",
    out: Tensor | None = None,
    new: NewHeads | None = None,
) -> Tensor:
    """As `moetor.kernels.attention.paged_attention`, without reading a length on the host.

    Grids follow from the shapes of the arguments and `max_query_len`, so that the call can be
    captured in a CUDA graph and replayed with other lengths. A sequence may have no new token.
    Equal inputs give equal bits: a sequence's keys are split into equal parts, which are summed
    in their order; the number of parts depends on S, M and the device.

    Args:
        query: [T, Hq, D]; any strides of the first two axes, as for the caches.
        max_query_len: the most new tokens of any sequence. 1 takes the path for decoding.
        only: leaves out sequences with more new tokens than one, or with one.
        out: written in place of a new tensor.
        new: the query is neither normed nor turned yet, and the new keys and values are not in the
            cache: both is done here, as `moetor.kernels.dense.rotate` would have done it. For
            sequences with one new token at most. The keys before are read while launches ahead
            still run, none of which may be writing them.

    Returns:
        [T, Hq, Dv]; rows that belong to no sequence are not written.

    Raises:
        InputError: wrong shapes, dtypes or devices.
        KernelRefusedError: this machine, or a form that the kernel does not have.
    """
    check_paged(query, key_cache, value_cache, block_table, seq_lens, query_start,
                window=window, chunk=chunk, sinks=sinks)  # fmt: skip
    group = query.shape[1] // key_cache.shape[2]
    reason = attention_refusal(
        query.device.type,
        query.dtype,
        width=query.shape[2],
        value_width=value_cache.shape[3],
    )
    if new is not None:
        _check_new(query, value_cache, new, max_query_len)
        reason = reason or turning_refusal(query, new)
    if reason is not None:
        raise KernelRefusedError(
            f"the Triton attention {reason}; use moetor.kernels.attention.paged_attention"
        )
    device = support.device_of(query)
    max_keys = block_table.shape[1] * key_cache.shape[1]
    plan = attention_plan(
        sequences=seq_lens.shape[0],
        kv_heads=key_cache.shape[2],
        group=group,
        width=query.shape[2],
        value_width=value_cache.shape[3],
        max_keys=min(max_keys, window or chunk or max_keys),
        max_query_len=max_query_len,
        itemsize=query.element_size(),
        sms=device.sms,
        shared=device.shared,
        overlap=device.capability >= (9, 0),
        turns=new is not None,
    )
    size = (plan.rows, plan.keys, plan.stages)
    needed = shared_bytes(query.shape[2], value_cache.shape[3], query.element_size(), *size)
    if needed > device.shared:
        raise KernelRefusedError(
            f"the Triton attention needs {needed} bytes of shared memory for heads of "
            f"{query.shape[2]} and {value_cache.shape[3]} in {query.dtype}, this GPU has "
            f"{device.shared}; use moetor.kernels.attention.paged_attention, or half precision"
        )
    return run_attention(
        query, key_cache, value_cache, block_table, seq_lens, query_start, plan,
        decode=max_query_len == 1, scale=scale, softcap=softcap, window=window, chunk=chunk,
        sinks=sinks, only=only, out=out, new=new,
    )  # fmt: skip


class _Turning(NamedTuple):
    """What the launch is given to turn heads itself.

    Attributes:
        tensors: new keys and values, tables, weights of norms, slots.
        strides: of keys, values and tables.
        early: whether none of them is a copy, which the launch ahead may still be making.
        form: width, whether neighbours are turned, form of the table; None where heads come
            turned.
    """

    tensors: list[Tensor]
    strides: list[int]
    early: bool = True
    form: tuple[int, bool, str] | None = None
    norm: str | None = None
    eps: float = 0.0
    offset: float = 0.0


def _turning(new: NewHeads | None, out: Tensor) -> _Turning:
    if new is None:
        return _Turning([out] * 7, [0] * 5)
    key, value, cos, sin = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (new.key, new.value, new.cos, new.sin)
    )
    if sin.stride(0) != cos.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    weights, kind, eps, offset = head_norms(new.query_norm, new.key_norm)
    return _Turning(
        [key, value, cos, sin, *(support.flat(weight, out) for weight in weights), new.slots],
        [*key.stride()[:2], *value.stride()[:2], cos.stride(0)],
        cos is new.cos and sin is new.sin,
        (new.form.width, new.form.pairs, new.form.table),
        kind,
        eps,
        offset,
    )


def _check_new(query: Tensor, value_cache: Tensor, new: NewHeads, max_query_len: int) -> None:
    """Refuses new heads that do not fit the call.

    Raises:
        InputError: naming what does not fit.
    """
    if max_query_len != 1:
        raise InputError(
            f"heads are turned where each sequence has one new token at most, not {max_query_len}; "
            "call moetor.kernels.dense.rotate before"
        )
    check_rotate(query, new.key, new.value, new.cos, new.sin, new.form, new.query_norm,
                 new.key_norm, None)  # fmt: skip
    if new.value.shape[2] != value_cache.shape[3] or new.slots.shape != query.shape[:1]:
        raise InputError(
            f"new values {list(new.value.shape)} and slots {list(new.slots.shape)} do not fit the "
            f"query {list(query.shape)} and value_cache {list(value_cache.shape)}"
        )


def run_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    plan: AttentionPlan,
    *,
    decode: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
    chunk: int | None,
    sinks: Tensor | None,
    only: Only = "all",
    out: Tensor | None = None,
    new: NewHeads | None = None,
) -> Tensor:
    """The launches, on inputs that are known to be right."""
    from moetor.kernels.triton import attention_kernels

    (tokens, heads, width), sequences = query.shape, seq_lens.shape[0]
    kv_heads, value_width = key_cache.shape[2], value_cache.shape[3]
    if out is None:
        out = query.new_empty((tokens, heads, value_width))
    if tokens == 0 or sequences == 0:
        return out
    group = heads // kv_heads
    tokens_of_tile = plan.rows // plan.heads
    part_out = part_max = part_sum = out
    if plan.splits > 1:
        places = (tokens, heads, plan.splits)
        part_out = query.new_empty((*places, value_width), dtype=torch.float32)
        part_max, part_sum = query.new_empty((2, *places), dtype=torch.float32)
    turning = _turning(new, out)
    overlap = plan.overlap and turning.early
    first, second = key_columns(width)
    limit = window or chunk or 0
    blocks = sequences if decode else tokens // tokens_of_tile + sequences
    with support.on_device_of(query):
        attention_kernels.attend[(blocks, heads // plan.heads, plan.splits)](
            query,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            query_start,
            support.flat(sinks, out),
            out,
            part_out,
            part_max,
            part_sum,
            *turning.tensors,
            sequences,
            limit,
            turning.eps,
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
            *turning.strides,
            HQ=heads,
            HG=plan.heads,
            GROUPS=group // plan.heads,
            D=width,
            D1=first,
            D2=second,
            DV=value_width,
            DVP=max(16, next_power_of_2(value_width)),
            BS=key_cache.shape[1],
            SCALE=float(scale),
            SOFTCAP=None if softcap is None else float(softcap),
            WINDOW=window is not None,
            CHUNK=chunk is not None,
            SINKS=sinks is not None,
            TURN=turning.form,
            NORM=turning.norm,
            OFFSET=turning.offset,
            SP=1 if decode else next_power_of_2(sequences),
            DECODE=decode,
            ONLY=only,
            SPLITS=plan.splits,
            LEAST=plan.least,
            BM=plan.rows,
            BQ=tokens_of_tile,
            BN=plan.keys,
            STAGES=plan.stages,
            AHEAD=plan.ahead,
            PDL=overlap,
            num_warps=plan.warps,
            **support.chained(overlap),
        )
        if plan.splits > 1:
            attention_kernels.combine_splits[(sequences, heads)](
                part_out,
                part_max,
                part_sum,
                seq_lens,
                query_start,
                support.flat(sinks, out),
                out,
                limit,
                HQ=heads,
                DV=value_width,
                DVP=max(16, next_power_of_2(value_width)),
                WINDOW=window is not None,
                CHUNK=chunk is not None,
                SINKS=sinks is not None,
                ONLY=only,
                SPLITS=plan.splits,
                LEAST=plan.least,
                BN=plan.keys,
                PDL=plan.overlap,
                num_warps=4,
                **support.chained(plan.overlap),
            )
    return out
