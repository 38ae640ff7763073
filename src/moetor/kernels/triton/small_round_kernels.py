"""A product's input rounded to what 8-bit activations would hold, in one launch.

The codes are stored as numbers in the model's dtype, which holds them exactly, so that a product of
half-precision numbers computes what one of codes would. GPUs without fp8 do the same.

Shape letters: R rows, D their width, G runs of a row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain

# Added and taken away again, it rounds a float32 of up to 2^22 half to even.
_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _e4m3(x):
    """float32 rounded half to even to three bits behind the first, saturated, as e4m3 has them."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)  # 2^-6 at least
    # 2^20 times the number's power of two: the sum's last place is an eighth of that power.
    power = ((exponent + 20) << 23).to(tl.float32, bitcast=True)
    size = (tl.abs(x) + power) - power
    return tl.where(x < 0, -size, size)


@triton.jit
def _scale_of(largest, FORMAT: tl.constexpr):
    """The scale of values of up to `largest`; 1 for a run of zeros."""
    largest = tl.where(largest > 0, largest, 1.0)
    if FORMAT == "mxfp8":
        # 2^k, k = floor(log2(largest)) - 8, one more where the largest value would saturate.
        bits = largest.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    else:
        TOP: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0
        scale = tl.div_rn(largest, tl.full(largest.shape, TOP, tl.float32))
    return scale


@triton.jit
def round_rows(
    x,
    ids,
    topk_weights,
    input_scales,
    rounded,
    scales,
    E: tl.constexpr,
    D: tl.constexpr,
    DIV: tl.constexpr,
    BY_SLOT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FORMAT: tl.constexpr,
    RUN: tl.constexpr,
    STATIC: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """rounded[row] = q, scales[row, run] = s with x[row / DIV] = s * q; for mxfp8 s * q and no s.

    Args:
        BY_SLOT: a row is a slot; those of dropped ones are not read.
        WEIGHTED: x is multiplied with the slot's routing weight first.
        RUN: values that share a scale; 0 for a whole row, which WIDTH then spans.
        STATIC: the scale is that of the slot's expert.
    """
    chain(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < D
    if BY_SLOT:
        expert = tl.load(ids + row)
        if (expert < 0) | (expert >= E):
            return
    values = tl.load(x + row // DIV * D + column, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        values = values * tl.load(topk_weights + row)
    if STATIC:
        scale = tl.load(input_scales + expert)
        spread = tl.full((WIDTH,), 1.0, tl.float32) * scale
        tl.store(scales + row, scale)
    elif RUN == 0:
        scale = _scale_of(tl.max(tl.abs(values), axis=0, keep_dims=True), FORMAT)
        spread = tl.broadcast_to(scale, (WIDTH,))
        tl.store(scales + row + tl.arange(0, 1), scale)
    else:
        RUNS: tl.constexpr = WIDTH // RUN
        GROUPS: tl.constexpr = (D + RUN - 1) // RUN
        scale = _scale_of(tl.max(tl.abs(tl.reshape(values, (RUNS, RUN))), axis=1), FORMAT)
        spread = tl.reshape(tl.broadcast_to(scale[:, None], (RUNS, RUN)), (WIDTH,))
        if FORMAT != "mxfp8":
            run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
            tl.store(scales + row * GROUPS + run, scale, mask=run < GROUPS)
    quotient = tl.div_rn(values, spread)
    if FORMAT == "int8":
        number = tl.minimum(tl.maximum((quotient + _WHOLE) - _WHOLE, -127.0), 127.0)
    else:
        number = _e4m3(quotient)
    if FORMAT == "mxfp8":
        number = number * spread
    tl.store(rounded + row * D + column, number.to(rounded.dtype.element_ty), mask=inside)
