"""Two launches for many tokens: up + activation, down.

Rows are slots sorted by expert into tiles of BM (`sort_kernels.py`); a tile has one expert, and its
padding rows compute what nobody reads.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate; BM rows, BN
columns and BK depth of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import activate_gated, activate_ungated, chain


@triton.jit
def swizzle(pid, tiles, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column block: GROUP row tiles walk the columns together and share them in L2."""
    width = GROUP * BLOCKS
    first = (pid // width) * GROUP
    height = tl.maximum(tl.minimum(tiles - first, GROUP), 1)
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


@triton.jit
def finish(
    acc,
    bias,
    expert,
    block,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """activation(acc + bias), [BM, BN]. Gate and up columns of `acc` are one operand's: all of gate
    ahead of all of up, or side by side with INTERLEAVED."""
    WIDTH: tl.constexpr = 2 * BN if GATED else BN
    J: tl.constexpr = 2 * I if GATED else I
    if HAS_BIAS:
        n = tl.arange(0, WIDTH)
        if GATED and not INTERLEAVED:
            column = block * BN + n % BN
            at = column + n // BN * I
            last = I
        else:
            column = block * WIDTH + n
            at = column
            last = J
        here = bias + expert.to(tl.int64) * J + at
        acc += tl.load(here, mask=column < last, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
        out = activate_gated(gate, up, ACT)
    elif GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN)), (0, 2, 1)))
        out = activate_gated(gate, up, ACT)
    else:
        out = activate_ungated(acc, ACT)
    return out


