"""Rows of a product's input rounded as an `ActivationFormat` says, in one launch.

Shape letters: S rows of the input, D their width, G scales of a row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain

# Added and taken away again, it rounds a float32 of up to 2^22 half to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def scale_of(largest, FORMAT: tl.constexpr):
    """The scale of values of up to `largest`, in float32; 1 for a run of zeros.

    A scale below the normal numbers is held at 2^-126: the inverse of a smaller one is infinite,
    and makes NaN of the zeros beside.
    """
    largest = tl.where(largest > 0, largest, 1.0)
    if FORMAT == "int8":
        scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
        scale = tl.maximum(scale, 1.1754943508222875e-38)
    elif FORMAT == "fp8":
        scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
        scale = tl.maximum(scale, 1.1754943508222875e-38)
    else:
        # 2^k, k = floor(log2(largest)) - 8, one more where the largest value would saturate.
        tl.static_assert(FORMAT == "mxfp8")
        bits = largest.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def inverse_of(scale):
    """1 / scale: a product with it is a few times faster than a division by the scale, and differs
    only where a quotient lies between two codes as near as float32 can tell."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def to_codes(x, inverse, FORMAT: tl.constexpr, SATURATE: tl.constexpr):
    """x * inverse as float32 whole numbers (int8) or as float8 e4m3.

    SATURATE where the scale does not follow from the values.
    """
    quotient = x * inverse
    if FORMAT == "int8":
        codes = (quotient + _ROUNDER) - _ROUNDER
    else:
        if SATURATE:
            quotient = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
        codes = quotient.to(tl.float8e4nv)
    return codes


@triton.jit(do_not_specialize=["count", "stride"])
def quantize_rows(
    x,
    codes,
    scales,
    input_scales,
    topk_weights,
    order,
    tile_expert,
    used,
    count,
    stride,
    K: tl.constexpr,
    D: tl.constexpr,
    RUN: tl.constexpr,
    FORMAT: tl.constexpr,
    SOURCE: tl.constexpr,
    STATIC: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """codes[row] and scales[G, row]; mxfp8 writes s * q itself, which bfloat16 holds exactly.

    Args:
        count: T for SOURCE `tokens`, the number of slots otherwise.
        stride: rows of `codes`.
        SOURCE: `tokens`: row r is token r; `slots`: row r of the tiles is its slot's token;
            `rows`: x has the tiles' rows already. Padding rows are neither read nor written.
        RUN: values that share a scale; 0 for a whole row, which WIDTH then spans.
        STATIC: the scale is `input_scales[expert of row]`.
        WEIGHTED: a slot's token is multiplied with its routing weight first.
    """
    chain(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if SOURCE == "tokens":
        real = row < count
        source = row
    else:
        if tl.program_id(0) * ROWS >= tl.load(used) * BM:
            return
        slot = tl.load(order + row)
        real = slot < count
        source = row
        if SOURCE == "slots":
            source = tl.where(real, slot, 0) // K
    inside = real[:, None] & (column < D)[None, :]
    at = source.to(tl.int64)[:, None] * D + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        values = values * tl.load(topk_weights + slot, mask=real, other=0.0)[:, None]
    out = row.to(tl.int64)[:, None] * D + column[None, :]
    if STATIC:
        scale = tl.load(input_scales + tl.load(tile_expert + tl.program_id(0) * ROWS // BM))
        scale = scale + tl.zeros((ROWS,), tl.float32)
        rounded = to_codes(values, inverse_of(scale)[:, None], FORMAT, True)
        # The products read a scale for each row, whatever made it.
        tl.store(scales + row, scale, mask=real)
    elif RUN == 0:
        scale = scale_of(tl.max(tl.abs(values), axis=1), FORMAT)
        rounded = to_codes(values, inverse_of(scale)[:, None], FORMAT, False)
        tl.store(scales + row, scale, mask=real)
    else:
        RUNS: tl.constexpr = WIDTH // RUN
        G: tl.constexpr = (D + RUN - 1) // RUN
        runs = tl.reshape(values, (ROWS, RUNS, RUN))
        scale = scale_of(tl.max(tl.abs(runs), axis=2), FORMAT)
        coded = to_codes(runs, inverse_of(scale)[:, :, None], FORMAT, False)
        if FORMAT == "mxfp8":
            coded = coded.to(tl.float32) * scale[:, :, None]
        else:
            run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
            at_scale = scales + run.to(tl.int64)[None, :] * stride + row[:, None]
            tl.store(at_scale, scale, mask=real[:, None] & (run < G)[None, :])
        rounded = tl.reshape(coded, (ROWS, WIDTH))
    tl.store(codes + out, rounded.to(codes.dtype.element_ty), mask=inside)
