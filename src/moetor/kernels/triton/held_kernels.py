"""Which of a token's experts a rank holds, and which copies it takes, in Triton.

Shape letters: T tokens, K top_k, E logical experts, P physical ones, C copies of one at most.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit(do_not_specialize=["count", "slots"])
def held_slots(
    ids,
    weights,
    table,
    slots_out,
    weights_out,
    count,
    slots,
    ids_stride,
    weights_stride,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slots_out = table[ids], and the weights of those below `slots`, else 0."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token, k = (at // K).to(tl.int64), at % K
    expert = tl.load(ids + token * ids_stride + k, mask=inside, other=P)
    expert = tl.where((expert < 0) | (expert > P), P, expert)
    slot = tl.load(table + expert)
    weight = tl.load(weights + token * weights_stride + k, mask=inside, other=0.0)
    tl.store(slots_out + at, slot, mask=inside)
    tl.store(weights_out + at, tl.where(slot < slots, weight, 0.0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def copies_in_turn(
    ids,
    copies,
    counts,
    out,
    count,
    ids_stride,
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = copies[ids, (token + k) % counts[ids]]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token, k = at // K, at % K
    expert = tl.load(ids + token.to(tl.int64) * ids_stride + k, mask=inside, other=E)
    expert = tl.where((expert < 0) | (expert > E), E, expert)
    turn = (token + k) % tl.load(counts + expert)
    tl.store(out + at, tl.load(copies + expert * C + turn), mask=inside)
