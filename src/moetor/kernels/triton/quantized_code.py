"""Codes to numbers on the device: what every Triton kernel that reads quantised weights shares.

`moetor.kernels.formats` says how codes and scales are stored. Whatever their dtype there, a kernel
is given 8-bit codes, packed codes, e8m0 and e4m3 scales as uint8 (`tensor.view(torch.uint8)`), so
that GPUs without fp8 read them too. The numbers of all codes are exact in bfloat16, float16 and
float32; scales are not applied to them here, but by `scaled` or to the sums of groups.

8-bit codes: `numbers(codes, ELEMENT, DTYPE)`. Packed ones give two tiles, and a K loop multiplies
twice, so that nothing is interleaved:

    byte = tl.arange(0, BYTES)                       # BYTES: a multiple of 16
    place = low_places(byte)                         # where in the depth the low halves lie
    low, high = halves(codes, ELEMENT, OFFSET, DTYPE)
    acc = tl.dot(x[:, place], low.T, acc)            # x loaded at these places,
    acc = tl.dot(x[:, place + 16], high.T, acc)      # and at these

ELEMENT is the format's `element`. OFFSET is subtracted from int4 codes: 8, or 0 where the format
has zero points z: s * (q - z) * x = s * (q x - z x), and z may be a broken number.

A group of G values is G / 2 bytes in a row; a group of 16 is one half of 16 bytes.

The instructions are written by hand, four bytes at a time: a code is put where the mantissa or the
exponent of a half-precision number lies, and one addition or multiplication by a power of two makes
it right. Triton's interpreter runs no instructions and takes an arithmetic twin.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Four bytes as two registers of two 16-bit halves, a byte in each half's low or high part.
_LOW_PARTS = ("0x4140", "0x4342")
_HIGH_PARTS = ("0x1404", "0x3424")


def _assembly(packed, parts, *steps):
    """One instance of inline assembly: `steps` make one output register each from register $S,
    which holds two bytes; of packed codes the first makes the low half's numbers.
    """
    outputs = 4 if packed else 2
    lines = [f"prmt.b32 s{i}, ${outputs}, 0, {parts[i]};" for i in range(2)]
    for half, step in enumerate(steps):
        for i in range(2):
            out = f"${2 * half + i}"
            lines.append(step.replace("$S", f"s{i}").replace("$OUT", out))
    return "{ .reg .b32 s0, s1, a, b, c; " + " ".join(lines) + " }"


def _add_magic(kind, shift, mask, magic, one, minus):
    """The masked bits as the mantissa of `magic`; then times `one`, plus `minus`."""
    move = f"shr.b32 a, $S, {shift};" if shift else "mov.b32 a, $S;"
    return (
        f"{move} lop3.b32 a, a, {mask}, {magic}, 0xEA; mov.b32 b, {one}; mov.b32 c, {minus}; "
        f"fma.rn.{kind} $OUT, a, b, c;"
    )


def _float_bits(kind, sign, exponent, mask, power):
    """The sign, shifted left by `sign`, and the masked bits, shifted right by `exponent`, are a
    number; then times `power`, if that is not None."""
    move = f"shr.b32 a, $S, {exponent};" if exponent >= 0 else f"shl.b32 a, $S, {-exponent};"
    if sign and exponent >= 0:
        # Shifted apart, neither has bits in the other's place: (a | b) & mask.
        both = f"shl.b32 b, $S, {sign}; lop3.b32 $OUT, a, b, {int(mask, 0) | 0x80008000}, 0xA8; "
    else:
        both = f"and.b32 a, a, {mask}; shl.b32 b, $S, {sign}; "
        both += "lop3.b32 $OUT, b, 0x80008000, a, 0xEA; "
    if power is None:
        return move + both
    # Minus zero keeps the sign of a zero.
    multiply = f"mov.b32 b, {power}; mov.b32 c, 0x80008000; fma.rn.{kind} $OUT, $OUT, b, c;"
    return move + both + multiply


_BF16_ONE, _F16_ONE = "0x3F803F80", "0x3C003C00"
_NIBBLE = "0x000F000F"


def _int4_bf16(minus):
    """128 + q, minus 128 or 136."""
    return _assembly(
        True,
        _LOW_PARTS,
        _add_magic("bf16x2", 0, _NIBBLE, "0x43004300", _BF16_ONE, minus),
        _add_magic("bf16x2", 4, _NIBBLE, "0x43004300", _BF16_ONE, minus),
    )


def _int4_fp16(minus, minus_high):
    """1024 + q, minus 1024 or 1032; (1024 + 16 q) / 16, minus 64 or 72."""
    return _assembly(
        True,
        _LOW_PARTS,
        _add_magic("f16x2", 0, _NIBBLE, "0x64006400", _F16_ONE, minus),
        _add_magic("f16x2", 0, "0x00F000F0", "0x64006400", "0x2C002C00", minus_high),
    )


INT4_BF16 = tl.constexpr(_int4_bf16("0xC300C300"))
INT4_BF16_8 = tl.constexpr(_int4_bf16("0xC308C308"))
INT4_FP16 = tl.constexpr(_int4_fp16("0xE400E400", "0xD400D400"))
INT4_FP16_8 = tl.constexpr(_int4_fp16("0xE408E408", "0xD480D480"))


def _e2m1(kind, low, high, mask, power):
    """Both halves' sign and three bits."""
    return _assembly(
        True,
        _HIGH_PARTS,
        _float_bits(kind, 4, low, mask, power),
        _float_bits(kind, 0, high, mask, power),
    )


