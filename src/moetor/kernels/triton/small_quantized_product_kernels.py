"""One tile of a product with quantised weights for few tokens.

BN rows of one expert's matrix are the rows of the matrix instruction, its columns are TN tokens.
Codes become numbers in registers. Scales are applied in one of four ways (MODE): to the finished
rows, to each number, to the codes' own bits, or to sums of groups of the depth. For the last, a
column is a token *and* a group: its input is zero outside the group, so that one product gives the
sums of all groups in a step of the depth, and each is multiplied with its scale in float32.

Shape letters: N rows of a matrix, D its depth, P padded to whole groups, G depth of a group, B
bytes of a step; BN rows and BK depth of a tile, TN tokens, NG groups in BK, C = TN * NG * PARTS
columns.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.quantized_code import (
    bits_of_halves,
    bits_of_numbers,
    halves,
    low_places,
    numbers,
    scale_numbers,
    scaled,
)


@triton.jit
def _scales_of_bits(stored, SCALE: tl.constexpr, LACK: tl.constexpr, DTYPE: tl.constexpr):
    """Scales * 2^(LACK - 32), exact: neither they nor a weight / 2^32 leave the range of bfloat16.

    LACK is what `bits_of_halves` (126) or `bits_of_numbers` (120) are short of.
    """
    if SCALE == "e8m0":
        # One addition to the exponent; 2^34 and more become infinite.
        exponent = tl.minimum(stored.to(tl.int32) + (LACK - 32), 255)
        scale = (exponent << 23).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        scale = numbers(stored, SCALE, DTYPE)
        scale = scale * tl.full((1, 1), 2.0 ** (LACK - 32), tl.float32).to(DTYPE)
    return scale


@triton.jit
def _shifted(number, zero, GROUP: tl.constexpr):
    """number [R, D] - zero [R, D / GROUP], rounded once: whole zero points are exact."""
    R: tl.constexpr = number.shape[0]
    D: tl.constexpr = number.shape[1]
    whole = tl.floor(zero + 0.5)
    grouped = tl.reshape(number, (R, D // GROUP, GROUP)) - whole.to(number.dtype)[:, :, None]
    grouped = grouped - (zero - whole).to(number.dtype)[:, :, None]
    return tl.reshape(grouped, (R, D))


@triton.jit
def _weights(
    c, scales, zeros, at, inside, FORMAT: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr
):
    """Numbers of a tile of codes, and of the high halves where codes are packed; with MODE
    "numbers" times the scales at `at` [BN, groups], with "bits" times these / 2^32."""
    ELEMENT: tl.constexpr = FORMAT[0]
    G: tl.constexpr = FORMAT[1]
    SCALE: tl.constexpr = FORMAT[3]
    ZEROS: tl.constexpr = FORMAT[4]
    PACKED: tl.constexpr = ELEMENT == "int4" or ELEMENT == "e2m1"
    if MODE == "bits":
        scale = tl.load(scales + at, mask=inside, other=0)
        if PACKED:
            low, high = bits_of_halves(c, DTYPE)
            scale_low = _scales_of_bits(scale, SCALE, 126, DTYPE)
            scale_high = scale_low
            if G == 16:  # each half of 16 bytes has a scale of its own
                BN: tl.constexpr = scale.shape[0]
                PAIRS: tl.constexpr = scale.shape[1] // 2
                scale_low, scale_high = tl.split(tl.reshape(scale_low, (BN, PAIRS, 2)))
            low = scaled(low, scale_low, 16)
            high = scaled(high, scale_high, 16)
        else:
            low = scaled(bits_of_numbers(c, DTYPE), _scales_of_bits(scale, SCALE, 120, DTYPE), G)
            high = low
    else:
        if PACKED:
            OFFSET: tl.constexpr = 8 if ELEMENT == "int4" and not ZEROS else 0
            low, high = halves(c, ELEMENT, OFFSET, DTYPE)
        else:
            low = numbers(c, ELEMENT, DTYPE)
            high = low
        if MODE == "numbers":
            scale = tl.load(scales + at, mask=inside, other=0.0)
            LENGTH: tl.constexpr = G // 2 if PACKED else G
            if ZEROS:
                zero = tl.load(zeros + at, mask=inside, other=0.0).to(tl.float32)
                low = _shifted(low, zero, LENGTH)
                high = _shifted(high, zero, LENGTH)
            low = scaled(low, scale, LENGTH)
            if PACKED:
                high = scaled(high, scale, LENGTH)
    return low, high


@triton.jit
def product(
    codes, scales, zeros, row_scales, x, x_scales, expert, n, real_n, row_c, real_c,
    N: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, MODE: tl.constexpr,
    X_GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TN: tl.constexpr, NG: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W[expert, n] @ x[row_c].T in float32, [BN / PARTS, TN], without the scales of whole rows
    of x.

    With PARTS, a part of the depth has BN / PARTS rows of the tile and a column for each token: of
    the product the sums of equal parts are kept, and added up.

    Args:
        expert: of all BN rows, or of each.
        row_c: rows of x of the C columns; those with `real_c` False count as zeros.
        FORMAT: element, depth and rows of a group (0: whole rows), kind of scale, zero points,
            bytes of a row with its padding.
        MODE: scales apply to "rows" (in the end), to "sums" of groups, to "numbers", or to the
            "bits" of codes.
        X_GROUP: values of x that share a scale of `x_scales` [rows, .]; 0: it has none, or one.
    """
    ELEMENT: tl.constexpr = FORMAT[0]
    SCALE: tl.constexpr = FORMAT[3]
    ZEROS: tl.constexpr = FORMAT[4]
    G: tl.constexpr = FORMAT[1] if FORMAT[1] > 0 else D
    PACKED: tl.constexpr = ELEMENT == "int4" or ELEMENT == "e2m1"
    PER_BYTE: tl.constexpr = 2 if PACKED else 1
    WIDTH: tl.constexpr = FORMAT[5]
    P: tl.constexpr = WIDTH * PER_BYTE
    B: tl.constexpr = BK // PER_BYTE
    GS: tl.constexpr = (P + G - 1) // G
    SCALE_ROWS: tl.constexpr = (N + FORMAT[2] - 1) // FORMAT[2]
    C: tl.constexpr = TN * NG * PARTS
    GC: tl.constexpr = BK // NG
    DTYPE: tl.constexpr = x.dtype.element_ty
    EVEN: tl.constexpr = WIDTH % B == 0 and N % (BN // PARTS) == 0
    tl.static_assert(PARTS == 1 or (NG == 1 and EVEN and D % (PARTS * BK) == 0))
    DEPTH: tl.constexpr = D // PARTS
    byte = tl.arange(0, B)
    place = low_places(byte) if PACKED else byte
    part_n = tl.arange(0, BN) // (BN // PARTS)
    part_c = tl.arange(0, C) % PARTS
    line = expert.to(tl.int64) * N + n
    pointers = codes + (line * WIDTH + part_n * (WIDTH // PARTS))[:, None] + byte[None, :]
    inputs = x + (row_c.to(tl.int64) * D + part_c * DEPTH)[None, :] + place[:, None]
    mine = tl.broadcast_to(real_c[None, :], (B, C))
    mine_high = mine
    if NG > 1:
        column = (tl.arange(0, C) % NG)[None, :]
        if PACKED and GC == 16:
            mine_high = mine & ((byte // 16 * 2 + 1)[:, None] == column)
            mine = mine & ((byte // 16 * 2)[:, None] == column)
        else:
            mine = mine & ((byte // (GC // PER_BYTE))[:, None] == column)
            mine_high = mine
    IN_TILE: tl.constexpr = MODE == "bits" or MODE == "numbers"
    GROUPS: tl.constexpr = BK // G if IN_TILE else NG
    group = tl.arange(0, GROUPS)
    row = expert.to(tl.int64) * SCALE_ROWS + n // FORMAT[2]
    at_row = row * GS + part_n * (GS // PARTS)
    acc = tl.zeros((BN, C), tl.float32)
    acc_groups = tl.zeros((BN, TN, NG), tl.float32)
    ones = tl.full((BN, B), 1.0, tl.float32).to(DTYPE)
    for k0 in tl.range(0, DEPTH, BK, num_stages=STAGES):
        if EVEN:
            c = tl.load(pointers + k0 // PER_BYTE)
            inside = tl.broadcast_to(real_n[:, None], (BN, GROUPS))
        else:
            b0 = k0 // PER_BYTE
            c = tl.load(pointers + b0, mask=real_n[:, None] & (byte[None, :] < WIDTH - b0), other=0)
            inside = real_n[:, None] & (group[None, :] * (BK // GROUPS) < P - k0)
        at = at_row[:, None] + ((k0 + group * (BK // GROUPS)) // G)[None, :]
        low, high = _weights(c, scales, zeros, at, inside, FORMAT, MODE, DTYPE)
        if D % BK == 0:
            x_low = tl.load(inputs + k0, mask=mine, other=0.0)
        else:
            x_low = tl.load(inputs + k0, mask=mine & (place[:, None] < D - k0), other=0.0)
        if MODE == "sums":
            p = tl.dot(low, x_low, input_precision="ieee")
        else:
            acc = tl.dot(low, x_low, acc, input_precision="ieee")
        if PACKED:
            if D % BK == 0:
                x_high = tl.load(inputs + k0 + 16, mask=mine_high, other=0.0)
            else:
                x_high = tl.load(
                    inputs + k0 + 16, mask=mine_high & (place[:, None] < D - 16 - k0), other=0.0
                )
            if MODE == "sums":
                p = tl.dot(high, x_high, p, input_precision="ieee")
            else:
                acc = tl.dot(high, x_high, acc, input_precision="ieee")
        if MODE == "sums":
            if ZEROS:
                total = tl.dot(ones, x_low, input_precision="ieee")
                total = tl.dot(ones, x_high, total, input_precision="ieee")
            if X_GROUP > 0:
                XS: tl.constexpr = (D + X_GROUP - 1) // X_GROUP
                k_c = part_c * DEPTH + k0 + (tl.arange(0, C) % NG) * GC
                at_c = row_c * XS + k_c // X_GROUP
                p = p * tl.load(x_scales + at_c, mask=real_c, other=0.0)[None, :]
            if NG == 1:
                here = at_row + k0 // G
                scale = scale_numbers(tl.load(scales + here, mask=real_n, other=0), SCALE)
                if ZEROS:
                    zero = tl.load(zeros + here, mask=real_n, other=0.0).to(tl.float32)
                    p -= total * zero[:, None]
                acc += p * scale[:, None]
            else:
                scale = scale_numbers(tl.load(scales + at, mask=inside, other=0), SCALE)
                p = tl.reshape(p, (BN, TN, NG))
                if ZEROS:
                    zero = tl.load(zeros + at, mask=inside, other=0.0).to(tl.float32)
                    p -= tl.reshape(total, (BN, TN, NG)) * zero[:, None, :]
                acc_groups += p * scale[:, None, :]
    y = tl.sum(acc_groups, axis=2) if NG > 1 else acc
    if MODE == "rows":
        y = y * scale_numbers(tl.load(scales + row, mask=real_n, other=0), SCALE)[:, None]
    elif MODE == "bits":
        y = y * 4294967296.0  # see `_scales_of_bits`
    if SCALE == "e4m3":
        y = y * tl.load(row_scales + row, mask=real_n, other=0.0)[:, None]
    if PARTS > 1:
        y = tl.where(part_n[:, None] == part_c[None, :], y, 0.0)
        y = tl.sum(tl.sum(tl.reshape(y, (PARTS, BN // PARTS, TN, PARTS)), axis=3), axis=0)
    return y
