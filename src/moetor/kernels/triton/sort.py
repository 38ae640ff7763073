"""Slots sorted by expert into row tiles: what the large path's products walk over.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, R rows (tiles * BM).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moetor.kernels.triton import support
from moetor.kernels.triton.choose import next_power_of_2

_CHUNK = 128  # slots ranked at once: a [128, 128] comparison is 128 registers a thread
_DIRECT = 1024  # up to here every program counts and ranks all slots for itself


class RowTiles(NamedTuple):
    """All int32, all on the device; the host knows upper bounds alone.

    Attributes:
        order: [R] slot of each row; S in padding rows, undefined beyond the tiles in use.
        place: [T, K] row of each slot, -1 for a dropped one.
        expert: [tiles] expert of each tile in use.
        used: [1] number of tiles in use.
    """

    order: Tensor
    place: Tensor
    expert: Tensor
    used: Tensor

    @property
    def tiles(self) -> int:
        """Upper bound of the tiles."""
        return self.expert.shape[0]

    @property
    def rows(self) -> int:
        """R."""
        return self.order.shape[0]


def most_tiles(slots: int, num_experts: int, rows: int) -> int:
    """Upper bound of the tiles of `rows` rows that `slots` slots fill: a full share each, and one
    begun tile per expert."""
    return slots // rows + min(num_experts, slots)


def _aligned(numbers: int) -> int:
    """int32 numbers that fill whole 16 bytes, at least as many as asked."""
    return -(-numbers // 4) * 4


def count_bytes(slots: int, num_experts: int) -> int:
    """Bytes of the counts that many slots are placed by."""
    if slots <= _DIRECT:
        return 0
    return 4 * next_power_of_2(num_experts + 1) * (-(-slots // _CHUNK) + 1)


def make_row_tiles(topk_ids_TK: Tensor, num_experts: int, rows: int, *, pdl: bool) -> RowTiles:
    """Sorts contiguous int32 ids; ids outside [0, num_experts) are dropped slots.

    Args:
        rows: BM, a power of two.
        pdl: launched with programmatic dependent launch.
    """
    from moetor.kernels.triton import sort_kernels

    slots = topk_ids_TK.numel()
    tiles = most_tiles(slots, num_experts, rows)
    # Each part begins at a multiple of 16 bytes whatever T is: Triton compiles a kernel again for
    # a pointer that is aligned otherwise.
    parts = (tiles * rows, _aligned(slots), _aligned(tiles), _aligned(1))
    order, place, expert, used = topk_ids_TK.new_empty((sum(parts),)).split(parts)
    made = RowTiles(order, place[:slots].view(topk_ids_TK.shape), expert[:tiles], used[:1])
    sizes = {"E": num_experts, "EP": next_power_of_2(num_experts + 1), "PDL": pdl, "num_warps": 4}
    if slots <= _DIRECT:
        sort_kernels.place_few_slots[(num_experts,)](
            topk_ids_TK,
            *made,
            slots,
            SP=max(32, next_power_of_2(slots)),
            BM=rows,
            **sizes,
            **support.chained(pdl),
        )
        return made
    blocks, padded = -(-slots // _CHUNK), sizes["EP"]
    counts = topk_ids_TK.new_empty((blocks + 1, padded))
    totals = counts[blocks]
    sort_kernels.count_slots[(blocks,)](
        topk_ids_TK, counts, slots, CHUNK=_CHUNK, **sizes, **support.chained(pdl)
    )
    columns = min(16, padded)
    sort_kernels.scan_counts[(padded // columns,)](
        counts, totals, blocks, EP=padded, BE=columns, ROWS=256, PDL=pdl, num_warps=8,
        **support.chained(pdl),
    )  # fmt: skip
    sort_kernels.place_slots[(max(blocks, num_experts),)](
        topk_ids_TK,
        counts,
        totals,
        *made,
        slots,
        blocks,
        BM=rows,
        CHUNK=_CHUNK,
        **sizes,
        **support.chained(pdl),
    )
    return made
