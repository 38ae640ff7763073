"""The last launch for many tokens: the weighted sum over a token's slots.

Shape letters: K top_k, H hidden; BN columns of a program.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain, norm_of_row


@triton.jit
def sum_rows(
    rows,
    place,
    topk_weights,
    norm,
    out,
    K: tl.constexpr,
    H: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    EPS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[token] = sum over its slots, in slot order and float32, of weight * rows[place of slot].

    With EPS, each row passes an RMS norm first (`moetor.kernels.norm`); BN then spans all of H.
    """
    chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = h < H
    if EPS is not None:
        gain = tl.load(norm + h, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(place + token * K + slot)
        y = tl.load(rows + row.to(tl.int64) * H + h, mask=inside & (row >= 0), other=0.0)
        y = y.to(tl.float32)
        if EPS is not None:
            y = norm_of_row(y, gain, H, EPS, SCALE_FIRST)
        if not WEIGHT_ON_INPUT:
            # A dropped slot counts nothing, whatever its weight is.
            y = y * tl.where(row >= 0, tl.load(topk_weights + token * K + slot), 0.0)
        total += y
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=inside)
