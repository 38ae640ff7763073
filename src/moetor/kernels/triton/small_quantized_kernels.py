"""Quantised experts for few tokens: up + activation, down, weighted sum.

A program owns BN rows of one expert's matrix and the tokens that chose it, up to TN; what chose
what is found out from the ids in every program. With few tokens each slot has its own.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate, J rows of
the first product; an entry is K slots; BN rows and BK depth of a tile, TN tokens, TE entries that
are looked through, NG groups in BK.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import (
    activate_gated,
    activate_ungated,
    chain,
    norm_of_row,
)
from moetor.kernels.triton.small_quantized_product_kernels import product

NO_SLOT = tl.constexpr(2**30)


@triton.jit
def _slot_of(ids, entry, entries, expert, K: tl.constexpr, KP: tl.constexpr):
    """The first slot of each entry (K slots) that chose `expert`, or NO_SLOT."""
    k = tl.arange(0, KP)
    inside = (entry < entries)[:, None] & (k < K)[None, :]
    chosen = tl.load(ids + entry[:, None] * K + k[None, :], mask=inside, other=-1)
    first = tl.min(tl.where(chosen == expert, k[None, :], KP), axis=1)
    return tl.where(first < KP, entry * K + first, NO_SLOT)


@triton.jit
def _in_columns(slot, column):
    """The slots that are none left out, in order: those of `column`, or NO_SLOT."""
    real = slot < NO_SLOT
    rank = tl.cumsum(real.to(tl.int32), axis=0) - 1
    here = real[:, None] & (rank[:, None] == column[None, :])
    return tl.min(tl.where(here, slot[:, None], NO_SLOT), axis=0)


@triton.jit
def _assigned(
    ids, entries, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SHARING: tl.constexpr,
    TE: tl.constexpr, TN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What a program computes: expert (E: nothing), block, slots of its TN tokens and of its
    TN * WIDTH columns, NO_SLOT for those that are empty.

    SHARING says whose slots share a program: "none", one each; "slots", those of the expert of an
    earlier slot; "experts", those of an expert.
    """
    NONE: tl.constexpr = SHARING == "none"
    rounds = 1 if NONE else (entries + TE - 1) // TE * ((TE + TN - 1) // TN)
    units = E if SHARING == "experts" else entries * K
    turn = tl.program_id(0) % rounds
    unit = tl.program_id(0) // rounds % units
    block = tl.program_id(0) // (rounds * units)
    expert = unit if SHARING == "experts" else tl.load(ids + unit)
    expert = tl.where((expert < 0) | (expert > E), E, expert)
    if NONE:
        slot = tl.full((TN,), NO_SLOT, tl.int32)
        slot = tl.where(tl.arange(0, TN) == 0, unit, slot)
        slot_c = tl.where(tl.arange(0, TN * WIDTH) // WIDTH == 0, unit, NO_SLOT)
    else:
        CHUNKS: tl.constexpr = (TE + TN - 1) // TN
        entry = turn // CHUNKS * TE + tl.arange(0, TE)
        found = _slot_of(ids, entry, entries, expert, K, KP)
        column0 = turn % CHUNKS * TN
        slot = _in_columns(found, column0 + tl.arange(0, TN))
        slot_c = _in_columns(found, column0 + tl.arange(0, TN * WIDTH) // WIDTH)
        first = tl.min(found, axis=0)
        if SHARING == "slots":
            expert = tl.where(first == unit, expert, E)
        expert = tl.where(tl.min(slot, axis=0) < NO_SLOT, expert, E)
    return expert, block, slot, slot_c


@triton.jit(do_not_specialize=["entries"])
def quantized_up(
    x, x_scales, ids, topk_weights, codes, scales, zeros, row_scales, bias, act, entries,
    E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DIV: tl.constexpr, H: tl.constexpr,
    I: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,  # noqa: E741
    WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr, FORMAT: tl.constexpr, MODE: tl.constexpr,
    X_GROUP: tl.constexpr, X_SCALED: tl.constexpr, SHARING: tl.constexpr, TE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, TN: tl.constexpr, NG: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, ROUNDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[slot] = activation(W1[expert] @ x[row of slot]), in the dtype of `act`, for every slot,
    or for the first one of each entry and expert where slots share programs.

    Args:
        entries: runs of K slots, of which every one has its place among the columns.
        DIV: slots that share a row of x.
        ROUNDED: x was made by the launch ahead of this one.
    """
    if not ROUNDED:
        chain(PDL)
    J: tl.constexpr = 2 * I if GATED else I
    RN: tl.constexpr = BN // PARTS
    BH: tl.constexpr = RN // 2 if GATED else RN
    expert, block, slot, slot_c = _assigned(ids, entries, E, K, KP, SHARING, TE, TN, NG * PARTS)
    if expert == E:
        return
    real_c = slot_c < NO_SLOT
    row_c = tl.where(real_c, slot_c, 0) // DIV
    r = tl.arange(0, BN) % RN
    i = block * BH + r % BH
    real_n = i < I
    n = tl.where(real_n, i + r // BH * I, 0)
    if ROUNDED:  # the ids lie two launches back
        chain(PDL)
    y = product(
        codes, scales, zeros, row_scales, x, x_scales, expert, n, real_n, row_c, real_c, J, H,
        FORMAT, MODE, X_GROUP, BN, BK, TN, NG, PARTS, STAGES,
    )  # fmt: skip
    real = slot < NO_SLOT
    if X_SCALED:
        # One scale of the whole row.
        y = y * tl.load(x_scales + slot // DIV, mask=real, other=0.0)[None, :]
    if WEIGHT_ON_INPUT:
        y = y * tl.load(topk_weights + slot, mask=real, other=0.0)[None, :]
    if HAS_BIAS:
        r = tl.arange(0, RN)
        i = block * BH + r % BH
        at_bias = bias + expert.to(tl.int64) * J + i + r // BH * I
        y += tl.load(at_bias, mask=i < I, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, BH, TN)), (1, 2, 0)))
        out = activate_gated(gate, up, ACT)
    else:
        out = activate_ungated(y, ACT)
    i = block * BH + tl.arange(0, BH)
    at = act + slot.to(tl.int64)[None, :] * I + i[:, None]
    tl.store(at, out.to(act.dtype.element_ty), mask=real[None, :] & (i < I)[:, None])


@triton.jit(do_not_specialize=["entries"])
def quantized_down(
    x, x_scales, ids, codes, scales, zeros, row_scales, bias, out, entries,
    E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr,
    I: tl.constexpr, HAS_BIAS: tl.constexpr,  # noqa: E741
    FORMAT: tl.constexpr, MODE: tl.constexpr, X_GROUP: tl.constexpr, X_SCALED: tl.constexpr,
    SHARING: tl.constexpr, TE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TN: tl.constexpr, NG: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[slot] = W2[expert] @ x[slot] + bias in float32, for the slots that were written."""
    RN: tl.constexpr = BN // PARTS
    expert, block, slot, slot_c = _assigned(ids, entries, E, K, KP, SHARING, TE, TN, NG * PARTS)
    if expert == E:
        return
    real_c = slot_c < NO_SLOT
    n = block * RN + tl.arange(0, BN) % RN
    real_n = n < H
    n = tl.where(real_n, n, 0)
    chain(PDL)
    y = product(
        codes, scales, zeros, row_scales, x, x_scales, expert, n, real_n,
        tl.where(real_c, slot_c, 0), real_c, H, I,
        FORMAT, MODE, X_GROUP, BN, BK, TN, NG, PARTS, STAGES,
    )  # fmt: skip
    real = slot < NO_SLOT
    n = block * RN + tl.arange(0, RN)
    real_n = n < H
    if X_SCALED:
        y = y * tl.load(x_scales + slot, mask=real, other=0.0)[None, :]
    if HAS_BIAS:
        at_bias = bias + expert.to(tl.int64) * H + n
        y += tl.load(at_bias, mask=real_n, other=0.0).to(tl.float32)[:, None]
    at = out + slot.to(tl.int64)[None, :] * H + n[:, None]
    tl.store(at, y, mask=real[None, :] & real_n[:, None])


@triton.jit(do_not_specialize=["tokens"])
def quantized_down_sum(
    x, x_scales, ids, topk_weights, codes, scales, zeros, row_scales, bias, out, tokens,
    E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr,
    I: tl.constexpr, HAS_BIAS: tl.constexpr,  # noqa: E741
    WEIGHT_ON_INPUT: tl.constexpr, FORMAT: tl.constexpr, MODE: tl.constexpr,
    X_GROUP: tl.constexpr, X_SCALED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TN: tl.constexpr, NG: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over its slots of weight * (W2[expert] @ x[slot] + bias), in one launch.

    A program's rows are BN / KP rows of each of a token's experts, its columns the token's slots:
    of the product it keeps what lies where row and column have the same slot.
    """
    RN: tl.constexpr = BN // PARTS
    BH: tl.constexpr = RN // KP
    token = tl.program_id(0) % tokens
    block = tl.program_id(0) // tokens
    every = tl.arange(0, KP)
    chosen = tl.load(ids + token * K + every, mask=every < K, other=E)
    # Column: a slot, whose input lies where its expert's first slot is.
    slot_c = tl.arange(0, TN * NG * PARTS) // (NG * PARTS)
    expert_c = tl.load(ids + token * K + slot_c, mask=slot_c < K, other=E)
    real_c = (expert_c >= 0) & (expert_c < E)
    place_c = slot_c
    if not WEIGHT_ON_INPUT:
        same = chosen[None, :] == expert_c[:, None]
        place_c = tl.min(tl.where(same, every[None, :], slot_c[:, None]), axis=1)
    r = tl.arange(0, BN) % RN
    slot_n = r // BH
    expert = tl.load(ids + token * K + slot_n, mask=slot_n < K, other=E)
    kept = (expert >= 0) & (expert < E)
    expert = tl.where(kept, expert, 0)
    h = block * BH + r % BH
    real_n = kept & (h < H)
    h = tl.where(real_n, h, 0)
    chain(PDL)
    y = product(
        codes, scales, zeros, row_scales, x, x_scales, expert, h, real_n, token * K + place_c,
        real_c, H, I, FORMAT, MODE, X_GROUP, BN, BK, TN, NG, PARTS, STAGES,
    )  # fmt: skip
    if PARTS > 1:
        slot_n = tl.arange(0, RN) // BH
        expert = tl.load(ids + token * K + slot_n, mask=slot_n < K, other=E)
        kept = (expert >= 0) & (expert < E)
        expert = tl.where(kept, expert, 0)
        h = block * BH + tl.arange(0, RN) % BH
        real_n = kept & (h < H)
        h = tl.where(real_n, h, 0)
    y = tl.sum(tl.where(slot_n[:, None] == tl.arange(0, TN)[None, :], y, 0.0), axis=1)
    at = token * K + slot_n
    if X_SCALED:
        first = at
        if not WEIGHT_ON_INPUT:
            again = chosen[None, :] == expert[:, None]
            first = token * K + tl.min(tl.where(again, every[None, :], slot_n[:, None]), axis=1)
        y = y * tl.load(x_scales + first, mask=kept, other=0.0)
    if HAS_BIAS:
        at_bias = bias + expert.to(tl.int64) * H + h
        y += tl.load(at_bias, mask=real_n, other=0.0).to(tl.float32)
    if not WEIGHT_ON_INPUT:
        y = y * tl.load(topk_weights + at, mask=kept, other=0.0)
    y = tl.where(real_n, y, 0.0)
    total = tl.sum(tl.reshape(y, (KP, BH)), axis=0)
    column = block * BH + tl.arange(0, BH)
    tl.store(out + token.to(tl.int64) * H + column, total.to(out.dtype.element_ty), mask=column < H)


@triton.jit
def quantized_sum(
    rows, ids, topk_weights, norm, out,
    E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr, EPS: tl.constexpr, SCALE_FIRST: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over its slots, in slot order, of weight * rows[slot of the expert].

    With EPS, each row passes an RMS norm first (`moetor.kernels.norm`); BN then spans all of H.
    """
    chain(PDL)
    token = tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = h < H
    every = tl.arange(0, KP)
    chosen = tl.load(ids + token * K + every, mask=every < K, other=E)
    if EPS is not None:
        gain = tl.load(norm + h, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(ids + token * K + k)
        kept = (expert >= 0) & (expert < E)
        # A token that chose an expert twice has one row for both, unless the weight is in it.
        place = k if WEIGHT_ON_INPUT else tl.min(tl.where(chosen == expert, every, KP), axis=0)
        at = rows + (token * K + place) * H + h
        y = tl.load(at, mask=inside & kept, other=0.0)
        if EPS is not None:
            y = norm_of_row(y, gain, H, EPS, SCALE_FIRST)
        if not WEIGHT_ON_INPUT:
            y = y * tl.where(kept, tl.load(topk_weights + token * K + k), 0.0)
        total += y
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=inside)
