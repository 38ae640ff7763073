"""Launches around attention and experts: norms, rotary positions, activations.

Shape letters: T tokens, H hidden, I intermediate, D width of a head, R rotated part of
it, HB heads of a program.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from triton.language.extra.cuda import (  # type: ignore[import-not-found, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)

from moetor.kernels.triton.device_code import activate_gated


@triton.jit
def add_rms_norm(
    x,
    residual,
    weight,
    total_out,
    out,
    stride_x,
    stride_residual,
    eps,
    H: tl.constexpr,
    HP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
):
    """total = x + residual, rounded as it is stored; out = norm(total) * (weight + OFFSET)."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP)
    inside = h < H
    if HAS_WEIGHT:
        w = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if PDL:
        gdc_wait()
    y = tl.load(x + row * stride_x + h, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + row * stride_residual + h, mask=inside, other=0.0).to(tl.float32)
        rounded = y.to(total_out.dtype.element_ty)
        tl.store(total_out + row * H + h, rounded, mask=inside)
        y = rounded.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / H + eps)
    if HAS_WEIGHT:
        y = y * w
    tl.store(out + row * H + h, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_heads(base, at, inside, i, LAST: tl.constexpr):
    return tl.load(base + at[:, None] + i[None, :], mask=inside[:, None] & (i[None, :] < LAST),
                   other=0.0).to(tl.float32)  # fmt: skip


@triton.jit
def _head_weight(weight, i, inside, OFFSET: tl.constexpr):
    return tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)[None, :] + OFFSET


