"""A product's input rounded to what 8-bit activations hold, in one launch.

The codes are stored as bfloat16 numbers, which hold those of every format exactly: their products
with codes of the weight are what products of codes would be.

Shape letters: R rows, D their width, G runs of a row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain
from moetor.kernels.triton.quantize_rows_kernels import inverse_of, scale_of, to_codes


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
    LENGTH: tl.constexpr = RUN if RUN > 0 else WIDTH
    RUNS: tl.constexpr = WIDTH // LENGTH
    GROUPS: tl.constexpr = (D + RUN - 1) // RUN if RUN > 0 else 1
    values = tl.reshape(values, (RUNS, LENGTH))
    if STATIC:
        scale = tl.load(input_scales + expert) + tl.zeros((RUNS,), tl.float32)
    else:
        scale = scale_of(tl.max(tl.abs(values), axis=1), FORMAT)
    number = to_codes(values, inverse_of(scale)[:, None], FORMAT, STATIC).to(tl.float32)
    if FORMAT == "mxfp8":
        number = number * scale[:, None]
    else:
        # Several programs of a row with a static scale store the same one.
        run = tl.arange(0, RUNS)
        if RUN > 0:
            run += tl.program_id(1) * RUNS
        tl.store(scales + row * GROUPS + run, scale, mask=run < GROUPS)
    number = tl.reshape(number, (WIDTH,))
    tl.store(rounded + row * D + column, number.to(tl.bfloat16), mask=inside)
