"""Which kernel, and which tiles: computed from shape, dtype and device. Imports no Triton.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moetor.config import Activation, ExpertsConfig

# Reading an expert once more costs up to its bytes over the memory's bandwidth; the large path
# costs two more launches, a scatter and empty rows. Measured on an H200: worth this many bytes.
_WASTE_BYTES = 70 * 2**20
# Above this many tokens a program per slot does more arithmetic than the vector units have room
# for while the weights stream by.
_SMALL_TOKENS = 8
# Programs that share the depth of a product of transposed weights, at most.
MOST_PARTS = 8
# Rows of a group of warps that multiply, and columns that it stores at once.
ROLE_ROWS = 64
# Rows, columns and depth of a tile for warps with roles.
ROLE_TILE = (2 * ROLE_ROWS, 256, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a choice needs to know of a GPU.

    Attributes:
        sms: multiprocessors.
        shared: bytes of shared memory that one program may use.
        capability: compute capability.
        roles: whether warps with roles can be compiled for it (`roles.py`).
    """

    sms: int
    shared: int
    capability: tuple[int, int]
    roles: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Tile and schedule of one matrix product.

    Attributes:
        rows: BM (large path).
        columns: BN; a gated first product has BN gate and BN up columns.
        depth: BK.
        group: row tiles that walk the columns together.
        tma: the weight (and the rows of a second product) are read through tensor descriptors.
        persistent: programs that walk over all tiles; 0 for one a tile. A first product walks over
            rows that were copied into expert order before, where storage and GPU allow it.
        halves: tiles whose upper half is padding compute their lower half alone.
        roles: one warp loads and the others multiply, in programs that walk over tiles, where
            storage allows it; elsewhere the rest of the tile describes programs of one tile.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = False
    persistent: int = 0
    halves: bool = False
    roles: bool = False

    def shared_bytes(self, *, width: int, itemsize: int, first: bool) -> int:
        """Upper bound of the shared memory: all stages of both operands, and the barriers.

        Args:
            width: columns held at once, `2 * columns` for a gated first product.
            first: whether it is the first product, which stores through a descriptor when programs
                walk.
        """
        loads = self.stages * (self.rows + width) * self.depth * itemsize
        if self.roles:
            return loads + 2 * self.rows * ROLE_ROWS * itemsize + 1024
        if self.persistent:
            return loads + self.store_bytes(itemsize, described=first) + 1024
        # After the loop the same memory turns accumulators into coalesced rows.
        epilogue = self.rows * width * 4 + self.rows * 64
        return max(loads, epilogue) + 1024

    def store_bytes(self, itemsize: int, *, described: bool) -> int:
        """Upper bound of what a program that walks over tiles needs to store one, while the next
        one's operands arrive.

        Args:
            itemsize: bytes of a value of the result.
            described: through a tensor descriptor; otherwise a tile in half precision is brought
                into rows in two halves.
        """
        tile = self.rows * self.columns * itemsize
        return tile if described or itemsize > 2 else tile // 2

    def without_roles(self) -> Tile:
        """The same product by programs of one tile."""
        return replace(self, roles=False, persistent=0) if self.roles else self


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorTile:
    """Tile of one vector product of the small path: BN rows of the weight, BK of its depth.

    Attributes:
        ahead: each step's operands are asked for before the step before is added (second product).
    """

    rows: int
    depth: int
    warps: int
    stages: int = 1
    ahead: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallPlan:
    """Tiles of both products of the small path.

    Attributes:
        parts: programs that share the depth of the second product, which a third launch adds up;
            0: one program has all of it, and all slots of a token.
        pdl: a launch starts before the one ahead of it has ended (programmatic dependent launch,
            compute capability 9.0 and later).
    """

    up: VectorTile
    down: VectorTile
    parts: int = 0
    pdl: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LargePlan:
    """Both products of the large path; they share `rows`. `pdl` as in `SmallPlan`."""

    up: Tile
    down: Tile
    pdl: bool = False


ActivationConstants = tuple[str, float, float | None, bool, float, float | None, float | None]

IDENTITY: ActivationConstants = ("identity", 1.0, None, False, 0.0, None, None)
"""The activation of a first product that ends without one."""


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


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(value: float) -> int:
    """The smallest power of two that is not below `value`, at least 1."""
    power = 1
    while power < value:
        power *= 2
    return power


def active_experts(num_experts: int, slots: int) -> float:
    """How many experts `slots` slots meet on average, if each is equally likely."""
    return float(num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** slots))


def small_form(config: ExpertsConfig) -> str | None:
    """Why the small path does not have this form, as half a sentence."""
    if config.post_norm_eps is not None:
        return "does not have the norm of each expert's output"
    if config.activation.function is not None:
        return f"cannot call a Python activation ({config.activation.label})"
    return None


def use_small(config: ExpertsConfig, top_k: int, tokens: int, itemsize: int) -> bool:
    """Whether the small path has the form and is expected to be the faster one."""
    if small_form(config) is not None:
        return False
    if tokens <= 2:
        return True
    if tokens > _SMALL_TOKENS or config.transposed:
        return False
    # A token's own slots are distinct, other tokens' may meet the same experts.
    distinct = config.num_experts * (1.0 - (1.0 - top_k / config.num_experts) ** tokens)
    wasted = max(0.0, tokens * top_k - distinct) * config.params_per_expert * itemsize
    return wasted <= _WASTE_BYTES


