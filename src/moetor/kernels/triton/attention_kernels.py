"""Attention over a paged cache: decode split over the keys, prompts by blocks of queries.

Shape letters: T tokens, S sequences, Hq and Hkv heads, HG query heads of a program, D width of
queries and keys, Dv of values, BM rows of a tile (BQ tokens of HG heads each), BN keys of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from triton.language.extra.cuda import (  # type: ignore[import-not-found, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)

from moetor.kernels.triton.device_code import soft_cap
from moetor.kernels.triton.turning_code import head_weight, partner, turned


@triton.jit
def _first_key(position, window, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that the token at `position` sees."""
    if WINDOW:
        low = tl.maximum(position + 1 - window, 0)
    elif CHUNK:
        low = position // window * window
    else:
        low = position * 0
    return low


@triton.jit
def _part(low, high, SPLITS: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr):
    """Keys of one split: whole tiles, so that all splits but the last are equally long, and LEAST
    of them at least."""
    return tl.maximum(tl.cdiv(tl.cdiv(high - low, SPLITS), BN) * BN, LEAST)


@triton.jit
def _finish(best, total, acc, sinks, head_q, real, at, columns, dv, out, SINKS: tl.constexpr):
    """Rows that have seen all their keys."""
    if SINKS:
        sink = tl.load(sinks + head_q, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(best, sink)
        fade = tl.exp2(best - top)
        total = total * fade + tl.exp2(sink - top)
        acc = acc * fade[:, None]
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + at[:, None] + dv[None, :], y.to(out.dtype.element_ty), mask=columns)


