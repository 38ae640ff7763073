"""Slots sorted by expert into row tiles, on the device: one launch, or three for many slots.

Each expert's rows start at a tile of their own, so that a tile has one expert and no kernel needs a
row count: a padding row carries the slot number S.

Shape letters: S slots, E experts; BM rows of a tile; CHUNK slots that are ranked at once.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain


@triton.jit
def _experts_of(ids, s, slots, E: tl.constexpr):
    """The experts of the slots `s`; E for dropped slots and past the end."""
    found = tl.load(ids + s, mask=s < slots, other=E)
    return tl.where((found < 0) | (found > E), E, found)


@triton.jit(do_not_specialize=["slots"])
def count_slots(
    ids, counts, slots, E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr
):
    """counts[block, expert] over the CHUNK slots of a block."""
    chain(PDL)
    s = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    here = tl.histogram(_experts_of(ids, s, slots, E), EP)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), here)


@triton.jit(do_not_specialize=["blocks"])
def scan_counts(
    counts,
    totals,
    blocks,
    EP: tl.constexpr,
    BE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts[block, expert] becomes the slots of earlier blocks; totals[expert] of all blocks."""
    chain(PDL)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    total = tl.zeros((BE,), tl.int32)
    b = 0
    while b < blocks:
        rows = b + tl.arange(0, ROWS)
        at = counts + rows[:, None] * EP + e[None, :]
        inside = (rows < blocks)[:, None] & (e < EP)[None, :]
        here = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(here, axis=0) - here, mask=inside)
        total += tl.sum(here, axis=0)
        b += ROWS
    tl.store(totals + e, total, mask=e < EP)


@triton.jit
def _describe_tiles(order, tile_expert, expert, start, count, slots, BM: tl.constexpr):
    """The tiles from number `start` on are those of an expert with `count` slots: padding rows, and
    whose they are."""
    number = (count + BM - 1) // BM
    pad = count + tl.arange(0, BM)
    tl.store(order + start * BM + pad, tl.zeros_like(pad) + slots, mask=pad < number * BM)
    t = tl.arange(0, 128)
    while number > 0:
        tl.store(tile_expert + start + t, tl.zeros_like(t) + expert, mask=t < number)
        start += 128
        number -= 128


@triton.jit(do_not_specialize=["slots"])
def place_few_slots(
    ids,
    order,
    place,
    tile_expert,
    used,
    slots,
    E: tl.constexpr,
    EP: tl.constexpr,
    SP: tl.constexpr,
    BM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p counts all slots, at most SP, and places those of expert p in token order."""
    chain(PDL)
    expert = tl.program_id(0)
    s = tl.arange(0, SP)
    e = tl.arange(0, EP)
    found = _experts_of(ids, s, slots, E)
    total = tl.where(e < E, tl.histogram(found, EP), 0)
    tiles = (total + BM - 1) // BM
    start = tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    mine = (found == expert).to(tl.int32)
    at = start * BM + tl.cumsum(mine, axis=0) - 1
    tl.store(order + at, s, mask=mine > 0)
    tl.store(place + s, at, mask=mine > 0)
    _describe_tiles(order, tile_expert, expert, start, tl.sum(mine, axis=0), slots, BM)
    if expert == 0:
        tl.store(used, tl.sum(tiles, axis=0))
        tl.store(place + s, tl.zeros_like(s) - 1, mask=(found == E) & (s < slots))


@triton.jit(do_not_specialize=["slots", "blocks"])
def place_slots(
    ids,
    counts,
    totals,
    order,
    place,
    tile_expert,
    used,
    slots,
    blocks,
    E: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p places the slots of block p in token order, and describes the tiles of expert p, by
    what `scan_counts` has counted."""
    chain(PDL)
    pid = tl.program_id(0)
    e = tl.arange(0, EP)
    lane = tl.arange(0, CHUNK)
    total = tl.where(e < E, tl.load(totals + e), 0)
    before = tl.load(counts + pid * EP + e, mask=(pid < blocks) & (e < EP), other=0)
    tiles = (total + BM - 1) // BM
    first = tl.cumsum(tiles, axis=0) - tiles
    if pid < blocks:
        s = pid * CHUNK + lane
        found = _experts_of(ids, s, slots, E)
        same = (found[:, None] == found[None, :]) & (lane[None, :] < lane[:, None])
        at = tl.gather(first * BM + before, found, 0) + tl.sum(same.to(tl.int32), axis=1)
        kept = found < E
        tl.store(order + at, s, mask=kept)
        tl.store(place + s, tl.where(kept, at, -1), mask=s < slots)
    if pid < E:
        mine = e == pid
        count = tl.sum(tl.where(mine, total, 0), axis=0)
        start = tl.sum(tl.where(mine, first, 0), axis=0)
        _describe_tiles(order, tile_expert, pid, start, count, slots, BM)
    if pid == 0:
        tl.store(used, tl.sum(tiles, axis=0))
