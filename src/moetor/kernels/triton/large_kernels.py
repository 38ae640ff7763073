"""Four launches for many tokens: tile map, up + activation, down, sum over slots.

Slots are sorted by expert, and rows of one expert are cut into tiles of BM. Expert e owns the tiles
from `before(e) // BM + e` on, where before(e) counts the slots of smaller ids: that is enough room
for every expert, needs no prefix sum over experts, and at most E tiles stay empty.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate; BM rows, BN
columns and BK depth of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import activate_gated, activate_ungated


@triton.jit(do_not_specialize=["slots", "tiles"])
def tile_map(
    ids,
    order,
    tile_expert,
    tile_start,
    tile_rows,
    slots,
    tiles,
    E: tl.constexpr,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per expert: its slots in token order, and its tiles.

    Each program reads all ids, which sit in the cache; none waits for another, and no atomic makes
    the order depend on timing.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    smaller = tl.zeros((CHUNK,), tl.int32)
    equal = tl.zeros((CHUNK,), tl.int32)
    s0 = 0
    while s0 < slots:
        found = tl.load(ids + s0 + lane, mask=lane < slots - s0, other=E)
        smaller += ((found >= 0) & (found < expert)).to(tl.int32)
        equal += (found == expert).to(tl.int32)
        s0 += CHUNK
    start = tl.sum(smaller, axis=0)
    count = tl.sum(equal, axis=0)
    place = start
    s0 = 0
    while s0 < slots:
        found = tl.load(ids + s0 + lane, mask=lane < slots - s0, other=E)
        mine = found == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(order + place + rank - 1, s0 + lane, mask=mine)
        place += tl.sum(mine.to(tl.int32), axis=0)
        s0 += CHUNK
    first = start // BM + expert
    last = (start + count) // BM + expert + 1
    if expert == E - 1:
        last = tiles
    cell = tl.arange(0, 128)
    t0 = first
    while t0 < last:
        tile = t0 + cell
        inside = tile < last
        row = (tile - first) * BM
        rows = tl.minimum(tl.maximum(count - row, 0), BM)
        tl.store(tile_expert + tile, tl.zeros((128,), tl.int32) + expert, mask=inside)
        tl.store(tile_start + tile, start + row, mask=inside)
        tl.store(tile_rows + tile, rows, mask=inside)
        t0 += 128


@triton.jit
def _swizzle(pid, tiles, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column block: GROUP row tiles walk the columns together and share them in L2."""
    width = GROUP * BLOCKS
    first = (pid // width) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    inner = pid % width
    return first + inner % height, inner // height


@triton.jit
def _load_b(
    weight,
    pointers,
    step,
    row,
    n,
    k,
    k0,
    LAST: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A [BK, BN] tile of one expert's weight.

    `row` is the tile's first row in the descriptor's view; where the storage is transposed, the
    view's rows are the depth. A descriptor reads past the end of an expert's columns into its
    neighbour; those columns are never stored.
    """
    if TMA and TRANSPOSED:
        b = weight.load([row + k0, n])
    elif TMA:
        b = weight.load([row, k0]).T
    elif EVEN:
        b = tl.load(pointers + step)
    else:
        b = tl.load(
            pointers + step, mask=(k[:, None] < DEPTH - k0) & (n[None, :] < LAST), other=0.0
        )
    return b


@triton.jit(do_not_specialize=["tiles"])
def large_up(
    hidden,
    topk_weights,
    weight,
    bias,
    act,
    order,
    tile_expert,
    tile_start,
    tile_rows,
    tiles,
    up_offset,
    stride_e,
    stride_n,
    stride_k,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    ACT: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """act[sorted slot, BN columns] = activation(hidden[token] @ W1[expert].T)."""
    BLOCKS: tl.constexpr = (I + BN - 1) // BN
    tile, block = _swizzle(tl.program_id(0), tiles, BLOCKS, GROUP)
    rows = tl.load(tile_rows + tile)
    if rows == 0:
        return
    expert = tl.load(tile_expert + tile)
    m = tl.arange(0, BM)
    real = m < rows
    place = tl.load(tile_start + tile) + m
    slot = tl.load(order + place, mask=real, other=0)
    COLUMNS: tl.constexpr = 2 * BN if INTERLEAVED else BN
    LAST: tl.constexpr = 2 * I if INTERLEAVED else I
    J: tl.constexpr = 2 * I if GATED else I
    TWO: tl.constexpr = GATED and not INTERLEAVED
    EVEN: tl.constexpr = H % BK == 0 and LAST % COLUMNS == 0
    k = tl.arange(0, BK)
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    inputs = hidden + (slot // K).to(tl.int64)[:, None] * H + k[None, :]
    if TMA:
        pointers = hidden
        pointers_up = hidden
        if TRANSPOSED:
            row = expert * H
            row_up = row
            at = block * COLUMNS
            at_up = at + I
        else:
            row = expert * J + block * COLUMNS
            row_up = row + I
            at = 0
            at_up = 0
    else:
        at = n
        at_up = n
        row = 0
        row_up = 0
        base = weight + expert.to(tl.int64) * stride_e
        pointers = base + n.to(tl.int64)[None, :] * stride_n + k[:, None] * stride_k
        pointers_up = pointers + up_offset
    acc = tl.zeros((BM, COLUMNS), tl.float32)
    acc_up = tl.zeros((BM, COLUMNS), tl.float32)
    for k0 in range(0, H, BK):
        step = k0 * stride_k
        if H % BK == 0:
            a = tl.load(inputs + k0, mask=real[:, None], other=0.0)
        else:
            a = tl.load(inputs + k0, mask=real[:, None] & (k[None, :] < H - k0), other=0.0)
        b = _load_b(weight, pointers, step, row, at, k, k0, LAST, H, EVEN, TMA, TRANSPOSED)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if TWO:
            c = _load_b(
                weight, pointers_up, step, row_up, at_up, k, k0, LAST, H, EVEN, TMA, TRANSPOSED
            )
            acc_up = tl.dot(a, c, acc_up, input_precision="ieee")
    if WEIGHT_ON_INPUT:
        scale = tl.load(topk_weights + slot, mask=real, other=0.0)[:, None]
        acc = acc * scale
        acc_up = acc_up * scale
    if HAS_BIAS:
        at_bias = bias + expert.to(tl.int64) * J + n
        acc += tl.load(at_bias, mask=n < LAST, other=0.0).to(tl.float32)[None, :]
        if TWO:
            acc_up += tl.load(at_bias + I, mask=n < LAST, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
        out = activate_gated(gate, up, ACT)
    elif GATED:
        out = activate_gated(acc, acc_up, ACT)
    else:
        out = activate_ungated(acc, ACT)
    i = block * BN + tl.arange(0, BN)
    pointers_out = act + place.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(pointers_out, out.to(act.dtype.element_ty), mask=real[:, None] & (i[None, :] < I))


@triton.jit(do_not_specialize=["tiles"])
def large_down(
    act,
    topk_weights,
    weight,
    bias,
    slot_out,
    order,
    tile_expert,
    tile_start,
    tile_rows,
    tiles,
    stride_e,
    stride_n,
    stride_k,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """slot_out[slot, BN columns] = weight * (act[sorted slot] @ W2[expert].T)."""
    BLOCKS: tl.constexpr = (H + BN - 1) // BN
    tile, block = _swizzle(tl.program_id(0), tiles, BLOCKS, GROUP)
    rows = tl.load(tile_rows + tile)
    if rows == 0:
        return
    expert = tl.load(tile_expert + tile)
    m = tl.arange(0, BM)
    real = m < rows
    place = tl.load(tile_start + tile) + m
    EVEN: tl.constexpr = I % BK == 0 and H % BN == 0
    k = tl.arange(0, BK)
    n = block * BN + tl.arange(0, BN)
    inputs = act + place.to(tl.int64)[:, None] * I + k[None, :]
    if TMA:
        pointers = act
        if TRANSPOSED:
            row = expert * I
            at = block * BN
        else:
            row = expert * H + block * BN
            at = 0
    else:
        at = n
        row = 0
        base = weight + expert.to(tl.int64) * stride_e
        pointers = base + n.to(tl.int64)[None, :] * stride_n + k[:, None] * stride_k
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, I, BK):
        if I % BK == 0:
            a = tl.load(inputs + k0, mask=real[:, None], other=0.0)
        else:
            a = tl.load(inputs + k0, mask=real[:, None] & (k[None, :] < I - k0), other=0.0)
        b = _load_b(weight, pointers, k0 * stride_k, row, at, k, k0, H, I, EVEN, TMA, TRANSPOSED)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    slot = tl.load(order + place, mask=real, other=0)
    if HAS_BIAS:
        at_bias = bias + expert.to(tl.int64) * H + n
        acc += tl.load(at_bias, mask=n < H, other=0.0).to(tl.float32)[None, :]
    if not WEIGHT_ON_INPUT:
        acc = acc * tl.load(topk_weights + slot, mask=real, other=0.0)[:, None]
    pointers_out = slot_out + slot.to(tl.int64)[:, None] * H + n[None, :]
    mask = real[:, None] & (n[None, :] < H)
    tl.store(pointers_out, acc.to(slot_out.dtype.element_ty), mask=mask)


@triton.jit
def sum_slots(
    slot_out,
    ids,
    out,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BN: tl.constexpr,
):
    """out[token] = sum of its slots in slot order, in float32; a dropped slot was never written."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for slot in tl.static_range(K):
        expert = tl.load(ids + token * K + slot)
        kept = (expert >= 0) & (expert < E)
        at = slot_out + (token * K + slot) * H + h
        total += tl.load(at, mask=kept & (h < H), other=0.0).to(tl.float32)
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=h < H)
