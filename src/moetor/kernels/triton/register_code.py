"""Codes that a thread holds as the numbers that Hopper's warpgroup instructions take from its
registers.

In Gluon, in which a program says which thread holds what: codes are read by the threads from which
the instruction wants their numbers, so that nothing moves between threads.

FORM is that of `quantized_product_kernels.py`.

Shape letters: N outputs and D depth of a product, G groups in a row; BK depth of a step.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from triton.experimental import gluon  # type: ignore[import-not-found, unused-ignore]
from triton.experimental.gluon import (  # type: ignore[import-not-found, unused-ignore]
    language as gl,
)

from moetor.kernels.triton.quantized_code import (
    bits_of_halves,
    bits_of_numbers,
    halves,
    numbers,
    scale_numbers,
)

BLOCK = gl.constexpr(64)
"""Rows of a weight that are read as one."""


@gluon.constexpr_function
def codes_layout():
    """Of 16 bytes of a block's codes, as the instruction wants 8 of each 16 rows: a thread has
    bytes 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of two rows."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [32, 0]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[64, 16],
    )


@gluon.constexpr_function
def scales_layout(count):
    """Of [64, count] scales: each thread has those of the rows whose codes it has."""
    bits = count.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[*([0, 1 << bit] for bit in range(bits)), [32, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[64, count],
    )


@gluon.constexpr_function
def groups_in(form, depth):
    """G."""
    group = form[4]
    if group == 0:
        return 1
    multiple = 1 if form[3] > 1 else group
    if form[1] in ("int4", "e2m1"):
        multiple = max(multiple, 32)
    padded = -(-depth // multiple) * multiple
    return -(-padded // group)


@gluon.jit
def columns(tile, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """[64, COUNT] as COUNT vectors [64]."""
    if COUNT == 1:
        out = (gl.convert_layout(gl.reshape(tile, (BLOCK,)), LAYOUT, assert_trivial=True),)
    else:
        even, odd = gl.split(gl.reshape(tile, (BLOCK, COUNT // 2, 2)))
        e = columns(even, COUNT // 2, LAYOUT)
        o = columns(odd, COUNT // 2, LAYOUT)
        if COUNT == 2:
            out = (e[0], o[0])
        elif COUNT == 4:
            out = (e[0], o[0], e[1], o[1])
        else:
            gl.static_assert(COUNT == 8)
            out = (e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3])
    return out


@gluon.jit
def read_scales(
    stored, expert, column0, step, FORM: gl.constexpr, N: gl.constexpr, G: gl.constexpr,
    COUNT: gl.constexpr, BK: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """[64, COUNT] scales or zero points for a step of a block of rows, as they are stored."""
    row = column0 + gl.arange(0, BLOCK, gl.SliceLayout(1, OWN))
    # Written so that the compiler sees COUNT neighbours.
    first = step * COUNT if FORM[4] <= BK else step * BK // FORM[4]
    group = first + gl.arange(0, COUNT, gl.SliceLayout(0, OWN))
    here = stored + expert.to(gl.int64) * ((N + FORM[3] - 1) // FORM[3] * G)
    at = here + (row // FORM[3] * G)[:, None] + group[None, :]
    if G % COUNT == 0:
        out = gl.load(at, mask=(row < N)[:, None], other=0)
    else:
        out = gl.load(at, mask=(row < N)[:, None] & (group < G)[None, :], other=0)
    return out


@gluon.jit
def factors(stored, FORM: gl.constexpr):
    """What numbers are multiplied with: in bfloat16, but beside zero points. Powers of two and
    scales of four bits multiply the codes' own bits, exactly; 2^32 of them follows at the end, for
    the sake of bfloat16's range."""
    SCALE: gl.constexpr = FORM[2]
    LACK: gl.constexpr = 126 if FORM[1] == "e2m1" else 120
    if FORM[5]:
        out = stored.to(gl.float32)
    elif SCALE == "float":
        out = stored.to(gl.bfloat16)
    elif SCALE == "e8m0":
        # One addition to the exponent; 2^34 and more become infinite.
        exponent = gl.minimum(stored.to(gl.int32) + (LACK - 32), 255)
        out = (exponent << 7).to(gl.int16).to(gl.bfloat16, bitcast=True)
    else:
        out = (scale_numbers(stored, SCALE) * 2.0 ** (LACK - 32)).to(gl.bfloat16)
    return out


@gluon.jit
def _scaled(value, factor, zero, FORM: gl.constexpr):
    """[64, 16] numbers with each row's factor, rounded once."""
    if FORM[4] == 0:
        out = value
    elif FORM[5]:
        # Zero points are broken numbers.
        wide = value.to(gl.float32) - zero[:, None]
        out = (wide * factor[:, None]).to(gl.bfloat16)
    else:
        out = value * factor[:, None]
    return out


@gluon.jit
def halves_of(codes, factor, zero, FORM: gl.constexpr):
    """Both halves' numbers of 16 bytes, with each row's factors (low, high): two times [64, 16]."""
    if FORM[2] == "float":
        OFFSET: gl.constexpr = 0 if FORM[5] else 8
        low, high = halves(codes, "int4", OFFSET, gl.bfloat16)
    else:
        low, high = bits_of_halves(codes, gl.bfloat16)
    return _scaled(low, factor[0], zero[0], FORM), _scaled(high, factor[1], zero[1], FORM)


@gluon.jit
def numbers_of(codes, factor, FORM: gl.constexpr):
    """The numbers of 16 codes of 8 bits, with each row's factor: [64, 16]."""
    ELEMENT: gl.constexpr = FORM[1]
    if FORM[2] == "float":
        out = numbers(codes, ELEMENT, gl.bfloat16)
    else:
        out = bits_of_numbers(codes, gl.bfloat16)
    return _scaled(out, factor, factor, FORM)
