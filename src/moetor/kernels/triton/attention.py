"""Attention over a paged cache on NVIDIA GPUs; its twin is `moetor.kernels.attention`.

Shape letters: T tokens, S sequences, N blocks, B tokens of a block, M blocks of a sequence,
Hq and Hkv heads, G = Hq / Hkv, D width of queries and keys, Dv of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moetor.errors import KernelRefusedError
from moetor.kernels.attention import check_paged
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import next_power_of_2

Only = Literal["all", "singles", "longer"]
_MAX_WIDTH = 1024
# Largest tile of partial results that the combining launch holds, in elements.
_COMBINE = 8192
_PROGRAMS_PER_SM = 4
_FEW_PROGRAMS = 16
_SHORT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Tiles and schedule.

    Attributes:
        rows: BM, of tokens times heads.
        heads: query heads of a program, a divisor of G.
        keys: BN.
        splits: of a sequence's keys, a power of two; 1 for none.
        least: keys of a split, at least; a multiple of `keys`.
        warps, stages: of a program.
        overlap: starts while the launch before ends.
    """

    rows: int
    heads: int
    keys: int
    splits: int
    warps: int
    stages: int
    least: int = 1
    overlap: bool = False


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


def _key_columns(width: int) -> tuple[int, int]:
    """Two powers of two that hold the width: the largest one below, and what holds the rest."""
    first = 1 << (width.bit_length() - 1)
    return first, max(16, next_power_of_2(width - first))


def _shared_bytes(
    width: int, value_width: int, itemsize: int, rows: int, keys: int, stages: int
) -> int:
    """Upper bound of the shared memory: the queries, and all stages of keys and values."""
    first, second = _key_columns(width)
    held = first + (second if first < width else 0)
    values = next_power_of_2(value_width)
    return itemsize * (rows * held + stages * keys * (held + values))


def attention_plan(
    *,
    sequences: int,
    kv_heads: int,
    group: int,
    width: int,
    value_width: int,
    max_keys: int,
    max_query_len: int,
    itemsize: int,
    sms: int,
    shared: int,
    overlap: bool,
) -> AttentionPlan:
    """Tiles for one call, from upper bounds alone.

    Args:
        max_keys: the most keys that a token may see.
        shared: bytes of shared memory that one program may use.
    """
    wide = max(width, value_width) * itemsize
    stages = 2
    if wide <= 256:
        most_rows, keys, warps, stages = 128, 64, 8, 3
    elif wide <= 512:
        most_rows, keys, warps = 64, 64, 8
    elif wide <= 1024:
        most_rows, keys, warps = 32, 32, 4
    else:
        most_rows, keys, warps = 16, 16, 4
    while _shared_bytes(width, value_width, itemsize, most_rows, keys, stages) > shared:
        if stages > 1:
            stages -= 1
        elif keys > 16:
            keys //= 2
        elif most_rows > 16:
            most_rows //= 2
        else:
            break
    heads = group
    while next_power_of_2(heads) > most_rows:
        heads = heads // 2 if heads % 2 == 0 else 1
    rows = min(most_rows, max(16, next_power_of_2(heads * max_query_len)))
    if max_query_len > 1:
        warps = 4 if rows <= 64 and wide <= 256 else warps
        return AttentionPlan(
            rows=rows, heads=heads, keys=keys, splits=1, warps=warps, stages=stages, overlap=overlap
        )
    # Four programs on each multiprocessor keep the memory busy. A single sequence has few keys a
    # program, and its time is that of one program: small tiles.
    programs = max(1, sequences * kv_heads * (group // heads))
    if programs < _FEW_PROGRAMS:
        keys = min(keys, 32)
    most = min(-(-max_keys // keys), _COMBINE // next_power_of_2(value_width), 64)
    splits = 1
    while 2 * splits <= min(_PROGRAMS_PER_SM * sms // programs, most):
        splits *= 2
    return AttentionPlan(
        rows=rows,
        heads=heads,
        keys=keys,
        splits=splits,
        # With enough programs for all multiprocessors, splitting a short context costs more than
        # it hides.
        least=_SHORT if programs >= sms // 2 else 1,
        warps=4,
        stages=min(stages, 2),
        overlap=overlap,
    )


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
    )
    size = (plan.rows, plan.keys, plan.stages)
    needed = _shared_bytes(query.shape[2], value_cache.shape[3], query.element_size(), *size)
    if needed > device.shared:
        raise KernelRefusedError(
            f"the Triton attention needs {needed} bytes of shared memory for heads of "
            f"{query.shape[2]} and {value_cache.shape[3]} in {query.dtype}, this GPU has "
            f"{device.shared}; use moetor.kernels.attention.paged_attention, or half precision"
        )
    return run_attention(
        query, key_cache, value_cache, block_table, seq_lens, query_start, plan,
        decode=max_query_len == 1, scale=scale, softcap=softcap, window=window, chunk=chunk,
        sinks=sinks, only=only, out=out,
    )  # fmt: skip


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
    first, second = _key_columns(width)
    limit = window or chunk or 0
    form = {
        "WINDOW": window is not None,
        "CHUNK": chunk is not None,
        "SINKS": sinks is not None,
        "ONLY": only,
        "SPLITS": plan.splits,
        "LEAST": plan.least,
        "BN": plan.keys,
        "PDL": plan.overlap,
    }
    launch = {"launch_pdl": True} if plan.overlap else {}
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
            sequences,
            limit,
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
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
            SP=1 if decode else next_power_of_2(sequences),
            DECODE=decode,
            BM=plan.rows,
            BQ=tokens_of_tile,
            STAGES=plan.stages,
            num_warps=plan.warps,
            **form,
            **launch,
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
                num_warps=4,
                **form,
                **launch,
            )
    return out
