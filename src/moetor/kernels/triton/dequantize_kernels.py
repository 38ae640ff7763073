"""All experts' quantised matrices as numbers, for products that read each of them many times.

Shape letters: E experts; N outputs and D depth of a product, P padded depth.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.quantized_code import halves, low_places, numbers, scale_numbers


@triton.jit
def _write(
    number, out, scales, zeros, row_scales, row, place, start, last, N: tl.constexpr,
    D: tl.constexpr, FORM: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """out[row, place] = the numbers with zero points and scales, rounded once.

    Args:
        start: place of the first of each SPAN neighbours, which share a scale.
    """
    ROWS: tl.constexpr = number.shape[0]
    BW: tl.constexpr = number.shape[1]
    value = number.to(tl.float32)
    inside = (row < last)[:, None] & (place < D)[None, :]
    if FORM[4] == 0:
        value = value * tl.load(scales + row, mask=row < last, other=0.0)[:, None]
    else:
        # Rows of all experts; a block never reaches over the end of one.
        BLOCKS: tl.constexpr = (N + FORM[3] - 1) // FORM[3]
        block = row if FORM[3] == 1 else row // N * BLOCKS + row % N // FORM[3]
        at = block.to(tl.int64)[:, None] * GROUPS + (start // FORM[4])[None, :]
        known = (row < last)[:, None] & (start < D)[None, :]
        SCALE: tl.constexpr = FORM[2]
        value = tl.reshape(value, (ROWS, BW // SPAN, SPAN))
        if FORM[5]:
            zero = tl.load(zeros + at, mask=known, other=0.0).to(tl.float32)
            value = value - zero[:, :, None]
        scale = scale_numbers(tl.load(scales + at, mask=known, other=0), SCALE)
        value = tl.reshape(value * scale[:, :, None], (ROWS, BW))
        if FORM[2] == "e4m3":
            value = value * tl.load(row_scales + row, mask=row < last, other=0.0)[:, None]
    at_out = out + row.to(tl.int64)[:, None] * D + place[None, :]
    tl.store(at_out, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_matrices(
    values,
    scales,
    zeros,
    row_scales,
    out,
    last,
    N: tl.constexpr,
    D: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
):
    """out [E * N, D] in its dtype; FORM as in `quantized_product_kernels.py`.

    Args:
        last: E * N.
        BW: bytes of a row's codes in a program.
    """
    ELEMENT: tl.constexpr = FORM[1]
    PACKED: tl.constexpr = ELEMENT == "int4" or ELEMENT == "e2m1"
    MULTIPLE: tl.constexpr = (
        1 if FORM[3] > 1 or FORM[4] == 0 else (32 if PACKED and FORM[4] < 32 else FORM[4])
    )
    P: tl.constexpr = (D + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    W: tl.constexpr = P // 2 if PACKED else P
    GROUPS: tl.constexpr = 1 if FORM[4] == 0 else (P + FORM[4] - 1) // FORM[4]
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * BW + tl.arange(0, BW)
    at = values + row.to(tl.int64)[:, None] * W + byte[None, :]
    codes = tl.load(at, mask=(row < last)[:, None] & (byte < W)[None, :], other=0)
    if PACKED:
        OFFSET: tl.constexpr = 8 if ELEMENT == "int4" and not FORM[5] else 0
        low, high = halves(codes, ELEMENT, OFFSET, DTYPE)
        # The compiler does not see by itself that they come in runs of 16.
        place = tl.max_contiguous(tl.multiple_of(low_places(byte), 16), 16)
        start = low_places(tl.program_id(1) * BW + 16 * tl.arange(0, BW // 16))
        _write(low, out, scales, zeros, row_scales, row, place, start, last, N, D, FORM, GROUPS, 16)
        _write(
            high, out, scales, zeros, row_scales, row, place + 16, start + 16, last, N, D, FORM,
            GROUPS, 16,
        )  # fmt: skip
    else:
        number = numbers(codes, ELEMENT, DTYPE)
        SPAN: tl.constexpr = BW if FORM[4] == 0 or FORM[4] > BW else FORM[4]
        start = tl.program_id(1) * BW + SPAN * tl.arange(0, BW // SPAN)
        _write(
            number, out, scales, zeros, row_scales, row, byte, start, last, N, D, FORM, GROUPS,
            SPAN,
        )  # fmt: skip
