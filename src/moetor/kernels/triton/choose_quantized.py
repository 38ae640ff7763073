"""Tiles of the large path's products over quantised weights: computed from shape, formats, dtype
and device. Imports no Triton.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate; BM rows, BN columns and BK
depth of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moetor.config import ExpertsConfig
from moetor.kernels.formats import ActivationFormat, WeightFormat
from moetor.kernels.triton.choose import Device, Tile, fit, next_power_of_2, tile_rows
from moetor.kernels.triton.quantized_support import Arithmetic, arithmetic

# Rows of an expert from which on a workspace is the faster way, measured on an H200.
_WORKSPACE_ROWS = 192
# Of one product's numbers.
_WORKSPACE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTile:
    """Tile and schedule of one product.

    Attributes:
        tile: as for unquantised weights; `depth` counts values, not bytes.
        swap: the weight's rows are the rows of the matrix instruction.
    """

    tile: Tile
    swap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLargePlan:
    """Both products; they share `rows`. `pdl` as in `LargePlan`."""

    up: QuantizedTile
    down: QuantizedTile
    pdl: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """What a product reads.

    Attributes:
        arithmetic: how it is computed.
        kind: of the weight.
        itemsize: bytes of a value of the input as it is multiplied.
        result: of one of the result.
        gated: whether a tile has two blocks of columns.
    """

    arithmetic: Arithmetic
    kind: WeightFormat
    itemsize: int
    result: int
    gated: bool

    def shared_bytes(self, tile: Tile) -> int:
        """Upper bound of the shared memory of a program."""
        width = 2 * tile.columns if self.gated else tile.columns
        codes = width * tile.depth // (2 if self.kind.packed else 1)
        group = self.kind.group[1]
        scales = 4 * width * -(-tile.depth // group) if group else 0
        if self.kind.zero_points:
            scales *= 2
        stage = tile.rows * tile.depth * self.itemsize + codes + scales
        numbers = width * tile.depth * self.itemsize if self.arithmetic == "numbers" else 0
        loads = tile.stages * stage + numbers
        if tile.persistent:
            return loads + tile.store_bytes(self.result, described=False) + 1024
        # After the loop the same memory turns accumulators into coalesced rows.
        epilogue = tile.rows * width * 4 + tile.rows * 64
        return max(loads, epilogue) + 1024


def operands(
    kind: WeightFormat, activations: ActivationFormat, itemsize: int, *, gated: bool
) -> Operands:
    """What a product of these formats reads, where hidden states have `itemsize` bytes."""
    found, result = arithmetic(kind, activations), itemsize
    assert found is not None, "refused before"
    if found != "numbers":
        itemsize = 1
    elif activations == "mxfp8":
        itemsize = 2
    return Operands(arithmetic=found, kind=kind, itemsize=itemsize, result=result, gated=gated)


def use_workspace(
    config: ExpertsConfig,
    top_k: int,
    tokens: int,
    up: Operands,
    down: Operands,
    activations: ActivationFormat,
) -> bool:
    """Whether matrices become numbers before the products, not in them: for many rows an expert,
    and where the workspace is bounded."""
    if activations != "unquantized":
        return False
    rows = tokens * top_k / config.num_experts
    size = max(up.itemsize, down.itemsize)
    most = size * config.num_experts * config.hidden_size * config.up_size
    return rows >= _WORKSPACE_ROWS and most <= _WORKSPACE_BYTES


def quantized_large_plan(
    config: ExpertsConfig,
    top_k: int,
    tokens: int | None,
    up: Operands,
    down: Operands,
    device: Device,
) -> QuantizedLargePlan:
    """The plan; `tokens=None` gives one for any number (batch invariance)."""
    rows = 64 if tokens is None else tile_rows(config, top_k, tokens)
    if max(up.itemsize, down.itemsize) == 4:
        # Exact float32 products run on the vector units; 64 rows would spill registers.
        rows = min(rows, 32)
    few = 256 if config.intermediate_size < 1536 else 512
    many = tokens is not None and tokens * top_k >= few * config.num_experts
    sizes = (config.intermediate_size, config.hidden_size)
    return QuantizedLargePlan(
        up=_tile(up, rows, sizes, device, many=False),
        down=_tile(down, rows, sizes[::-1], device, many=many),
        pdl=device.capability[0] >= 9,
    )


def _tile(
    reads: Operands, rows: int, size: tuple[int, int], device: Device, *, many: bool
) -> QuantizedTile:
    """The tile of a product of `size` (columns, depth).

    Args:
        many: experts fill many tiles.
    """
    hopper = device.capability[0] == 9
    short = size[1] < 1536
    columns, swap, persistent = 128, False, 0
    if reads.itemsize == 4:
        columns, depth, warps, stages = 64, 32, 4, 2
    elif rows <= 32:
        # Bound by memory: two programs per multiprocessor, many bytes in flight.
        swap = hopper and reads.kind.packed and (rows == 32 or size[1] > 4096)
        wide = reads.arithmetic == "channel" or swap
        (depth, stages), warps = ((256, 3) if wide else (128, 5)), 4
    elif reads.arithmetic == "numbers":
        # Two programs share a multiprocessor: one makes numbers while the other multiplies them,
        # and with swapped sides the numbers stay in registers.
        depth, warps, stages, swap = 64, 4, 4, hopper
    elif rows == 64:
        depth, warps, stages = 128, 4, 4
    elif reads.arithmetic == "block" or (short and not reads.gated):
        # Likewise: one scales its sums, or stores its results.
        depth, warps, stages = 128, 4, 3
        persistent = 2 * device.sms if hopper and not reads.gated else 0
    else:
        columns, depth, warps, stages = (256 if hopper else 128), 128, 8, 4
        persistent = device.sms if hopper and many and not reads.gated else 0
    tile = Tile(
        rows=rows,
        columns=columns // 2 if reads.gated else columns,
        depth=depth,
        warps=warps,
        stages=stages,
        tma=hopper and reads.itemsize < 4,
        halves=rows == 128 and not persistent,
        persistent=persistent,
    )
    tile = replace(
        tile,
        columns=max(16, min(tile.columns, next_power_of_2(size[0]))),
        depth=max(32, min(tile.depth, next_power_of_2(size[1]))),
    )
    return QuantizedTile(tile=fit(tile, device, reads.shared_bytes), swap=swap)