def small_plan(config: ExpertsConfig, top_k: int, itemsize: int, device: Device) -> SmallPlan:
    """Tiles of the small path; they do not depend on the number of tokens, so neither do a token's
    bits."""
    pdl = device.capability[0] >= 9
    if config.transposed:
        return _small_plan_transposed(config, top_k, device, pdl)
    wide = 512 // itemsize  # elements that a warp reads at once, 16 bytes a thread
    # Whole rows by one warp where they are short: 64 to 128 products a thread and step.
    short = config.hidden_size < 4096
    depth = min((8 if short else 4) * wide, max(16, next_power_of_2(config.hidden_size)))
    while depth > wide and config.hidden_size % depth:
        depth //= 2
    up = VectorTile(rows=1 if short else 2, depth=depth, warps=1 if short else 2)
    # All slots of a token side by side: 16 to 32 elements a thread and step.
    slots = next_power_of_2(top_k)
    depth = min(max(16, 1024 // slots), max(16, next_power_of_2(config.intermediate_size)))
    few = config.intermediate_size < 1536
    rows, warps = (2, 2) if few else (8, 4)
    while slots * rows * depth > 8192 and rows > 1:
        rows //= 2
    # Few steps are a matter of latency. Longer ones keep the memory busy by more programs, for
    # which the registers of a second step are wanted.
    down = VectorTile(rows=rows, depth=depth, warps=warps, ahead=few)
    return SmallPlan(up=up, down=down, pdl=pdl)


def _small_plan_transposed(
    config: ExpertsConfig, top_k: int, device: Device, pdl: bool
) -> SmallPlan:
    """The output axis is the contiguous one: whole lines of it, and the depth shared out."""
    columns = 32 if config.interleaved else 64
    up = VectorTile(
        rows=min(columns, max(16, next_power_of_2(config.intermediate_size))),
        depth=4096 // columns,
        warps=4,
    )
    columns = min(128, max(16, next_power_of_2(config.hidden_size)))
    programs = -(-config.hidden_size // columns) * top_k
    parts = min(MOST_PARTS, max(1, round(2.7 * device.sms / programs)))
    down = VectorTile(rows=columns, depth=64, warps=4)
    return SmallPlan(up=up, down=down, parts=parts, pdl=pdl)


def fit(tile: Tile, device: Device, shared_bytes: Callable[[Tile], int]) -> Tile:
    """`tile` made smaller until it fits: stages first, then depth, then columns."""

    def too_large(candidate: Tile) -> bool:
        return shared_bytes(candidate) > device.shared

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
    if itemsize == 4:
        # Exact float32 products run on the vector units; 64 rows would spill registers.
        rows = min(rows, 32)
    halves = 2 if config.gated else 1
    hopper = device.capability[0] == 9

    def tile(depth: int) -> Tile:
        if itemsize == 4:
            return Tile(rows=rows, columns=64, depth=32, warps=4, stages=2)
        if rows <= 32:
            # Bound by memory: two programs per multiprocessor, many bytes in flight.
            if depth % 128 == 0:
                return Tile(rows=rows, columns=128, depth=128, warps=4, stages=3)
            return Tile(rows=rows, columns=128, depth=64, warps=4, stages=5)
        if rows == 64:
            return Tile(rows=rows, columns=128, depth=64, warps=4, stages=4, tma=hopper)
        if hopper:
            # 64 accumulators a thread and operand: the second operand's tile is 256 wide.
            return Tile(rows=rows, columns=256, depth=64, warps=8, stages=4, tma=True)
        # Without warpgroup products the operands pass through registers.
        return Tile(rows=rows, columns=128, depth=64, warps=8, stages=3)

    up = tile(config.hidden_size)
    up = _at_most(
        replace(up, columns=up.columns // halves), config.intermediate_size, config.hidden_size
    )
    down = tile(config.intermediate_size)
    down = _at_most(down, config.hidden_size, config.intermediate_size)
    if rows == 128:
        up, down = replace(up, halves=True), replace(down, halves=True)
        mean = 0.0 if tokens is None else tokens * top_k / config.num_experts
        if device.capability[0] == 9:
            up, down = _scheduled(config, up, down, mean, itemsize, device)
    return LargePlan(
        up=fit(
            up,
            device,
            lambda tile: tile.shared_bytes(
                width=halves * tile.columns, itemsize=itemsize, first=True
            ),
        ),
        down=fit(
            down,
            device,
            lambda tile: tile.shared_bytes(width=tile.columns, itemsize=itemsize, first=False),
        ),
        pdl=device.capability[0] >= 9,
    )


def _scheduled(
    config: ExpertsConfig, up: Tile, down: Tile, mean: float, itemsize: int, device: Device
) -> tuple[Tile, Tile]:
    """Tiles of 128 rows for compute capability 9.0 with programs that walk over them, and with
    roles, where that is faster: for `mean` rows an expert."""
    short = config.intermediate_size < 1536
    if short and mean >= 128 and _can_have_roles(config, down, itemsize, device):
        down = replace(down, persistent=device.sms, roles=True)
    # Where an expert fills less than two tiles, its last one is a large part of the work.
    elif mean >= 256 and (short or mean < 512):
        # Programs that walk over tiles load the next one's operands under the last one's store.
        # A short depth or few tiles make that store a large part: two programs a multiprocessor.
        columns, programs = min(128, down.columns), 2 * device.sms
        down = replace(down, columns=columns, warps=4, stages=3, persistent=programs, halves=False)
    elif mean >= 256:
        down = replace(down, persistent=device.sms, halves=False)
    # The first product walks over rows copied before: worth it where H + I are written and read
    # once for many products.
    apart = config.gated and config.transposed and not config.interleaved
    if mean >= 512 and not short and not apart:
        up = replace(up, halves=False, persistent=device.sms)
    return up, down


def _can_have_roles(config: ExpertsConfig, down: Tile, itemsize: int, device: Device) -> bool:
    """Whether warps with roles have this second product."""
    form = not (config.transposed or config.has_bias)
    size = (down.rows, down.columns, down.depth) == ROLE_TILE
    return device.roles and form and size and itemsize == 2


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
