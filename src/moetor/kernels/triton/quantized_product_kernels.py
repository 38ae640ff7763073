"""The product of a tile: rows of an input with rows of one expert's quantised matrix.

FORM describes the matrix and its input: (arithmetic, element, scale, rows of a group, depth of a
group, whether there are zero points, dtype of the numbers). The arithmetic is

- `channel`: codes of both are multiplied as they are; a row's and a column's scale follow after the
  last.
- `block`: the same over 128 of the depth at a time, whose sum is scaled and added in float32.
- `numbers`: the input is not coded; codes of the weight become numbers of its dtype in the loop.

With SWAP the weight's rows are the rows of the matrix instruction, of which Hopper's takes 64 at
least, and the tile's rows are its columns.

Shape letters: E experts; N outputs and D depth of a product, P padded depth; BM rows, BN columns
and BK depth of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.quantized_code import (
    halves,
    low_places,
    numbers,
    scale_numbers,
    scaled,
)


@triton.jit
def load_rows(x, inputs, real, row0, k, k0, D: tl.constexpr, TMA: tl.constexpr, BK: tl.constexpr):
    """[BM, BK] of a product's input; zeros for padding rows and beyond the depth."""
    if TMA:
        a = x.load([row0, k0])
    elif D % BK == 0:
        a = tl.load(inputs + k0, mask=real[:, None], other=0.0)
    else:
        a = tl.load(inputs + k0, mask=real[:, None] & (k[None, :] < D - k0), other=0.0)
    return a


