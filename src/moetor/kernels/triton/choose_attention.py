"""Tiles of attention over a paged cache: computed from shape and device. Imports no Triton.

Shape letters: T tokens, S sequences, Hq and Hkv heads, G = Hq / Hkv, D width of queries and keys,
Dv of values.
"""

from __future__ import annotations

from dataclasses import dataclass

from moetor.kernels.triton.choose import next_power_of_2

# Largest tile of partial results that the combining launch holds, in elements.
_COMBINE = 8192
_PROGRAMS_PER_SM = 4
_FEW_PROGRAMS = 16
_SHORT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Tiles and schedule.

    Attributes:
        rows: BM, of tokens times heads.
        heads: query heads of a program, a divisor of G.
        keys: BN.
        splits: of a sequence's keys, a power of two; 1 for none.
        least: keys of a split, at least; a multiple of `keys`.
        warps, stages: of a program.
        overlap: starts while the launch before ends.
        ahead: each tile of keys is on its way, in registers, while the one before is multiplied;
            only where heads are turned.
    """

    rows: int
    heads: int
    keys: int
    splits: int
    warps: int
    stages: int
    least: int = 1
    overlap: bool = False
    ahead: bool = False


def key_columns(width: int) -> tuple[int, int]:
    """Two powers of two that hold the width: the largest one below, and what holds the rest."""
    first = 1 << (width.bit_length() - 1)
    return first, max(16, next_power_of_2(width - first))


def shared_bytes(
    width: int, value_width: int, itemsize: int, rows: int, keys: int, stages: int
) -> int:
    """Upper bound of the shared memory: the queries, and all stages of keys and values."""
    first, second = key_columns(width)
    held = first + (second if first < width else 0)
    values = next_power_of_2(value_width)
    return itemsize * (rows * held + stages * keys * (held + values))


def attention_plan(
    *,
    sequences: int,
    kv_heads: int,
    group: int,
    width: int,
    value_width: int,
    max_keys: int,
    max_query_len: int,
    itemsize: int,
    sms: int,
    shared: int,
    overlap: bool,
    turns: bool = False,
) -> AttentionPlan:
    """Tiles for one call, from upper bounds alone.

    Args:
        max_keys: the most keys that a token may see.
        shared: bytes of shared memory that one program may use.
        turns: the launch turns heads itself.
    """
    wide = max(width, value_width) * itemsize
    stages = 2
    if wide <= 256:
        most_rows, keys, warps, stages = 128, 64, 8, 3
    elif wide <= 512:
        most_rows, keys, warps = 64, 64, 8
    elif wide <= 1024:
        most_rows, keys, warps = 32, 32, 4
    else:
        most_rows, keys, warps = 16, 16, 4
    while shared_bytes(width, value_width, itemsize, most_rows, keys, stages) > shared:
        if stages > 1:
            stages -= 1
        elif keys > 16:
            keys //= 2
        elif most_rows > 16:
            most_rows //= 2
        else:
            break
    heads = group
    while next_power_of_2(heads) > most_rows:
        heads = heads // 2 if heads % 2 == 0 else 1
    rows = min(most_rows, max(16, next_power_of_2(heads * max_query_len)))
    if max_query_len > 1:
        warps = 4 if rows <= 64 and wide <= 256 else warps
        return AttentionPlan(
            rows=rows, heads=heads, keys=keys, splits=1, warps=warps, stages=stages, overlap=overlap
        )
    programs = max(1, sequences * kv_heads * (group // heads))
    if turns:
        # All programs at once, two on each multiprocessor. Few of them are bound by the time of
        # one: small tiles, each on its way while the one before is multiplied.
        few = 4 * programs < 3 * sms
        keys = (32 if few else 64) // (1 if wide <= 256 else 2)
        return AttentionPlan(
            rows=rows,
            heads=heads,
            keys=keys,
            splits=_splits(2 * sms // programs, max_keys, keys, value_width),
            least=1 if few else _SHORT,
            warps=4 if few else 8,
            stages=1 if few else 2,
            overlap=overlap,
            ahead=few,
        )
    # Four programs on each multiprocessor keep the memory busy. A single sequence has few keys a
    # program, and its time is that of one program: small tiles.
    if programs < _FEW_PROGRAMS:
        keys = min(keys, 32)
    return AttentionPlan(
        rows=rows,
        heads=heads,
        keys=keys,
        splits=_splits(_PROGRAMS_PER_SM * sms // programs, max_keys, keys, value_width),
        # With enough programs for all multiprocessors, splitting a short context costs more than
        # it hides.
        least=_SHORT if programs >= sms // 2 else 1,
        warps=4,
        stages=min(stages, 2),
        overlap=overlap,
    )


def _splits(wanted: int, max_keys: int, keys: int, value_width: int) -> int:
    """The largest power of two up to `wanted` of which each split has a tile of keys."""
    most = min(-(-max_keys // keys), _COMBINE // next_power_of_2(value_width), 64)
    splits = 1
    while 2 * splits <= min(wanted, most):
        splits *= 2
    return splits
