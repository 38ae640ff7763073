"""Drawing a token from the likeliest ones, without sorting the vocabulary.

A threshold is searched for instead: among the bits of a float32, as whole numbers in the same
order, three at a time, until one element is left. One program reads a whole row in every turn, so
sums are kept apart by lane and added once a turn.

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
def _mass(row, bound, V: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the weights above a number."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=-float("inf"))
        sums += tl.where(_key(x) > bound, tl.exp(x), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _above(row, bottom, top, a, b, c, V: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many elements lie above each of three numbers (COUNT), or their weights' sums; and the
    least and the largest element in (bottom, top].
    """
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    third = tl.zeros((BLOCK,), tl.float32)
    least = tl.full((BLOCK,), 2147483647, tl.int32)
    most = tl.full((BLOCK,), -2147483648, tl.int32)
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=-float("inf"))
        key = _key(x)
        # What lies past the end is above nothing: all three are at least that of -inf.
        part = tl.full((BLOCK,), 1.0, tl.float32) if COUNT else tl.exp(x)
        first += tl.where(key > a, part, 0.0)
        second += tl.where(key > b, part, 0.0)
        third += tl.where(key > c, part, 0.0)
        inside = (key > bottom) & (key <= top) & (v < V)
        least = tl.minimum(least, tl.where(inside, key, 2147483647))
        most = tl.maximum(most, tl.where(inside, key, -2147483648))
    sums = (tl.sum(first, axis=0), tl.sum(second, axis=0), tl.sum(third, axis=0))
    return sums[0], sums[1], sums[2], tl.min(least, axis=0), tl.max(most, axis=0)


@triton.jit
def _kept(row, bound, min_p, V: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the weights above a number that are at least `min_p`, and how many equal it."""
    sums = tl.zeros((BLOCK,), tl.float32)
    equal = tl.zeros((BLOCK,), tl.float32)
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=-float("inf"))
        key = _key(x)
        weight = tl.exp(x)
        sums += tl.where((key > bound) & (weight >= min_p), weight, 0.0)
        equal += tl.where((key == bound) & (v < V), 1.0, 0.0)
    return tl.sum(sums, axis=0), tl.sum(equal, axis=0)


@triton.jit
def _split(bottom, top):
    """Three numbers in (bottom, top], rising, the first of them below `top`. Logits are spread
    evenly over their values, not over their bits; those far below 0 hardly matter.
    """
    zero = bottom.to(tl.float32) * 0.0
    far = _key(zero - 64.0)
    quarter = (top - bottom) // 4
    a = bottom + quarter
    b = a + quarter
    c = b + quarter
    if bottom >= far:
        low = _value(bottom)
        step = (_value(top) - low) * 0.25
        a = _key(low + step)
        b = _key(low + 2.0 * step)
        c = _key(low + 3.0 * step)
    elif top > far:
        a = far
        b = _key(zero - 16.0)
        c = _key(zero - 4.0)
    a = tl.minimum(tl.maximum(a, bottom + 1), top - 1)
    b = tl.minimum(tl.maximum(b, a), top)
    return a, b, tl.minimum(tl.maximum(c, b), top)


@triton.jit
def _search(row, lowest, limit, V: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest number from `lowest` on above which there is less than `limit`, and how much is
    above it. It is `lowest`, or that of an element. Above 0, the largest element, there is none.
    """
    bottom = lowest - 1
    top = lowest * 0
    above = 0.0
    while top - bottom > 1:
        a, b, c = _split(bottom, top)
        first, second, third, least, most = _above(row, bottom, top, a, b, c, V, COUNT, BLOCK)
        if least >= most:  # one element, or, where `lowest` is none, nothing
            top = tl.where(least == most, least, lowest)
            bottom = top - 1
        elif first < limit:
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
    return top, above


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
    mass = _mass(row, bound, V, BLOCK)
    if top_p < 1.0:
        limit = top_p * (mass + ties * tl.exp(_value(bound)))
        old = bound
        bound, mass = _search(row, bound, limit, V, False, BLOCK)
        room = tl.ceil((limit - mass) / tl.exp(_value(bound)))
        ties = tl.where(bound == old, tl.minimum(ties, room), room)
        ties = tl.maximum(ties, 1.0)
    kept, equal = _kept(row, bound, min_p, V, BLOCK)
    tie = tl.exp(_value(bound))
    kept += tl.where(tie >= min_p, tl.minimum(ties, equal) * tie, 0.0)
    target = tl.load(places + r) * kept
    total = 0.0
    seen = 0.0
    found = V
    last = 0
    v0 = 0
    while (v0 < V) & (found == V):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=-float("inf"))
        key = _key(x)
        tied = tl.where((key == bound) & (v < V), 1.0, 0.0)
        some = tl.sum(tied, axis=0)
        stays = key > bound
        if some > 0:
            stays = stays | ((tied > 0) & (seen + tl.cumsum(tied, axis=0) - tied < ties))
        weight = tl.exp(x)
        weight = tl.where(stays & (weight >= min_p), weight, 0.0)
        block = tl.sum(weight, axis=0)
        if total + block > target:
            here = (weight > 0) & (total + tl.cumsum(weight, axis=0) > target)
            found = tl.min(tl.where(here, v, V), axis=0)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, v, 0), axis=0))
        total += block
        seen += some
        v0 += BLOCK
    # Rounding may leave the place beyond the last end.
    tl.store(tokens + r, tl.where(found < V, found, last).to(tl.int64))
