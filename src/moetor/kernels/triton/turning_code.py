"""A token's heads normed and turned by their positions, and new keys and values into their slots.

Shape letters: D width of queries and keys, Dv of values, R turned part of D.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit
def partner(d, FORM: tl.constexpr):
    """Of each column the one that it is turned with, whether it is the pair's first one, and its
    place in a token's tables.

    FORM is (R, whether neighbours are turned, the table's form), as `dense.RotaryForm` says.
    """
    R: tl.constexpr = FORM[0]
    HALF: tl.constexpr = R // 2
    if FORM[1]:
        first = d % 2 == 0
        other = tl.where(first, d + 1, d - 1)
        turn = d // 2
    else:
        first = d < HALF
        other = tl.where(first, d + HALF, d - HALF)
        turn = tl.where(first, d, d - HALF)
    other = tl.where(d < R, other, d)
    if FORM[2] == "halves":
        turn = d
    elif FORM[2] == "twice":
        turn = 2 * turn
    return other, first, turn


@triton.jit
def head_weight(weight, d, NORM: tl.constexpr, OFFSET: tl.constexpr):
    """Of a head's norm, in float32; ones where it has none."""
    if NORM == "weighted":
        w = tl.load(weight + d).to(tl.float32) + OFFSET
    else:
        w = tl.full(d.shape, 1.0, tl.float32)
    return w


@triton.jit
def turned(x, y, first, cos, sin, weight, other_weight, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Heads x [rows, D], and y with the partners of their elements, normed and turned, in float32.

    NORM is None, "plain" or "weighted"; the other arguments are vectors [D].
    """
    x = x.to(tl.float32)
    y = y.to(tl.float32)
    if NORM is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = x * scale * weight[None, :]
        y = y * scale * other_weight[None, :]
    return x * cos[None, :] + tl.where(first[None, :], -y, y) * sin[None, :]
