"""Two products of the path for many tokens, over quantised weights: up + activation, down.

Tiles and their walk are those of `large_kernels.py`; `quantized_product_kernels.py` explains FORM
and SWAP.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate; BM rows, BN
columns and BK depth of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import activate_gated, activate_ungated, chain
from moetor.kernels.triton.large_kernels import swizzle
from moetor.kernels.triton.quantize_rows_kernels import inverse_of, scale_of, to_codes
from moetor.kernels.triton.quantized_product_kernels import product


@triton.jit
def _store_rounded(
    out, out_scales, stride, values, row, column0, step, I: tl.constexpr,  # noqa: E741
    OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The activation, rounded to the model's dtype or as the second product takes it.

    Args:
        stride: rows of `out`: `out_scales` is [., rows].
        step: the second product's static scale.
    """
    i = column0 + tl.arange(0, BN)
    if OUT == "plain":
        rounded = values
    elif OUT == "fp8_static":
        scale = step + tl.zeros((BM,), tl.float32)
        rounded = to_codes(values, inverse_of(scale)[:, None], "fp8", True)
        tl.store(out_scales + row, scale)
    else:
        RUN: tl.constexpr = 32 if OUT == "mxfp8" else 128
        FORMAT: tl.constexpr = "mxfp8" if OUT == "mxfp8" else "fp8"
        RUNS: tl.constexpr = BN // RUN
        G: tl.constexpr = (I + RUN - 1) // RUN
        values = tl.where(i[None, :] < I, values, 0.0)
        runs = tl.reshape(values, (BM, RUNS, RUN))
        scale = scale_of(tl.max(tl.abs(runs), axis=2), FORMAT)
        coded = to_codes(runs, inverse_of(scale)[:, :, None], FORMAT, False)
        if OUT == "mxfp8":
            coded = coded.to(tl.float32) * scale[:, :, None]
        else:
            run = column0 // RUN + tl.arange(0, RUNS)
            at = out_scales + run.to(tl.int64)[None, :] * stride + row[:, None]
            tl.store(at, scale, mask=(run < G)[None, :] & (row >= 0)[:, None])
        rounded = tl.reshape(coded, (BM, BN))
    pointers = out + row.to(tl.int64)[:, None] * I + i[None, :]
    if I % BN == 0:
        tl.store(pointers, rounded.to(out.dtype.element_ty))
    else:
        tl.store(pointers, rounded.to(out.dtype.element_ty), mask=i[None, :] < I)


