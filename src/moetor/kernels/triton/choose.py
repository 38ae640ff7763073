"""Which kernel, and which tiles: computed from shape, dtype and device. Imports no Triton.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moetor.config import Activation, ExpertsConfig

# Reading an expert once more costs its bytes over the memory's bandwidth; the large path costs
# two more launches and a scatter. About 6 us at 4 TB/s: the small path may waste this much.
_WASTE_BYTES = 24 * 2**20
# Above this many tokens a program per slot does more arithmetic than the vector units have room
# for while the weights stream by.
_SMALL_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a choice needs to know of a GPU.

    Attributes:
        sms: multiprocessors.
        shared: bytes of shared memory that one program may use.
        capability: compute capability.
    """

    sms: int
    shared: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Tile and schedule of one matrix product.

    Attributes:
        rows: BM (large path).
        columns: BN; a gated first product has BN gate and BN up columns.
        depth: BK.
        group: row tiles that walk the columns together.
        tma: the weight is read through a tensor descriptor.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = False

    def shared_bytes(self, *, width: int, itemsize: int) -> int:
        """Upper bound of the shared memory: all stages of both operands, and the barriers.

        Args:
            width: columns held at once, `2 * columns` for a gated first product.
        """
        loads = self.stages * (self.rows + width) * self.depth * itemsize
        # After the loop the same memory turns accumulators into coalesced rows.
        epilogue = self.rows * width * 4 + self.rows * 64
        return max(loads, epilogue) + 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorTile:
    """Tile of one vector product of the small path: BN rows of the weight, BK of its depth."""

    rows: int
    depth: int
    warps: int
    stages: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallPlan:
    """Both launches of the small path; `overlap` starts the second before the first has ended
    (programmatic dependent launch, compute capability 9.0)."""

    up: VectorTile
    down: VectorTile
    overlap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LargePlan:
    """Both products of the large path; they share `rows`."""

    up: Tile
    down: Tile


ActivationConstants = tuple[str, float, float | None, bool, float, float | None, float | None]


def activation_constants(activation: Activation) -> ActivationConstants:
    """The activation as the kernels read it: name, alpha, limit, limit after, shift, softcap of
    the gate, softcap of up."""

    def real(value: float | None) -> float | None:
        return None if value is None else float(value)

    return (
        activation.name,
        float(activation.alpha),
        real(activation.limit),
        activation.limit_place == "after",
        float(activation.up_shift),
        real(activation.softcap),
        real(activation.softcap if activation.up_softcap is None else activation.up_softcap),
    )


def next_power_of_2(value: float) -> int:
    """The smallest power of two that is not below `value`, at least 1."""
    power = 1
    while power < value:
        power *= 2
    return power


def active_experts(num_experts: int, slots: int) -> float:
    """How many experts `slots` slots meet on average, if each is equally likely."""
    return float(num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** slots))


def use_small(config: ExpertsConfig, top_k: int, tokens: int, itemsize: int) -> bool:
    """Whether the small path is expected to be the faster one."""
    if tokens <= 1:
        return True
    if tokens > _SMALL_TOKENS:
        return False
    # A token's own slots are distinct, other tokens' may meet the same experts.
    distinct = config.num_experts * (1.0 - (1.0 - top_k / config.num_experts) ** tokens)
    wasted = max(0.0, tokens * top_k - distinct) * config.params_per_expert * itemsize
    return wasted <= _WASTE_BYTES


