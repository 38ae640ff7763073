"""Drawing a token from the likeliest ones, without sorting the vocabulary.

A threshold is searched for instead: among the bits of a float32, as whole numbers in the same
order, three at a time, until two neighbours are left.

Shape letters: R rows, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit
def _key(x):
    """A whole number for each float32, in their order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    """The float32 of a whole number."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _above(row, a, b, c, V: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many elements lie above each of three numbers (COUNT), or their weights' sums."""
    first = 0.0
    second = 0.0
    third = 0.0
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=-float("inf"))
        key = _key(x)
        # What lies past the end is above nothing: all three are at least that of -inf.
        part = tl.full((BLOCK,), 1.0, tl.float32) if COUNT else tl.exp(x)
        first += tl.sum(tl.where(key > a, part, 0.0), axis=0)
        second += tl.sum(tl.where(key > b, part, 0.0), axis=0)
        third += tl.sum(tl.where(key > c, part, 0.0), axis=0)
    return first, second, third


@triton.jit
def _search(row, lowest, limit, V: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest number from `lowest` on above which there is less than `limit`, and how much is
    above it. It is `lowest`, or that of an element. Above 0, the largest element, there is none.
    """
    bottom = lowest.to(tl.int64) - 1
    top = tl.zeros_like(bottom)
    above = 0.0
    while top - bottom > 1:
        step = tl.maximum((top - bottom) // 4, 1)
        a = bottom + step
        b = tl.minimum(a + step, top)
        c = tl.minimum(b + step, top)
        first, second, third = _above(
            row, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), V, COUNT, BLOCK
        )
        if first < limit:
            top = a
            above = first
        elif second < limit:
            bottom = a
            top = b
            above = second
        elif third < limit:
            bottom = b
            top = c
            above = third
        else:
            bottom = c
    return top.to(tl.int32), above


@triton.jit
def draw(
    logits,
    top_ks,
    top_ps,
    min_ps,
    places,
    tokens,
    stride_r,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's token. Its logits are divided by the temperature, and the largest is 0.

    Kept are the `top_k` likeliest, of these the likeliest whose probabilities before them sum up to
    less than `top_p`, and of these what is at least `min_p` times as likely as the likeliest; of
    equal ones the first. The token is the first at whose end the kept weights, in the order of the
    vocabulary, exceed `place` times their sum.
    """
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride_r
    top_k = tl.load(top_ks + r)
    top_p = tl.load(top_ps + r)
    min_p = tl.load(min_ps + r)
    bound = top_k * 0 - 2139095041  # that of -inf: everything
    ties = V + 0.0
    if top_k < V:
        bound, above = _search(row, bound, top_k.to(tl.float32), V, True, BLOCK)
        ties = top_k - above
    mass, _, _ = _above(row, bound, bound, bound, V, False, BLOCK)
    if top_p < 1.0:
        limit = top_p * (mass + ties * tl.exp(_value(bound)))
        old = bound
        bound, mass = _search(row, bound, limit, V, False, BLOCK)
        room = tl.ceil((limit - mass) / tl.exp(_value(bound)))
        ties = tl.where(bound == old, tl.minimum(ties, room), room)
        ties = tl.maximum(ties, 1.0)
    place = tl.load(places + r)
    kept = 0.0
    for turn in tl.static_range(2):  # the sum, then the place in it
        total = 0.0
        seen = 0.0
        found = V
        last = 0
        for v0 in range(0, V, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            x = tl.load(row + v, mask=v < V, other=-float("inf"))
            key = _key(x)
            tied = tl.where((key == bound) & (v < V), 1.0, 0.0)
            before = seen + tl.cumsum(tied, axis=0) - tied
            weight = tl.exp(x)
            stays = (key > bound) | ((tied > 0) & (before < ties))
            weight = tl.where(stays & (weight >= min_p), weight, 0.0)
            if turn == 1:
                ends = total + tl.cumsum(weight, axis=0)
                here = (weight > 0) & (ends > place * kept)
                found = tl.minimum(found, tl.min(tl.where(here, v, V), axis=0))
                last = tl.maximum(last, tl.max(tl.where(weight > 0, v, 0), axis=0))
            total += tl.sum(weight, axis=0)
            seen += tl.sum(tied, axis=0)
        kept = total
    # Rounding may leave the place beyond the last end.
    tl.store(tokens + r, tl.where(found < V, found, last).to(tl.int64))
