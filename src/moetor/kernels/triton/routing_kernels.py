"""From router logits to weights and ids in one launch, one program per token.

Shape letters: T tokens, K top_k, N logits (experts and identity experts), G groups.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain, soft_cap

# Below the key of every number.
TAKEN = tl.constexpr(-(2**31))


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, with relative precision also where 1 + x rounds."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _score(x, inside, SCORING: tl.constexpr):
    """Softmax over the places `inside`; the other scores are elementwise."""
    if SCORING == "softmax":
        power = tl.where(
            inside, tl.exp(x - tl.max(tl.where(inside, x, -float("inf")), axis=0)), 0.0
        )
        y = power / tl.sum(power, axis=0)
    elif SCORING == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(SCORING == "sqrt_softplus")
        y = tl.sqrt(tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x))))
    return y


@triton.jit
def _in_order(x):
    """int32 numbers in the order of the float32 numbers `x`, above -2^31: the largest of a warp's
    integers is one instruction, where floats take ten.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # the sum turns -0 into 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _best(keys, places, END: tl.constexpr):
    """The first place of the largest key."""
    return tl.min(tl.where(keys == tl.max(keys, axis=0), places, END), axis=0)


@triton.jit
def _limit_groups(
    choice,
    inside,
    n,
    N: tl.constexpr,
    NP: tl.constexpr,
    GROUPS: tl.constexpr,
    GP: tl.constexpr,
    KEPT: tl.constexpr,
    TOP2: tl.constexpr,
    MASK_ZERO: tl.constexpr,
):
    """`choice` with the experts outside the best KEPT groups masked."""
    group = tl.arange(0, GP)
    member = (n[None, :] // (N // GROUPS) == group[:, None]) & inside[None, :]
    values = tl.where(member, choice[None, :], -float("inf"))
    best = tl.max(values, axis=1)
    if TOP2:
        place = tl.where(member & (values == best[:, None]), n[None, :], NP)
        first = tl.min(place, axis=1)
        rest = tl.where(n[None, :] == first[:, None], -float("inf"), values)
        best = best + tl.max(rest, axis=1)
    keys = tl.where(group < GROUPS, _in_order(best), TAKEN)
    for _ in tl.static_range(KEPT):
        keys = tl.where(group == _best(keys, group, GP), TAKEN, keys)
    dropped = (keys != TAKEN)[:, None] & member
    hit = tl.sum(dropped.to(tl.int32), axis=0) > 0
    return tl.where(hit, 0.0 if MASK_ZERO else -float("inf"), choice)


@triton.jit
def route_tokens(
    logits,
    bias,
    weights_out,
    ids_out,
    identity_out,
    stride_t,
    stride_n,
    N: tl.constexpr,
    NP: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCORING: tl.constexpr,
    AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    GP: tl.constexpr,
    KEPT: tl.constexpr,
    TOP2: tl.constexpr,
    MASK_ZERO: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    MIN: tl.constexpr,
    FACTOR: tl.constexpr,
    ROUND: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token's K weights and ids; the formula is that of `moetor.config.RouterConfig`.

    ROUND is the dtype that the weights are rounded to, or None. Equal scores: the smaller id wins.
    """
    chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NP)
    inside = n < N
    x = tl.load(logits + token * stride_t + n * stride_n, mask=inside, other=0.0).to(tl.float32)
    if MULTIPLIER != 1.0:
        x = x * MULTIPLIER
    if SOFTCAP is not None:
        x = soft_cap(x, SOFTCAP)
    scores = x if AFTER else _score(x, inside, SCORING)
    choice = scores
    if HAS_BIAS:
        choice = choice + tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    # A NaN is chosen first and shows in the weights, as with torch.topk.
    choice = tl.where(choice != choice, float("inf"), choice)
    if GROUPS > 1:
        choice = _limit_groups(choice, inside, n, N, NP, GROUPS, GP, KEPT, TOP2, MASK_ZERO)
    slot = tl.arange(0, KP)
    ids = tl.zeros((KP,), tl.int32)
    keys = tl.where(inside, _in_order(choice), TAKEN)
    for k in range(K):
        expert = _best(keys, n, NP)
        keys = tl.where(n == expert, TAKEN, keys)
        ids = tl.where(slot == k, expert, ids)
    kept = tl.gather(scores, ids, 0)
    real = slot < K
    weight = _score(kept, real, SCORING) if AFTER else kept
    weight = tl.where(real, weight, 0.0)
    if RENORMALIZE:
        total = tl.sum(weight, axis=0)
        if MIN > 0:
            total = tl.where(total < MIN, MIN, total)
        weight = weight / (total + EPS)
    if FACTOR != 1.0:
        weight = weight * FACTOR
    if ROUND is not None:
        weight = weight.to(ROUND).to(tl.float32)
    if E < N:
        identity = real & (ids >= E)
        tl.store(identity_out + token, tl.sum(tl.where(identity, weight, 0.0), axis=0))
        weight = tl.where(identity, 0.0, weight)
        ids = tl.where(identity, E, ids)
    tl.store(weights_out + token * K + slot, weight, mask=real)
    tl.store(ids_out + token * K + slot, ids, mask=real)