# Exponents' biases: 1 in e2m1, 7 in e4m3, 127 in bfloat16, 15 in float16.
E2M1_BITS = tl.constexpr(_e2m1("bf16x2", 2, 6, "0x01C001C0", None))
E2M1_BF16 = tl.constexpr(_e2m1("bf16x2", 2, 6, "0x01C001C0", "0x7E807E80"))
E2M1_FP16 = tl.constexpr(_e2m1("f16x2", -1, 3, "0x0E000E00", "0x74007400"))
E4M3_BITS = tl.constexpr(
    _assembly(False, _HIGH_PARTS, _float_bits("bf16x2", 0, 4, "0x07F007F0", None))
)
E4M3_BF16 = tl.constexpr(
    _assembly(False, _HIGH_PARTS, _float_bits("bf16x2", 0, 4, "0x07F007F0", "0x7B807B80"))
)
E4M3_FP16 = tl.constexpr(
    _assembly(False, _HIGH_PARTS, _float_bits("f16x2", 0, 1, "0x3F803F80", "0x5C005C00"))
)
# int8 in bfloat16: 128 + the low seven bits, minus 128, or 256 where the eighth bit is set.
INT8_BF16 = tl.constexpr(
    _assembly(
        False,
        _LOW_PARTS,
        "lop3.b32 a, $S, 0x007F007F, 0x43004300, 0xEA; "
        "lop3.b32 c, $S, 0x00800080, 0xC300C300, 0xEA; "
        f"mov.b32 b, {_BF16_ONE}; fma.rn.bf16x2 $OUT, a, b, c;",
    )
)
# In float16: 1024 + (q + 128), minus 1152.
INT8_FP16 = tl.constexpr(
    _assembly(
        False,
        _LOW_PARTS,
        "xor.b32 a, $S, 0x64806480; "
        f"mov.b32 b, {_F16_ONE}; mov.b32 c, 0xE480E480; fma.rn.f16x2 $OUT, a, b, c;",
    )
)