def small_plan(config: ExpertsConfig, top_k: int, tokens: int, itemsize: int) -> SmallPlan:
    """Tiles of the small path. They do not depend on `tokens`, so neither do a token's bits."""
    wide = 16 // itemsize * 32  # elements that a warp reads at once, 16 bytes a thread
    if config.transposed:
        # The output axis is the contiguous one: long rows, little depth.
        columns = min(64, max(16, next_power_of_2(config.intermediate_size)))
        slots = next_power_of_2(top_k)
        up = VectorTile(rows=columns, depth=64, warps=4)
        room = max(1, 4096 // (slots * columns))
        down = VectorTile(rows=columns, depth=min(64, max(4, room)), warps=4)
        if slots * down.rows * down.depth > 8192:
            down = replace(down, rows=max(1, 8192 // (slots * down.depth)))
        return SmallPlan(up=up, down=down)
    depth = min(2 * wide, max(16, next_power_of_2(config.hidden_size)))
    halves = 2 if config.gated else 1
    up = VectorTile(rows=8 // halves, depth=depth, warps=4)
    slots = next_power_of_2(top_k)
    depth = min(2 * wide, max(16, next_power_of_2(config.intermediate_size)))
    while depth > wide and config.intermediate_size % depth:
        depth //= 2
    room = 4096 // (slots * depth)
    rows = min(8, max(1, room))
    while slots * rows * depth > 8192 and depth > 16:
        depth //= 2
    return SmallPlan(up=up, down=VectorTile(rows=rows, depth=depth, warps=4))


def _fit(tile: Tile, device: Device, *, halves: int, itemsize: int) -> Tile:
    """`tile` made smaller until it fits: stages first, then depth, then columns."""

    def too_large(candidate: Tile) -> bool:
        width = halves * candidate.columns
        return candidate.shared_bytes(width=width, itemsize=itemsize) > device.shared

    while too_large(tile) and tile.stages > 3:
        tile = replace(tile, stages=tile.stages - 1)
    while too_large(tile) and tile.depth > 32:
        tile = replace(tile, depth=tile.depth // 2)
    while too_large(tile) and tile.columns > 32:
        tile = replace(tile, columns=tile.columns // 2)
    while too_large(tile) and tile.stages > 1:
        tile = replace(tile, stages=tile.stages - 1)
    while too_large(tile):
        tile = replace(tile, depth=tile.depth // 2)
    return tile


def _at_most(tile: Tile, columns: int, depth: int) -> Tile:
    """No wider or deeper than the matrix itself, and not below what a tensor core takes."""
    return replace(
        tile,
        columns=max(16, min(tile.columns, next_power_of_2(columns))),
        depth=max(16, min(tile.depth, next_power_of_2(depth))),
    )


def tile_rows(config: ExpertsConfig, top_k: int, tokens: int) -> int:
    """BM: what holds most experts' rows in one tile, from 16 to 128."""
    slots = tokens * top_k
    mean = slots / max(1.0, active_experts(config.num_experts, slots))
    return min(128, max(16, next_power_of_2(1.25 * mean)))


def large_plan(
    config: ExpertsConfig, top_k: int, tokens: int | None, itemsize: int, device: Device
) -> LargePlan:
    """Tiles of the large path; `tokens=None` gives one plan for any number (batch invariance)."""
    rows = 64 if tokens is None else tile_rows(config, top_k, tokens)
    halves = 2 if config.gated else 1
    if itemsize == 4:
        # Exact float32 products run on the vector units; 64 rows would spill registers.
        rows = min(rows, 32)
        up = Tile(rows=rows, columns=64 // halves, depth=32, warps=4, stages=2)
        down = Tile(rows=rows, columns=64, depth=32, warps=4, stages=2)
    elif rows <= 32:
        # Bound by memory: two or more programs per multiprocessor, many bytes in flight.
        up = Tile(rows=rows, columns=64 // halves, depth=128, warps=4, stages=4)
        down = Tile(rows=rows, columns=64, depth=128, warps=4, stages=4)
    elif rows == 64:
        up = Tile(rows=rows, columns=128 // halves, depth=64, warps=4, stages=4)
        down = Tile(rows=rows, columns=128, depth=64, warps=4, stages=4)
    else:
        # 64 accumulators a thread and operand: the second operand's tile is 256 wide.
        up = Tile(rows=rows, columns=256 // halves, depth=64, warps=8, stages=4)
        down = Tile(rows=rows, columns=256, depth=64, warps=8, stages=4)
        if device.capability[0] != 9:
            # Without warpgroup products the operands pass through registers.
            up = replace(up, columns=128 // halves, stages=3)
            down = replace(down, columns=128, stages=3)
    up = _at_most(up, config.intermediate_size, config.hidden_size)
    down = _at_most(down, config.hidden_size, config.intermediate_size)
    tma = device.capability[0] == 9 and itemsize == 2 and rows == 128
    return LargePlan(
        up=replace(_fit(up, device, halves=halves, itemsize=itemsize), tma=tma),
        down=replace(_fit(down, device, halves=1, itemsize=itemsize), tma=tma),
    )


def tma_allowed(
    tile: Tile,
    *,
    contiguous: bool,
    address: int,
    inner: int,
    depth: int,
    transposed: bool,
    itemsize: int,
) -> bool:
    """Whether a tensor descriptor can describe a weight: alignment of 16 bytes throughout.

    Args:
        inner: elements of a stored row.
        depth: of the product.

    Transposed storage also needs a depth that the tile divides: rows past an expert's end are its
    neighbour's, and 0 * inf is not 0.
    """
    aligned = contiguous and address % 16 == 0 and inner * itemsize % 16 == 0
    return aligned and (not transposed or depth % tile.depth == 0)