@triton.jit
def _rotate(
    source,
    target,
    at,
    to,
    inside,
    weight,
    cos,
    sin,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    EP: tl.constexpr,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
    FULL: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Heads of `source` at offsets `at` normed and rotated into `target` at offsets `to`.

    NORM is None, "plain" or "weighted".
    """
    HALF: tl.constexpr = R // 2
    i = tl.arange(0, RP)
    e = tl.arange(0, EP)
    if PAIRS:
        first = 2 * i
        second = 2 * i + 1
    else:
        first = i
        second = HALF + i
    part = i < HALF
    x1 = tl.load(source + at[:, None] + first[None, :], mask=inside[:, None] & part[None, :],
                 other=0.0).to(tl.float32)  # fmt: skip
    x2 = tl.load(source + at[:, None] + second[None, :], mask=inside[:, None] & part[None, :],
                 other=0.0).to(tl.float32)  # fmt: skip
    if D > R:
        x3 = _load_heads(source + R, at, inside, e, D - R)
    if NORM is not None:
        square = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        if D > R:
            square += tl.sum(x3 * x3, axis=1)
        scale = tl.rsqrt(square / D + eps)[:, None]
        x1 = x1 * scale
        x2 = x2 * scale
        if D > R:
            x3 = x3 * scale
    if NORM == "weighted":
        x1 = x1 * _head_weight(weight, first, part, OFFSET)
        x2 = x2 * _head_weight(weight, second, part, OFFSET)
        if D > R:
            x3 = x3 * _head_weight(weight, R + e, e < D - R, OFFSET)
    c1 = tl.load(cos + STEP * i, mask=part, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + STEP * i, mask=part, other=0.0).to(tl.float32)[None, :]
    c2 = c1
    s2 = s1
    if FULL:
        c2 = tl.load(cos + HALF + i, mask=part, other=0.0).to(tl.float32)[None, :]
        s2 = tl.load(sin + HALF + i, mask=part, other=0.0).to(tl.float32)[None, :]
    kept = inside[:, None] & part[None, :]
    y1 = (x1 * c1 - x2 * s1).to(target.dtype.element_ty)
    y2 = (x2 * c2 + x1 * s2).to(target.dtype.element_ty)
    tl.store(target + to[:, None] + first[None, :], y1, mask=kept)
    tl.store(target + to[:, None] + second[None, :], y2, mask=kept)
    if D > R:
        rest = inside[:, None] & (e[None, :] < D - R)
        tl.store(target + to[:, None] + R + e[None, :], x3.to(target.dtype.element_ty), mask=rest)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def rotate_and_cache(
    query,
    key,
    value,
    cos,
    sin,
    q_weight,
    k_weight,
    query_out,
    key_out,
    value_out,
    slots,
    eps,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_cos,
    stride_kb,
    stride_ks,
    stride_ko,
    stride_vb,
    stride_vs,
    stride_vo,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    EP: tl.constexpr,
    BS: tl.constexpr,
    HB: tl.constexpr,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
    FULL: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    CACHED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A token's query heads into a tensor, its key and value heads into their slot.

    Programs of the second axis take HB query heads each, then HB key heads, then HB value heads.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    QB: tl.constexpr = (HQ + HB - 1) // HB
    KB: tl.constexpr = (HKV + HB - 1) // HB
    lane = tl.arange(0, HB)
    cos += token * stride_cos
    sin += token * stride_cos
    if block < QB:
        head = block * HB + lane
        _rotate(
            query, query_out, token * stride_qt + head * stride_qh, (token * HQ + head) * D,
            head < HQ, q_weight, cos, sin, eps, D, R, RP, EP, PAIRS, STEP, FULL, NORM, OFFSET,
        )  # fmt: skip
        return
    if CACHED:
        slot = tl.load(slots + token).to(tl.int64)
        if slot < 0:
            return
        to_k = slot // BS * stride_kb + slot % BS * stride_ks
        to_v = slot // BS * stride_vb + slot % BS * stride_vs
    else:
        to_k = token * stride_ks
        to_v = token * stride_vs
    if block < QB + KB:
        head = (block - QB) * HB + lane
        _rotate(
            key, key_out, token * stride_kt + head * stride_kh, to_k + head * stride_ko,
            head < HKV, k_weight, cos, sin, eps, D, R, RP, EP, PAIRS, STEP, FULL, NORM, OFFSET,
        )  # fmt: skip
        return
    head = (block - QB - KB) * HB + lane
    d = tl.arange(0, DVP)
    inside = (head < HKV)[:, None] & (d[None, :] < DV)
    v = tl.load(value + token * stride_vt + head[:, None] * stride_vh + d[None, :], mask=inside)
    tl.store(value_out + to_v + head[:, None] * stride_vo + d[None, :], v, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def write_to_cache(
    key,
    value,
    key_cache,
    value_cache,
    slots,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kb,
    stride_ks,
    stride_ko,
    stride_vb,
    stride_vs,
    stride_vo,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BS: tl.constexpr,
    HB: tl.constexpr,
    PDL: tl.constexpr,
):
    """A token's keys and values into their slot; a negative slot is none."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    block, place = slot // BS, slot % BS
    head = tl.program_id(1) * HB + tl.arange(0, HB)
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    inside = (head < HKV)[:, None] & (d[None, :] < D)
    k = tl.load(key + token * stride_kt + head[:, None] * stride_kh + d[None, :], mask=inside)
    to = key_cache + block * stride_kb + place * stride_ks
    tl.store(to + head[:, None] * stride_ko + d[None, :], k, mask=inside)
    inside = (head < HKV)[:, None] & (dv[None, :] < DV)
    v = tl.load(value + token * stride_vt + head[:, None] * stride_vh + dv[None, :], mask=inside)
    to = value_cache + block * stride_vb + place * stride_vs
    tl.store(to + head[:, None] * stride_vo + dv[None, :], v, mask=inside)


@triton.jit
def gated_activation(
    x,
    out,
    stride_x,
    I: tl.constexpr,  # noqa: E741
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """activation(gate) * up of rows [gate, up]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * stride_x + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + I + i, mask=i < I, other=0.0).to(tl.float32)
    y = activate_gated(gate, up, ACT)
    tl.store(out + row * I + i, y.to(out.dtype.element_ty), mask=i < I)