@triton.jit
def _rows(base, slot, inside, d, LAST: tl.constexpr, WIDTH: tl.constexpr):
    """[BN, WIDTH] of the cache; columns from LAST on do not exist."""
    if LAST >= WIDTH:
        x = tl.load(base + slot[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    else:
        x = tl.load(
            base + slot[:, None] + d[None, :],
            mask=inside[:, None] & (d[None, :] < LAST),
            other=0.0,
        )
    return x


@triton.jit
def _other(count, ONLY: tl.constexpr):
    """Whether a sequence with `count` new tokens is none of those that are asked for."""
    if ONLY == "singles":
        other = count != 1
    elif ONLY == "longer":
        other = count <= 1
    else:
        other = count == 0
    return other


@triton.jit
def _take_in(
    raw,
    v,
    key,
    inside,
    position,
    row_low,
    best,
    total,
    acc,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """One tile of keys into the running softmax. Scores are kept in base 2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if SOFTCAP is not None:
        raw = soft_cap(raw * SCALE, SOFTCAP) * LOG2E
    else:
        raw = raw * (SCALE * LOG2E)
    seen = inside[None, :] & (key[None, :] <= position[:, None])
    if LIMITED:
        seen = seen & (key[None, :] >= row_low[:, None])
    raw = tl.where(seen, raw, -float("inf"))
    top = tl.maximum(best, tl.max(raw, axis=1))
    # A row that has seen nothing yet has no maximum to subtract.
    shift = tl.where(top == -float("inf"), 0.0, top)
    power = tl.exp2(raw - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(power, axis=1)
    acc = tl.dot(power.to(v.dtype), v, acc=acc * fade[:, None], input_precision="ieee")
    return top, total, acc


# Tables and lengths come at any place of a buffer; none of them may cause another compilation.
@triton.jit(
    do_not_specialize=["sequences", "window", "stride_table"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start", "slots"],
)
def attend(
    query,
    key_cache,
    value_cache,
    block_table,
    seq_lens,
    query_start,
    sinks,
    out,
    part_out,
    part_max,
    part_sum,
    new_key,
    new_value,
    cos,
    sin,
    q_weight,
    k_weight,
    slots,
    sequences,
    window,
    eps,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    stride_nkt,
    stride_nkh,
    stride_nvt,
    stride_nvh,
    stride_cos,
    HQ: tl.constexpr,
    HG: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
    TURN: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    SP: tl.constexpr,
    DECODE: tl.constexpr,
    ONLY: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of queries of one key head against one split of its sequence's keys.

    GROUPS programs share a key head, each with HG of its query heads.

    With DECODE a sequence has at most one new token, and the first axis of the grid is the
    sequence; else it counts blocks of BQ tokens, whose sequence is found by `query_start`.
    ONLY leaves out sequences with more tokens than one, or with one.

    With TURN the query is neither normed nor turned yet, and the new keys and values are not in the
    cache: the program whose split ends with the new token writes its own.

    Lengths and tables, and with TURN keys of earlier steps and tables of positions, are read before
    the launches before have ended: they are inputs of a step, which nothing in it writes. With
    AHEAD, which needs TURN, each tile is on its way while the one before is multiplied.
    """
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(1) // GROUPS
    split = tl.program_id(2)
    if DECODE:
        seq = tl.program_id(0)
        begin_q = tl.load(query_start + seq)
        block_q = 0
    else:
        s = tl.arange(0, SP)
        starts = tl.load(query_start + s, mask=s < sequences, other=0)
        # Block number start // BQ + s is the first of sequence s: room for one part block each.
        own = (s < sequences) & (starts // BQ + s <= tl.program_id(0))
        seq = tl.sum(own.to(tl.int32), axis=0) - 1
        begin_q = tl.load(query_start + seq)
        block_q = tl.program_id(0) - (begin_q // BQ + seq)
    count_q = tl.load(query_start + seq + 1) - begin_q
    length = tl.load(seq_lens + seq)
    low = _first_key(length - count_q + block_q * BQ, window, WINDOW, CHUNK)
    high = tl.minimum(length - count_q + (block_q + 1) * BQ, length)
    whole = True
    if SPLITS > 1:
        part = _part(low, high, SPLITS, BN, LEAST)
        whole = part >= high - low
        low = low + split * part
        high = tl.minimum(low + part, high)
        if (split > 0) & (low >= high):
            return  # the first split waits for the launches before
    keys = key_cache + head.to(tl.int64) * stride_kh
    values = value_cache + head.to(tl.int64) * stride_vh
    table = block_table + seq * stride_table
    n = tl.arange(0, BN)
    d1, d2, dv = tl.arange(0, D1), tl.arange(0, D2), tl.arange(0, DVP)
    key = low + n
    r = tl.arange(0, BM)
    row0 = tl.where(count_q > 0, begin_q, 0).to(tl.int64)
    REST: tl.constexpr = D - D1
    if TURN is not None:
        # All that is no result of the launches before, first; then all that is, at once.
        older = key < tl.minimum(high, length - 1)
        block = tl.load(table + key // BS, mask=older, other=0).to(tl.int64)
        after = tl.load(table + (key + BN) // BS, mask=key + BN < high, other=0).to(tl.int64)
        k1 = _rows(keys, block * stride_kb + (key % BS) * stride_kt, older, d1, D, D1)
        v = _rows(values, block * stride_vb + (key % BS) * stride_vt, older, dv, DV, DVP)
        other, first, turn = partner(d1, TURN)
        c = tl.load(cos + row0 * stride_cos + turn, mask=d1 < TURN[0], other=1.0).to(tl.float32)
        s = tl.load(sin + row0 * stride_cos + turn, mask=d1 < TURN[0], other=0.0).to(tl.float32)
        q_weights = (
            head_weight(q_weight, d1, NORM, OFFSET),
            head_weight(q_weight, other, NORM, OFFSET),
        )
        k_weights = (
            head_weight(k_weight, d1, NORM, OFFSET),
            head_weight(k_weight, other, NORM, OFFSET),
        )
        slot = tl.load(slots + row0).to(tl.int64)
    if PDL:
        gdc_wait()
    if (block_q * BQ >= count_q) | (low >= high) | _other(count_q, ONLY):
        return
    token = block_q * BQ + r // HG
    real = (r < BQ * HG) & (token < count_q)
    position = length - count_q + token
    head_q = tl.program_id(1) * HG + r % HG
    row = (begin_q + token).to(tl.int64)
    at_q = query + row * stride_qt + head_q * stride_qh
    q1 = tl.load(at_q[:, None] + d1[None, :], mask=real[:, None], other=0.0)
    if TURN is not None:
        last = high == length
        one = tl.arange(0, 1)[:, None]
        at_new = new_key + row0 * stride_nkt + head * stride_nkh + one
        q_other = tl.load(at_q[:, None] + other[None, :], mask=real[:, None], other=0.0)
        new_k = tl.load(at_new + d1[None, :])
        new_k_other = tl.load(at_new + other[None, :])
        at_new = new_value + row0 * stride_nvt + head * stride_nvh + one
        new_v = tl.load(at_new + dv[None, :], mask=dv[None, :] < DV, other=0.0)
        q1 = turned(q1, q_other, first, c, s, q_weights[0], q_weights[1], eps, D, NORM).to(
            query.dtype.element_ty
        )
        new_k = turned(
            new_k, new_k_other, first, c, s, k_weights[0], k_weights[1], eps, D, NORM
        ).to(key_cache.dtype.element_ty)
        to = slot // BS * stride_kb + slot % BS * stride_kt
        kept = last & (slot >= 0)
        tl.store(keys + to + d1[None, :] + one, new_k, mask=(d1 < D)[None, :] & kept)
        to = slot // BS * stride_vb + slot % BS * stride_vt
        tl.store(values + to + dv[None, :] + one, new_v, mask=(dv < DV)[None, :] & kept)
        k1 = tl.where((key == length - 1)[:, None], new_k, k1)
        v = tl.where((key == length - 1)[:, None], new_v, v)
        tl.debug_barrier()  # a later tile may be read with what has just been written
    if REST > 0:
        q2 = tl.load(
            at_q[:, None] + D1 + d2[None, :],
            mask=real[:, None] & (d2[None, :] < REST),
            other=0.0,
        )
    best = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DVP), tl.float32)
    LIMITED: tl.constexpr = WINDOW or CHUNK
    row_low = _first_key(position, window, WINDOW, CHUNK)
    if TURN is not None and not AHEAD:
        raw = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        best, total, acc = _take_in(
            raw, v, key, key < high, position, row_low, best, total, acc, SCALE, SOFTCAP, LIMITED
        )
        low += BN
    for key0 in tl.range(low, high, BN, num_stages=STAGES):
        key = key0 + n
        if AHEAD:
            # The next tile is on its way while this one is multiplied, and the place of the one
            # after it.
            at = key + BN
            k1_next = _rows(keys, after * stride_kb + (at % BS) * stride_kt, at < high, d1, D, D1)
            v_next = _rows(
                values, after * stride_vb + (at % BS) * stride_vt, at < high, dv, DV, DVP
            )
            after = tl.load(table + (at + BN) // BS, mask=at + BN < high, other=0).to(tl.int64)
        else:
            inside = key < high
            block = tl.load(table + key // BS, mask=inside, other=0).to(tl.int64)
            at_k = block * stride_kb + (key % BS) * stride_kt
            k1 = _rows(keys, at_k, inside, d1, D, D1)
            v = _rows(values, block * stride_vb + (key % BS) * stride_vt, inside, dv, DV, DVP)
        raw = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if REST > 0:
            k2 = _rows(keys + D1, at_k, inside, d2, REST, D2)
            raw = tl.dot(q2, tl.trans(k2), acc=raw, input_precision="ieee")
        best, total, acc = _take_in(
            raw, v, key, key < high, position, row_low, best, total, acc, SCALE, SOFTCAP, LIMITED
        )
        if AHEAD:
            k1, v = k1_next, v_next
    columns = real[:, None] & (dv[None, :] < DV)
    at = (row * HQ + head_q) * DV
    if SPLITS > 1:
        if whole:
            _finish(best, total, acc, sinks, head_q, real, at, columns, dv, out, SINKS)
        else:
            place = (row * HQ + head_q) * SPLITS + split
            tl.store(part_out + place[:, None] * DV + dv[None, :], acc, mask=columns)
            tl.store(part_max + place, best, mask=real)
            tl.store(part_sum + place, total, mask=real)
    else:
        _finish(best, total, acc, sinks, head_q, real, at, columns, dv, out, SINKS)


@triton.jit(
    do_not_specialize=["window"], do_not_specialize_on_alignment=["seq_lens", "query_start"]
)
def combine_splits(
    part_out,
    part_max,
    part_sum,
    seq_lens,
    query_start,
    sinks,
    out,
    window,
    HQ: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
    ONLY: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One sequence's new token, one head: its splits in their order. A single one has written the
    result itself."""
    if PDL:
        gdc_launch_dependents()
    seq = tl.program_id(0)
    head = tl.program_id(1)
    begin_q = tl.load(query_start + seq)
    none = _other(tl.load(query_start + seq + 1) - begin_q, ONLY)
    LOG2E: tl.constexpr = 1.4426950408889634
    high = tl.load(seq_lens + seq)
    low = _first_key(high - 1, window, WINDOW, CHUNK)
    part = _part(low, high, SPLITS, BN, LEAST)
    if PDL:
        gdc_wait()
    if none | (part >= high - low):
        return
    split = tl.arange(0, SPLITS)
    used = split * part < high - low
    row = begin_q.to(tl.int64) * HQ + head
    place = row * SPLITS + split
    best = tl.load(part_max + place, mask=used, other=-float("inf"))
    total = tl.load(part_sum + place, mask=used, other=0.0)
    dv = tl.arange(0, DVP)
    x = tl.load(
        part_out + place[:, None] * DV + dv[None, :],
        mask=used[:, None] & (dv[None, :] < DV),
        other=0.0,
    )
    top = tl.max(best, axis=0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    fade = tl.exp2(best - top)
    whole = tl.sum(total * fade, axis=0)
    if SINKS:
        whole = whole + tl.exp2(sink - top)
    y = tl.sum(x * fade[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * DV + dv, y.to(out.dtype.element_ty), mask=dv < DV)