@triton.jit
def _up_tile(
    x,
    x_scales,
    x_stride,
    values,
    scales,
    zeros,
    row_scales,
    bias,
    act,
    act_scales,
    act_stride,
    act_step,
    topk_weights,
    order,
    slots,
    expert,
    row0,
    block,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    ACT: tl.constexpr,
    OUT: tl.constexpr,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """act[BM rows, BN columns] = activation(x[row or its token] @ W1[expert].T), rounded."""
    J: tl.constexpr = 2 * I if GATED else I
    ONE: tl.constexpr = 128 % BN == 0 and (not GATED or I % 128 == 0)
    row = row0 + tl.arange(0, BM)
    slot = tl.load(order + row)
    real = slot < slots
    slot = tl.where(real, slot, 0)
    source = row.to(tl.int64)
    if BY_TOKEN:
        source = (slot // K).to(tl.int64)
    acc, acc_up = product(
        x, x_scales, x_stride, source, real, row0, values, scales, zeros, row_scales, expert,
        block * BN, J, H, I, GATED, FORM, ONE, TMA, False, SWAP, BM, BN, BK,
    )  # fmt: skip
    if WEIGHT_ON_INPUT:
        scale = tl.load(topk_weights + slot)[:, None]
        acc = acc * scale
        acc_up = acc_up * scale
    n = block * BN + tl.arange(0, BN)
    if HAS_BIAS:
        at_bias = bias + expert.to(tl.int64) * J + n
        acc += tl.load(at_bias, mask=n < I, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(at_bias + I, mask=n < I, other=0.0).to(tl.float32)[None, :]
    if GATED:
        out = activate_gated(acc, acc_up, ACT)
    else:
        out = activate_ungated(acc, ACT)
    if HAS_BIAS:
        out = tl.where(real[:, None], out, 0.0)
    step = 1.0
    if OUT == "fp8_static":
        step = tl.load(act_step + expert)
    _store_rounded(act, act_scales, act_stride, out, row, block * BN, step, I, OUT, BM, BN)


@triton.jit(do_not_specialize=["slots", "x_stride", "act_stride"])
def large_quantized_up(
    x,
    x_scales,
    x_stride,
    values,
    scales,
    zeros,
    row_scales,
    bias,
    act,
    act_scales,
    act_stride,
    act_step,
    topk_weights,
    order,
    tile_expert,
    used,
    slots,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    ACT: tl.constexpr,
    OUT: tl.constexpr,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    PDL: tl.constexpr,
):
    """act[row, BN columns] = activation(x[row or its token] @ W1[expert].T).

    With HALVES, a tile whose upper half is padding computes its lower half alone. OUT is `plain`,
    or the activation format in which the tile rounds its result itself.
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
            x, x_scales, x_stride, values, scales, zeros, row_scales, bias, act, act_scales,
            act_stride, act_step, topk_weights, order, slots, expert, tile * BM, block, K, H, I,
            GATED, BY_TOKEN, HAS_BIAS, WEIGHT_ON_INPUT, ACT, OUT, FORM, TMA, SWAP,
            BM // 2, BN, BK,
        )  # fmt: skip
    else:
        _up_tile(
            x, x_scales, x_stride, values, scales, zeros, row_scales, bias, act, act_scales,
            act_stride, act_step, topk_weights, order, slots, expert, tile * BM, block, K, H, I,
            GATED, BY_TOKEN, HAS_BIAS, WEIGHT_ON_INPUT, ACT, OUT, FORM, TMA, SWAP,
            BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _down_tile(
    x,
    x_scales,
    x_stride,
    values,
    scales,
    zeros,
    row_scales,
    bias,
    out,
    order,
    slots,
    tile_expert,
    tile,
    row0,
    block,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[rows of a tile, BN columns] = x[rows] @ W2[expert].T + bias."""
    expert = tl.load(tile_expert + tile)
    row = row0 + tl.arange(0, BM)
    real = tl.load(order + row) < slots
    source = row.to(tl.int64)
    acc, _ = product(
        x, x_scales, x_stride, source, real, row0, values, scales, zeros, row_scales, expert,
        block * BN, H, I, H, False, FORM, 128 % BN == 0, TMA, TMA_ROWS, SWAP, BM, BN, BK,
    )  # fmt: skip
    n = block * BN + tl.arange(0, BN)
    if HAS_BIAS:
        at_bias = bias + expert.to(tl.int64) * H + n
        acc += tl.load(at_bias, mask=n < H, other=0.0).to(tl.float32)[None, :]
    pointers = out + source[:, None] * H + n[None, :]
    if H % BN == 0:
        tl.store(pointers, acc.to(out.dtype.element_ty))
    else:
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=n[None, :] < H)


@triton.jit(do_not_specialize=["slots", "x_stride"])
def large_quantized_down(
    x,
    x_scales,
    x_stride,
    values,
    scales,
    zeros,
    row_scales,
    bias,
    out,
    order,
    tile_expert,
    used,
    slots,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    HALVES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[row, BN columns] = x[row] @ W2[expert].T + bias.

    HALVES as in `large_quantized_up`; a persistent program computes whole tiles.
    """
    chain(PDL)
    BLOCKS: tl.constexpr = (H + BN - 1) // BN
    tiles = tl.load(used)
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), tiles * BLOCKS, tl.num_programs(0), flatten=True):
            tile, block = swizzle(pid, tiles, BLOCKS, GROUP)
            _down_tile(
                x, x_scales, x_stride, values, scales, zeros, row_scales, bias, out, order, slots,
                tile_expert, tile, tile * BM, block, H, I, HAS_BIAS, FORM, TMA, TMA_ROWS,
                SWAP, BM, BN, BK,
            )  # fmt: skip
    else:
        if tl.program_id(0) >= tiles * BLOCKS:
            return
        tile, block = swizzle(tl.program_id(0), tiles, BLOCKS, GROUP)
        if HALVES and tl.load(order + tile * BM + BM // 2) >= slots:
            _down_tile(
                x, x_scales, x_stride, values, scales, zeros, row_scales, bias, out, order, slots,
                tile_expert, tile, tile * BM, block, H, I, HAS_BIAS, FORM, TMA, TMA_ROWS,
                SWAP, BM // 2, BN, BK,
            )  # fmt: skip
        else:
            _down_tile(
                x, x_scales, x_stride, values, scales, zeros, row_scales, bias, out, order, slots,
                tile_expert, tile, tile * BM, block, H, I, HAS_BIAS, FORM, TMA, TMA_ROWS,
                SWAP, BM, BN, BK,
            )  # fmt: skip