@triton.jit
def low_places(byte):
    """Where in the depth the low half of a byte of packed codes lies; the high half is 16 further
    on."""
    return (byte // 16) * 32 + byte % 16


@triton.jit
def _float_of_bits(code, SIGN: tl.constexpr, SHIFT: tl.constexpr, POWER: tl.constexpr):
    """float32 of a code with its sign in bit SIGN and the rest below, shifted to the exponent."""
    bits = code.to(tl.int32)
    magnitude = ((bits & ((1 << SIGN) - 1)) << SHIFT).to(tl.float32, bitcast=True) * POWER
    return tl.where((bits >> SIGN) & 1 == 1, -magnitude, magnitude)


@triton.jit
def _one_number(code, ELEMENT: tl.constexpr, OFFSET: tl.constexpr):
    """float32 of codes, one in each element: the definition of the formats."""
    if ELEMENT == "int4":
        number = code.to(tl.float32) - OFFSET
    elif ELEMENT == "int8":
        number = code.to(tl.int8, bitcast=True).to(tl.float32)
    elif ELEMENT == "e4m3":
        number = _float_of_bits(code, 7, 20, 1.329227995784916e36)  # 2^120
    else:
        tl.static_assert(ELEMENT == "e2m1")
        number = _float_of_bits(code, 3, 22, 8.507059173023462e37)  # 2^126
    return number


@triton.jit
def _halves_by_hand(codes, ELEMENT: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    tl.static_assert(ELEMENT == "e2m1" or ELEMENT == "int4")
    tl.static_assert(OFFSET == 0 or (ELEMENT == "int4" and OFFSET == 8))
    INT4: tl.constexpr = INT4_BF16_8 if OFFSET == 8 else INT4_BF16
    INT4_16: tl.constexpr = INT4_FP16_8 if OFFSET == 8 else INT4_FP16
    BF16: tl.constexpr = E2M1_BF16 if ELEMENT == "e2m1" else INT4
    FP16: tl.constexpr = E2M1_FP16 if ELEMENT == "e2m1" else INT4_16
    OUTPUTS: tl.constexpr = "=&r,=&r,=&r,=&r,r"
    if tl.float16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            FP16, OUTPUTS, [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            BF16, OUTPUTS, [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def halves(codes, ELEMENT: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Packed 4-bit codes (uint8, any shape) as two tiles of their shape: the numbers of the low and
    of the high halves, in DTYPE.

    Args:
        ELEMENT: "int4" or "e2m1".
        OFFSET: what is subtracted from an int4 code, 0 or 8; 0 for e2m1.
    """
    if INTERPRETED:
        low = _one_number(codes & 15, ELEMENT, OFFSET).to(DTYPE)
        high = _one_number(codes >> 4, ELEMENT, OFFSET).to(DTYPE)
    elif tl.float32 == DTYPE:
        low, high = _halves_by_hand(codes, ELEMENT, OFFSET, tl.bfloat16)
        low = low.to(tl.float32)
        high = high.to(tl.float32)
    else:
        low, high = _halves_by_hand(codes, ELEMENT, OFFSET, DTYPE)
    return low, high


@triton.jit
def _numbers_by_hand(codes, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    tl.static_assert(ELEMENT == "int8" or ELEMENT == "e4m3")
    BF16: tl.constexpr = INT8_BF16 if ELEMENT == "int8" else E4M3_BF16
    FP16: tl.constexpr = INT8_FP16 if ELEMENT == "int8" else E4M3_FP16
    if tl.float16 == DTYPE:
        number = tl.inline_asm_elementwise(
            FP16, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        number = tl.inline_asm_elementwise(
            BF16, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return number


@triton.jit
def numbers(codes, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """8-bit codes (uint8, any shape) as numbers in DTYPE.

    Args:
        ELEMENT: "int8" or "e4m3" (a NaN's code counts as 480).
    """
    if INTERPRETED:
        number = _one_number(codes, ELEMENT, 0).to(DTYPE)
    elif tl.float32 == DTYPE:
        number = _numbers_by_hand(codes, ELEMENT, tl.bfloat16).to(tl.float32)
    else:
        number = _numbers_by_hand(codes, ELEMENT, DTYPE)
    return number


@triton.jit
def scale_numbers(stored, SCALE: tl.constexpr):
    """Scales as stored, in float32.

    Args:
        SCALE: the format's `scale`: "float" (any floating dtype), or "e8m0" and "e4m3" (uint8).
    """
    if SCALE == "e8m0":
        bits = stored.to(tl.int32) << 23
        # 2^-127 is below the normal numbers.
        scale = tl.where(stored == 0, 0x00400000, bits).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        scale = _float_of_bits(stored, 7, 20, 1.329227995784916e36)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def scaled(number, scale, GROUP: tl.constexpr):
    """number [R, D] * scale [R, D / GROUP], each scale for GROUP neighbours, in the dtype of
    `number`, rounded once.

    Of packed codes a tile of halves has D bytes, and GROUP is half a group of the depth: 16 bytes
    of a group of 32. Exact for e8m0 scales in bfloat16; others are rounded as any half-precision
    weight is.
    """
    R: tl.constexpr = number.shape[0]
    D: tl.constexpr = number.shape[1]
    grouped = tl.reshape(number, (R, D // GROUP, GROUP))
    return tl.reshape(grouped * scale.to(number.dtype)[:, :, None], (R, D))


@triton.jit
def bits_of_halves(codes, DTYPE: tl.constexpr):
    """As `halves` for e2m1, short of a factor of 2^126: the codes' own bits as bfloat16, or the
    same in float32. One multiplication with a scale times a power of two then makes weights.
    """
    if INTERPRETED:
        low = _one_number(codes & 15, "e2m1", 0) * 1.1754943508222875e-38
        high = _one_number(codes >> 4, "e2m1", 0) * 1.1754943508222875e-38
    else:
        low, high = tl.inline_asm_elementwise(
            E2M1_BITS,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def bits_of_numbers(codes, DTYPE: tl.constexpr):
    """As `numbers` for e4m3, short of a factor of 2^120."""
    if INTERPRETED:
        number = _one_number(codes, "e4m3", 0) * 7.52316384526264e-37
    else:
        number = tl.inline_asm_elementwise(
            E4M3_BITS, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return number.to(DTYPE)
