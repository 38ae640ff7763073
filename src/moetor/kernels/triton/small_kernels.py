"""Two or three launches for few tokens: no sort, no padding, every product a float32 vector sum.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate, N rows of a
weight matrix that one program owns (BN), BK its depth per step.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import activate_gated, activate_ungated, chain


@triton.jit(do_not_specialize=["slots"])
def small_up(
    hidden,
    ids,
    topk_weights,
    weight,
    bias,
    act,
    slots,
    up_offset,
    stride_e,
    stride_n,
    stride_k,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """act[slot, BN columns] = activation(W1[expert of slot] @ hidden[token of slot]), float32."""
    chain(PDL)
    # The slot runs fastest: programs that share an expert's rows run side by side, and all but the
    # first find them in the cache.
    slot = tl.program_id(0) % slots
    block = tl.program_id(0) // slots
    expert = tl.load(ids + slot)
    if (expert < 0) | (expert >= E):
        return
    # Interleaved gate and up rows are read as 2 BN neighbouring rows and told apart at the end.
    ROWS: tl.constexpr = 2 * BN if INTERLEAVED else BN
    LAST: tl.constexpr = 2 * I if INTERLEAVED else I
    n = block * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BK)
    base = weight + expert.to(tl.int64) * stride_e
    pointers = base + n.to(tl.int64)[:, None] * stride_n + k[None, :] * stride_k
    row = hidden + (slot // K).to(tl.int64) * H
    EVEN: tl.constexpr = H % BK == 0 and LAST % ROWS == 0
    TWO: tl.constexpr = GATED and not INTERLEAVED
    acc = tl.zeros((ROWS, BK), tl.float32)
    acc_up = tl.zeros((ROWS, BK), tl.float32)
    for k0 in tl.range(0, H, BK, num_stages=STAGES):
        step = k0 * stride_k
        if EVEN:
            w = tl.load(pointers + step, eviction_policy="evict_first")
            if TWO:
                v = tl.load(pointers + step + up_offset, eviction_policy="evict_first")
            x = tl.load(row + k0 + k)
        else:
            inside = (n[:, None] < LAST) & (k[None, :] < H - k0)
            w = tl.load(pointers + step, mask=inside, other=0.0)
            if TWO:
                v = tl.load(pointers + step + up_offset, mask=inside, other=0.0)
            x = tl.load(row + k0 + k, mask=k < H - k0, other=0.0)
        x32 = x.to(tl.float32)[None, :]
        acc += w.to(tl.float32) * x32
        if TWO:
            acc_up += v.to(tl.float32) * x32
    y = tl.sum(acc, axis=1)
    z = tl.sum(acc_up, axis=1)
    if WEIGHT_ON_INPUT:
        # W (w x) = w (W x): the weight is applied to the float32 sum.
        scale = tl.load(topk_weights + slot)
        y = y * scale
        z = z * scale
    if HAS_BIAS:
        # Biases [E, J] are contiguous.
        J: tl.constexpr = 2 * I if GATED else I
        at = bias + expert.to(tl.int64) * J + n
        y += tl.load(at, mask=n < LAST, other=0.0).to(tl.float32)
        if TWO:
            z += tl.load(at + I, mask=n < LAST, other=0.0).to(tl.float32)
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(y, (BN, 2)))
        out = activate_gated(gate, up, ACT)
    elif GATED:
        out = activate_gated(y, z, ACT)
    else:
        out = activate_ungated(y, ACT)
    i = block * BN + tl.arange(0, BN)
    tl.store(act + slot.to(tl.int64) * I + i, out, mask=i < I)


@triton.jit(do_not_specialize=["tokens"])
def small_down(
    act,
    ids,
    topk_weights,
    weight,
    bias,
    out,
    tokens,
    stride_e,
    stride_n,
    stride_k,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[token, BN columns] = sum over slots of weight * (W2[expert] @ act[slot]).

    All K slots stand side by side in one tile [KP, BN, BK], so that their reads overlap; the sum
    over them is one reduction, whose order depends on nothing but the tile.
    """
    token = (tl.program_id(0) % tokens).to(tl.int64)
    block = tl.program_id(0) // tokens
    slot = tl.arange(0, KP)
    expert = tl.load(ids + token * K + slot, mask=slot < K, other=E)
    kept = (expert >= 0) & (expert < E)
    expert = tl.where(kept, expert, 0).to(tl.int64)
    if WEIGHT_ON_INPUT:
        scale = tl.where(kept, 1.0, 0.0)
    else:
        scale = tl.load(topk_weights + token * K + slot, mask=kept, other=0.0)
    h = block * BN + tl.arange(0, BN)
    i = tl.arange(0, BK)
    matrix = weight + expert[:, None] * stride_e + h.to(tl.int64)[None, :] * stride_n
    pointers = matrix[:, :, None] + i[None, None, :] * stride_k
    inputs = act + (token * K + slot)[:, None, None] * I + i[None, None, :]
    inside = (kept[:, None] & (h[None, :] < H))[:, :, None]
    acc = tl.zeros((KP, BN, BK), tl.float32)
    # The first weights are on their way before the wait; the ids were there before up began.
    depth = i[None, None, :]
    w = tl.load(pointers, mask=inside & (depth < I), other=0.0, eviction_policy="evict_first")
    chain(PDL)
    x = tl.load(inputs, mask=kept[:, None, None] & (depth < I), other=0.0)
    for i0 in tl.range(BK, I, BK, num_stages=STAGES):
        if not AHEAD:
            acc += w.to(tl.float32) * x
        more = depth < I - i0
        w_next = tl.load(
            pointers + i0 * stride_k, mask=inside & more, other=0.0, eviction_policy="evict_first"
        )
        x_next = tl.load(inputs + i0, mask=kept[:, None, None] & more, other=0.0)
        if AHEAD:
            acc += w.to(tl.float32) * x
        w, x = w_next, x_next
    acc += w.to(tl.float32) * x
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        at = bias + expert[:, None] * H + h[None, :]
        y += tl.load(at, mask=kept[:, None] & (h[None, :] < H), other=0.0).to(tl.float32)
    # A dropped slot's row is 0 whatever its weight is.
    total = tl.sum(y * scale[:, None], axis=0)
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def small_down_parts(
    act,
    ids,
    weight,
    parts,
    stride_e,
    stride_n,
    stride_k,
    E: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """parts[slot, part, BN columns] = W2[expert] @ act[slot], over DEPTH of the depth.

    For weights whose output axis is the contiguous one: a program reads whole lines of BN columns,
    and the depth is shared out so that there are programs for all multiprocessors.
    """
    BLOCKS: tl.constexpr = (H + BN - 1) // BN
    pid = tl.program_id(0)
    block = pid % BLOCKS
    part = pid // BLOCKS % PARTS
    slot = (pid // (BLOCKS * PARTS)).to(tl.int64)
    expert = tl.load(ids + slot)
    kept = (expert >= 0) & (expert < E)
    expert = tl.where(kept, expert, 0).to(tl.int64)
    h = block * BN + tl.arange(0, BN)
    i = part * DEPTH + tl.arange(0, BK)
    pointers = weight + expert * stride_e + h[None, :].to(tl.int64) * stride_n
    inside = kept & (h < H)[None, :]
    acc = tl.zeros((BK, BN), tl.float32)
    for i0 in range(0, DEPTH, BK):
        here = i + i0
        mask = inside & (here < tl.minimum(part * DEPTH + DEPTH, I))[:, None]
        at = pointers + here.to(tl.int64)[:, None] * stride_k
        w = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
        if i0 == 0:
            chain(PDL)
        x = tl.load(act + slot * I + here, mask=kept & (here < I), other=0.0)
        acc += w.to(tl.float32) * x[:, None]
    total = tl.sum(acc, axis=0)
    tl.store(parts + (slot * PARTS + part) * H + h, total, mask=h < H)


@triton.jit
def small_sum(
    parts,
    ids,
    topk_weights,
    bias,
    out,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[token] = sum over slots, in slot order, of weight * (sum of the slot's parts + bias)."""
    chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = h < H
    total = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        expert = tl.load(ids + slot)
        kept = (expert >= 0) & (expert < E)
        y = tl.zeros((BN,), tl.float32)
        for part in tl.static_range(PARTS):
            y += tl.load(parts + (slot * PARTS + part) * H + h, mask=inside & kept, other=0.0)
        if HAS_BIAS:
            at = bias + expert.to(tl.int64) * H + h
            y += tl.load(at, mask=inside & kept, other=0.0).to(tl.float32)
        if not WEIGHT_ON_INPUT:
            y = y * tl.where(kept, tl.load(topk_weights + slot), 0.0)
        total += y
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=inside)
