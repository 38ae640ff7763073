"""The first product over rows that were copied into expert order before: for many tokens on GPUs
that read and write tiles of memory by themselves (compute capability 9.0).

A product that gathers its rows saves the copy, but its threads fetch them, and a program cannot
fetch for its next tile what it has not looked up. Copied rows come through tensor descriptors, and
one program walks over many tiles without a pause between them.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, R rows in expert order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import (
    ActivationConstants,
    Tile,
    cdiv,
    next_power_of_2,
    tma_allowed,
)
from moetor.kernels.triton.sort import RowTiles


def can_walk(hidden_TH: Tensor, gate_up_EXY: Tensor, config: ExpertsConfig, tile: Tile) -> bool:
    """Whether all three operands of the first product can be described, in this form of storage."""
    size = hidden_TH.element_size()
    if config.gated and config.transposed and not config.interleaved:
        return False  # gate and up columns of one tile lie apart in each row
    return (
        min(config.hidden_size, config.intermediate_size) >= tile.depth
        and config.hidden_size * size % 16 == 0
        and config.intermediate_size * size % 16 == 0
        and tma_allowed(
            tile,
            contiguous=gate_up_EXY.is_contiguous(),
            address=gate_up_EXY.data_ptr(),
            inner=gate_up_EXY.shape[2],
            depth=config.hidden_size,
            transposed=config.transposed,
            itemsize=size,
        )
    )


def launch_copy(hidden_TH: Tensor, made: RowTiles, tile: Tile, *, pdl: bool) -> Tensor:
    """Each slot's token in the slot's row [R, H]; rows beyond the tiles in use are undefined."""
    from moetor.kernels.triton import gathered_kernels

    (tokens, hidden), top_k = hidden_TH.shape, made.place.shape[1]
    rows_RH = hidden_TH.new_empty((made.rows, hidden))
    columns = min(2048, next_power_of_2(hidden))
    grid = (tokens + made.tiles, cdiv(hidden, columns))
    gathered_kernels.copy_rows[grid](
        hidden_TH,
        made.order,
        made.place,
        made.used,
        rows_RH,
        tokens,
        made.place.numel(),
        K=top_k,
        H=hidden,
        BM=tile.rows,
        BN=columns,
        PDL=pdl,
        num_warps=4,
        **support.chained(pdl),
    )
    return rows_RH


def launch_walk_up(
    rows_RH: Tensor,
    topk_weights_TK: Tensor,
    gate_up_EXY: Tensor,
    bias: Tensor | None,
    config: ExpertsConfig,
    tile: Tile,
    made: RowTiles,
    act_RI: Tensor,
    constants: ActivationConstants,
) -> None:
    """The first product and its activation, where `can_walk`."""
    from moetor.kernels.triton import gathered_kernels

    tiles = made.tiles * cdiv(config.intermediate_size, tile.columns)
    gathered_kernels.walk_up[(min(tiles, tile.persistent),)](
        support.described(rows_RH, [tile.rows, tile.depth]),
        _weight(gate_up_EXY, config, tile),
        support.flat(bias, rows_RH),
        topk_weights_TK,
        support.described(act_RI, [tile.rows, tile.columns]),
        made.order,
        made.expert,
        made.used,
        made.place.numel(),
        H=config.hidden_size,
        I=config.intermediate_size,
        GATED=config.gated,
        INTERLEAVED=config.interleaved,
        TRANSPOSED=config.transposed,
        HAS_BIAS=bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input,
        ACT=constants,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _weight(gate_up_EXY: Tensor, config: ExpertsConfig, tile: Tile) -> Any:
    """The first product's weights, so that one box holds a tile's gate and up columns."""
    width = 2 * tile.columns if config.gated else tile.columns
    if config.transposed:
        flat = gate_up_EXY.view(-1, gate_up_EXY.shape[2])
        return support.described(flat, [tile.depth, width])
    if config.gated and not config.interleaved:
        size = config.intermediate_size
        split = gate_up_EXY.view(-1, size, config.hidden_size)
        return support.described(split, [2, tile.columns, tile.depth])
    return support.described(gate_up_EXY, [1, width, tile.depth])