@triton.jit
def load_codes(
    values,
    pointers,
    row,
    n,
    k,
    k0,
    LAST: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BN, BK] of one expert's weight from row `row` of all experts' on. A descriptor reads past
    the end of an expert into its neighbour; those columns are never stored."""
    if TMA:
        b = values.load([row, k0])
    elif EVEN:
        b = tl.load(pointers + k0)
    else:
        b = tl.load(pointers + k0, mask=(n[:, None] < LAST) & (k[None, :] < D - k0), other=0.0)
    return b


@triton.jit
def dot_rows(a, b, acc, SWAP: tl.constexpr):
    """acc + a @ b.T, all of it transposed with SWAP."""
    if SWAP:
        acc = tl.dot(b, a.T, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, b.T, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _zeros(DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.zeros((BN, BM), DTYPE)
    else:
        acc = tl.zeros((BM, BN), DTYPE)
    return acc


@triton.jit
def _scaled(acc, by_row, by_column, SWAP: tl.constexpr):
    """The accumulator times both scales."""
    if SWAP:
        out = acc.to(tl.float32) * by_column[:, None] * by_row[None, :]
    else:
        out = acc.to(tl.float32) * by_row[:, None] * by_column[None, :]
    return out


@triton.jit
def _add_block(
    acc, part, by_row, scales, row, n, kb, LAST: tl.constexpr, KB: tl.constexpr,
    ONE: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """acc + part times the scales of its rows and of the columns n, which are rows `row` of the
    expert's matrix, in depth block kb. With ONE all columns lie in one block."""
    if ONE:
        factor = by_row * tl.load(scales + tl.min(row, axis=0) // 128 * KB + kb)
        acc += part * (factor[None, :] if SWAP else factor[:, None])
    else:
        by_column = tl.load(scales + row // 128 * KB + kb, mask=n < LAST, other=0.0)
        acc += _scaled(part, by_row, by_column, SWAP)
    return acc


@triton.jit
def _product_of_codes(
    x,
    x_scales,
    x_stride,
    source,
    real,
    row0,
    values,
    scales,
    expert,
    column0,
    N: tl.constexpr,
    D: tl.constexpr,
    LAST: tl.constexpr,
    TWO: tl.constexpr,
    FORM: tl.constexpr,
    ONE: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x[source] @ weight[expert, columns].T, [BM, BN] in float32; with TWO also of the columns
    LAST rows further on.

    Args:
        source: [BM] row of x of each of the tile's rows, int64; `row0` the first, where x is a
            descriptor.
        LAST: columns that are stored.
        ONE: a block's scale serves all columns.
    """
    k = tl.arange(0, BK)
    n = column0 + tl.arange(0, BN)
    EVEN: tl.constexpr = D % BK == 0 and LAST % BN == 0
    KB: tl.constexpr = (D + 127) // 128
    NB: tl.constexpr = (N + 127) // 128
    first = expert * N + column0
    inputs = x_scales
    pointers = x_scales
    pointers_up = x_scales
    if not TMA_ROWS:
        inputs = x + source[:, None] * D + k[None, :]
    if not TMA:
        pointers = values + (expert.to(tl.int64) * N + n)[:, None] * D + k[None, :]
        pointers_up = pointers + LAST * D
    if FORM[0] == "block":
        scales += expert.to(tl.int64) * (NB * KB)
    DTYPE: tl.constexpr = tl.int32 if FORM[1] == "int8" else tl.float32
    acc = _zeros(DTYPE, BM, BN, SWAP)
    acc_up = _zeros(DTYPE, BM, BN, SWAP)
    for k0 in range(0, D, BK):
        a = load_rows(x, inputs, real, row0, k, k0, D, TMA_ROWS, BK)
        b = load_codes(values, pointers, first, n, k, k0, LAST, D, EVEN, TMA)
        if FORM[0] == "block":
            at = x_scales + x_stride.to(tl.int64) * (k0 // 128)
            by_row = tl.load(at + source, mask=real, other=0.0)
            part = dot_rows(a, b, _zeros(DTYPE, BM, BN, SWAP), SWAP)
            acc = _add_block(acc, part, by_row, scales, n, n, k0 // 128, LAST, KB, ONE, SWAP)
        else:
            acc = dot_rows(a, b, acc, SWAP)
        if TWO:
            c = load_codes(values, pointers_up, first + LAST, n, k, k0, LAST, D, EVEN, TMA)
            if FORM[0] == "block":
                part = dot_rows(a, c, _zeros(DTYPE, BM, BN, SWAP), SWAP)
                acc_up = _add_block(
                    acc_up, part, by_row, scales, n + LAST, n, k0 // 128, LAST, KB, ONE, SWAP
                )
            else:
                acc_up = dot_rows(a, c, acc_up, SWAP)
    if FORM[0] == "channel":
        by_row = tl.load(x_scales + source, mask=real, other=0.0)
        at = scales + expert.to(tl.int64) * N + n
        acc = _scaled(acc, by_row, tl.load(at, mask=n < LAST, other=0.0), SWAP)
        if TWO:
            by_column = tl.load(at + LAST, mask=n < LAST, other=0.0)
            acc_up = _scaled(acc_up, by_row, by_column, SWAP)
    if SWAP:
        acc = acc.T
        acc_up = acc_up.T
    return acc, acc_up


@triton.jit
def _group_scales(
    stored, row, n, group, FORM: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr
):
    """[BN, groups] of an expert's scales or zero points, of the rows `row`, which are columns n."""
    at = stored + (row // FORM[3])[:, None] * GROUPS + group[None, :]
    return tl.load(at, mask=(n < LAST)[:, None] & (group < GROUPS)[None, :], other=0)


@triton.jit
def _numbers_of(codes, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """[BN, BK] numbers without scales; of packed codes first all low, then all high halves."""
    ELEMENT: tl.constexpr = FORM[1]
    if ELEMENT == "int4" or ELEMENT == "e2m1":
        OFFSET: tl.constexpr = 8 if ELEMENT == "int4" and not FORM[5] else 0
        low, high = halves(codes, ELEMENT, OFFSET, DTYPE)
        side_by_side = tl.permute(tl.join(low, high), (0, 2, 1))
        number = tl.reshape(side_by_side, (codes.shape[0], 2 * codes.shape[1]))
    else:
        number = numbers(codes, ELEMENT, DTYPE)
    return number


@triton.jit
def _weight_tile(
    codes, scales, zeros, row, n, k0, FORM: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr,
    DTYPE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BN, BK] of a weight, from its codes, but for the scales of whole rows."""
    number = _numbers_of(codes, FORM, DTYPE)
    if FORM[4] != 0:
        BN: tl.constexpr = codes.shape[0]
        PACKED: tl.constexpr = FORM[1] == "int4" or FORM[1] == "e2m1"
        # Groups side by side in the tile, for the low and for the high halves of packed codes,
        # where a group of 16 is one half of 16 bytes.
        NARROW: tl.constexpr = PACKED and FORM[4] == 16
        COUNT: tl.constexpr = BK // 32 if NARROW else (1 if FORM[4] > BK else BK // FORM[4])
        SPANS: tl.constexpr = 2 * COUNT if PACKED else COUNT
        span = tl.arange(0, SPANS)
        group = k0 // FORM[4] + (2 * (span % COUNT) + span // COUNT if NARROW else span % COUNT)
        stored = _group_scales(scales, row, n, group, FORM, LAST, GROUPS)
        SCALE: tl.constexpr = FORM[2]
        scale = scale_numbers(stored, SCALE)
        if FORM[5] or number.dtype == tl.float16:
            # Zero points are broken numbers, and small scales have few digits in float16.
            wide = tl.reshape(number.to(tl.float32), (BN, SPANS, BK // SPANS))
            if FORM[5]:
                zero = _group_scales(zeros, row, n, group, FORM, LAST, GROUPS)
                wide = wide - zero.to(tl.float32)[:, :, None]
            number = tl.reshape((wide * scale[:, :, None]).to(number.dtype), (BN, BK))
        else:
            number = scaled(number, scale, BK // SPANS)
    return number


@triton.jit
def _product_of_numbers(
    x,
    source,
    real,
    row0,
    values,
    scales,
    zeros,
    row_scales,
    expert,
    column0,
    N: tl.constexpr,
    D: tl.constexpr,
    LAST: tl.constexpr,
    TWO: tl.constexpr,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """As `product`, by numbers of the input's dtype."""
    PACKED: tl.constexpr = FORM[1] == "int4" or FORM[1] == "e2m1"
    DTYPE: tl.constexpr = (
        tl.float16 if FORM[6] == "fp16" else (tl.float32 if FORM[6] == "fp32" else tl.bfloat16)
    )
    # P, to which the codes are padded.
    MULTIPLE: tl.constexpr = (
        1 if FORM[3] > 1 or FORM[4] == 0 else (32 if PACKED and FORM[4] < 32 else FORM[4])
    )
    P: tl.constexpr = (D + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    W: tl.constexpr = P // 2 if PACKED else P
    BW: tl.constexpr = BK // 2 if PACKED else BK
    GROUPS: tl.constexpr = 1 if FORM[4] == 0 else (P + FORM[4] - 1) // FORM[4]
    EVEN: tl.constexpr = W % BW == 0 and LAST % BN == 0
    w = tl.arange(0, BW)
    n = column0 + tl.arange(0, BN)
    first = expert * N + column0
    scales += expert.to(tl.int64) * ((N + FORM[3] - 1) // FORM[3] * GROUPS)
    if FORM[5]:
        zeros += expert.to(tl.int64) * (N * GROUPS)
    pointers = scales
    pointers_up = scales
    if not TMA:
        pointers = values + (expert.to(tl.int64) * N + n)[:, None] * W + w[None, :]
        pointers_up = pointers + LAST * W
    k = tl.arange(0, BK)
    place = k
    if PACKED:
        # The compiler does not see by itself that they come in runs of 16.
        place = low_places(k % BW) + 16 * (k // BW)
        place = tl.max_contiguous(tl.multiple_of(place, 16), 16)
    inputs = scales
    if not TMA_ROWS:
        inputs = x + source[:, None] * D + place[None, :]
    acc = _zeros(tl.float32, BM, BN, SWAP)
    acc_up = _zeros(tl.float32, BM, BN, SWAP)
    for k0 in range(0, D, BK):
        w0 = k0 // 2 if PACKED else k0
        a = load_rows(x, inputs, real, row0, place, k0, D, TMA_ROWS, BK)
        codes = load_codes(values, pointers, first, n, w, w0, LAST, W, EVEN, TMA)
        b = _weight_tile(codes, scales, zeros, n, n, k0, FORM, LAST, GROUPS, DTYPE, BK)
        acc = dot_rows(a, b, acc, SWAP)
        if TWO:
            codes = load_codes(values, pointers_up, first + LAST, n, w, w0, LAST, W, EVEN, TMA)
            c = _weight_tile(codes, scales, zeros, n + LAST, n, k0, FORM, LAST, GROUPS, DTYPE, BK)
            acc_up = dot_rows(a, c, acc_up, SWAP)
    if SWAP:
        acc = acc.T
        acc_up = acc_up.T
    if FORM[4] == 0 or FORM[2] == "e4m3":
        # The scale of a whole row of the weight, or the second one of nvfp4.
        by_column = scales if FORM[4] == 0 else row_scales + expert.to(tl.int64) * N
        acc *= tl.load(by_column + n, mask=n < LAST, other=0.0)[None, :]
        if TWO:
            acc_up *= tl.load(by_column + LAST + n, mask=n < LAST, other=0.0)[None, :]
    return acc, acc_up


@triton.jit
def product(
    x,
    x_scales,
    x_stride,
    source,
    real,
    row0,
    values,
    scales,
    zeros,
    row_scales,
    expert,
    column0,
    N: tl.constexpr,
    D: tl.constexpr,
    LAST: tl.constexpr,
    TWO: tl.constexpr,
    FORM: tl.constexpr,
    ONE: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x[source] @ weight[expert, columns].T, [BM, BN] in float32; with TWO also of the columns
    LAST rows further on.

    Args:
        x_scales: of codes, float32 [1, .] or [D / 128, .], whose rows are `x_stride` apart.
        source: [BM] row of x of each of the tile's rows, int64; `row0` the first, where x is a
            descriptor.
        values: codes [E, N, .] or a descriptor over [E * N, .].
        LAST: columns that are stored.
        ONE: a block's scale serves all columns.
    """
    if FORM[0] == "numbers":
        acc, acc_up = _product_of_numbers(
            x, source, real, row0, values, scales, zeros, row_scales, expert, column0, N, D, LAST,
            TWO, FORM, TMA, TMA_ROWS, SWAP, BM, BN, BK,
        )  # fmt: skip
    else:
        acc, acc_up = _product_of_codes(
            x, x_scales, x_stride, source, real, row0, values, scales, expert, column0, N, D,
            LAST, TWO, FORM, ONE, TMA, TMA_ROWS, SWAP, BM, BN, BK,
        )  # fmt: skip
    return acc, acc_up