@triton.jit
def _up_tile(
    hidden,
    topk_weights,
    weight,
    bias,
    act,
    order,
    slots,
    expert,
    row0,
    block,
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
    PAIRED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """act[BM rows, BN columns] = activation(hidden[token of row] @ W1[expert].T)."""
    row = row0 + tl.arange(0, BM)
    slot = tl.load(order + row)
    real = slot < slots
    slot = tl.where(real, slot, 0)
    COLUMNS: tl.constexpr = 2 * BN if INTERLEAVED or PAIRED else BN
    LAST: tl.constexpr = 2 * I if INTERLEAVED else I
    J: tl.constexpr = 2 * I if GATED else I
    TWO: tl.constexpr = GATED and not INTERLEAVED and not PAIRED
    EVEN: tl.constexpr = H % BK == 0 and LAST % COLUMNS == 0
    k = tl.arange(0, BK)
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    inputs = hidden + (slot // K).to(tl.int64)[:, None] * H + k[None, :]
    if TMA:
        pointers = hidden
        pointers_up = hidden
        if TRANSPOSED:
            first = expert * H
            first_up = first
            at = block * COLUMNS
            at_up = at + I
        else:
            first = expert * J + block * COLUMNS
            first_up = first + I
            at = 0
            at_up = 0
    else:
        at = n
        at_up = n
        first = 0
        first_up = 0
        base = weight + expert.to(tl.int64) * stride_e
        pointers = base + n.to(tl.int64)[None, :] * stride_n + k[:, None] * stride_k
        pointers_up = pointers + up_offset
    acc = tl.zeros((BM, COLUMNS), tl.float32)
    acc_up = tl.zeros((BM, COLUMNS), tl.float32)
    for k0 in range(0, H, BK):
        step = k0 * stride_k
        # Padding rows are zeros: they read nothing, and products of zeros draw less power.
        if H % BK == 0:
            a = tl.load(inputs + k0, mask=real[:, None], other=0.0)
        else:
            a = tl.load(inputs + k0, mask=real[:, None] & (k[None, :] < H - k0), other=0.0)
        if PAIRED:
            b = weight.load([2 * expert, block * BN, k0]).reshape(COLUMNS, BK).T
        else:
            b = _load_b(weight, pointers, step, first, at, k, k0, LAST, H, EVEN, TMA, TRANSPOSED)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if TWO:
            c = _load_b(
                weight, pointers_up, step, first_up, at_up, k, k0, LAST, H, EVEN, TMA, TRANSPOSED
            )
            acc_up = tl.dot(a, c, acc_up, input_precision="ieee")
    if WEIGHT_ON_INPUT:
        scale = tl.load(topk_weights + slot)[:, None]
        acc = acc * scale
        acc_up = acc_up * scale
    if TWO:
        if HAS_BIAS:
            at_bias = bias + expert.to(tl.int64) * J + n
            acc += tl.load(at_bias, mask=n < I, other=0.0).to(tl.float32)[None, :]
            acc_up += tl.load(at_bias + I, mask=n < I, other=0.0).to(tl.float32)[None, :]
        out = activate_gated(acc, acc_up, ACT)
    else:
        out = finish(acc, bias, expert, block, I, GATED, INTERLEAVED, HAS_BIAS, ACT, BM, BN)
    if HAS_BIAS:
        out = tl.where(real[:, None], out, 0.0)
    i = block * BN + tl.arange(0, BN)
    pointers_out = act + row.to(tl.int64)[:, None] * I + i[None, :]
    if I % BN == 0:
        tl.store(pointers_out, out.to(act.dtype.element_ty))
    else:
        tl.store(pointers_out, out.to(act.dtype.element_ty), mask=i[None, :] < I)


@triton.jit(do_not_specialize=["slots"])
def large_up(
    hidden,
    topk_weights,
    weight,
    bias,
    act,
    order,
    tile_expert,
    used,
    slots,
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
    PAIRED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    PDL: tl.constexpr,
):
    """act[row, BN columns] = activation(hidden[token of row] @ W1[expert].T).

    With HALVES, a tile whose upper half is padding computes its lower half alone. With PAIRED, a
    box holds a tile's gate and up columns, [2, BN, BK], and they are one operand of one product.
    """
    chain(PDL)
    BLOCKS: tl.constexpr = (I + BN - 1) // BN
    tiles = tl.load(used)
    if tl.program_id(0) >= tiles * BLOCKS:
        return
    tile, block = swizzle(tl.program_id(0), tiles, BLOCKS, GROUP)
    expert = tl.load(tile_expert + tile)
    if HALVES and tl.load(order + tile * BM + BM // 2) >= slots:
        _up_tile(
            hidden, topk_weights, weight, bias, act, order, slots, expert, tile * BM, block,
            up_offset, stride_e, stride_n, stride_k, K, H, I, GATED, INTERLEAVED, TRANSPOSED,
            HAS_BIAS, WEIGHT_ON_INPUT, ACT, TMA, PAIRED, BM // 2, BN, BK,
        )  # fmt: skip
    else:
        _up_tile(
            hidden, topk_weights, weight, bias, act, order, slots, expert, tile * BM, block,
            up_offset, stride_e, stride_n, stride_k, K, H, I, GATED, INTERLEAVED, TRANSPOSED,
            HAS_BIAS, WEIGHT_ON_INPUT, ACT, TMA, PAIRED, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _down_tile(
    act,
    weight,
    bias,
    out,
    tile_expert,
    tile,
    row0,
    block,
    stride_e,
    stride_n,
    stride_k,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[rows of a tile, BN columns] = act[rows] @ W2[expert].T."""
    EVEN: tl.constexpr = I % BK == 0 and H % BN == 0
    expert = tl.load(tile_expert + tile)
    rows = row0 + tl.arange(0, BM)
    k = tl.arange(0, BK)
    n = block * BN + tl.arange(0, BN)
    if TMA:
        pointers = out
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
    if TMA_ROWS:
        inputs = out
    else:
        inputs = act + rows.to(tl.int64)[:, None] * I + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, I, BK):
        if TMA_ROWS:
            a = act.load([row0, k0])
        elif I % BK == 0:
            a = tl.load(inputs + k0)
        else:
            a = tl.load(inputs + k0, mask=k[None, :] < I - k0, other=0.0)
        b = _load_b(weight, pointers, k0 * stride_k, row, at, k, k0, H, I, EVEN, TMA, TRANSPOSED)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_BIAS:
        at_bias = bias + expert.to(tl.int64) * H + n
        acc += tl.load(at_bias, mask=n < H, other=0.0).to(tl.float32)[None, :]
    pointers_out = out + rows.to(tl.int64)[:, None] * H + n[None, :]
    if H % BN == 0:
        tl.store(pointers_out, acc.to(out.dtype.element_ty))
    else:
        tl.store(pointers_out, acc.to(out.dtype.element_ty), mask=n[None, :] < H)


@triton.jit(do_not_specialize=["slots"])
def large_down(
    act,
    weight,
    bias,
    out,
    order,
    tile_expert,
    used,
    slots,
    stride_e,
    stride_n,
    stride_k,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    HALVES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[row, BN columns] = act[row] @ W2[expert].T + bias.

    HALVES as in `large_up`; a persistent program computes whole tiles.
    """
    chain(PDL)
    BLOCKS: tl.constexpr = (H + BN - 1) // BN
    tiles = tl.load(used)
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), tiles * BLOCKS, tl.num_programs(0), flatten=True):
            tile, block = swizzle(pid, tiles, BLOCKS, GROUP)
            _down_tile(
                act, weight, bias, out, tile_expert, tile, tile * BM, block, stride_e, stride_n,
                stride_k, H, I, TRANSPOSED, HAS_BIAS, TMA, TMA_ROWS, BM, BN, BK,
            )  # fmt: skip
    else:
        if tl.program_id(0) >= tiles * BLOCKS:
            return
        tile, block = swizzle(tl.program_id(0), tiles, BLOCKS, GROUP)
        if HALVES and tl.load(order + tile * BM + BM // 2) >= slots:
            _down_tile(
                act, weight, bias, out, tile_expert, tile, tile * BM, block, stride_e, stride_n,
                stride_k, H, I, TRANSPOSED, HAS_BIAS, TMA, TMA_ROWS, BM // 2, BN, BK,
            )  # fmt: skip
        else:
            _down_tile(
                act, weight, bias, out, tile_expert, tile, tile * BM, block, stride_e, stride_n,
                stride_k, H, I, TRANSPOSED, HAS_BIAS, TMA, TMA_ROWS, BM, BN, BK,
            )  # fmt: skip
