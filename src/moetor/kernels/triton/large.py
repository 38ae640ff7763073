"""Routed experts for many tokens on NVIDIA GPUs: slots sorted by expert on the device, two grouped
matrix products (the first one's rows may be copied into order before), one sum. The host learns no
expert count, so a CUDA graph can hold it.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetor.config import Activation, ExpertsConfig
from moetor.kernels.activations import activate
from moetor.kernels.base import ExpertWeights
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import (
    IDENTITY,
    ActivationConstants,
    LargePlan,
    Tile,
    activation_constants,
    cdiv,
    tma_allowed,
)
from moetor.kernels.triton.gathered import can_walk, launch_copy, launch_walk_up
from moetor.kernels.triton.roles import can_have_roles, launch_down_by_roles
from moetor.kernels.triton.sort import RowTiles, make_row_tiles
from moetor.kernels.triton.weighted_sum import launch_sum


def _operand(
    weight_EXY: Tensor,
    tile: Tile,
    depth: int,
    *,
    transposed: bool,
    width: int,
    paired: int | None = None,
) -> Any:
    """A tensor descriptor over `[E * X, Y]`, or None where pointers must do.

    Args:
        paired: I, where one box is to hold `width` rows of gate and the same ones of up.
    """
    inner = weight_EXY.shape[2]
    allowed = tile.tma and tma_allowed(
        tile,
        contiguous=weight_EXY.is_contiguous(),
        address=weight_EXY.data_ptr(),
        inner=inner,
        depth=depth,
        transposed=transposed,
        itemsize=weight_EXY.element_size(),
    )
    if not allowed:
        return None
    if paired is not None:
        return support.described(weight_EXY.view(-1, paired, inner), [2, width, tile.depth])
    block = [tile.depth, width] if transposed else [width, tile.depth]
    return support.described(weight_EXY.view(-1, inner), block)


def rows_operand(act_RI: Tensor, tile: Tile) -> Any:
    """A tensor descriptor over the rows of a product's input, or None where pointers must do."""
    depth = act_RI.shape[1]
    if not tile.tma or tile.halves or depth * act_RI.element_size() % 16 or depth < tile.depth:
        return None
    return support.described(act_RI, [tile.rows, tile.depth])


def run_large(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: LargePlan,
) -> Tensor:
    """All launches, with the tiles of `plan`, on inputs that are known to be right."""
    out_TH = torch.empty_like(hidden_TH)
    if topk_ids_TK.shape[0] == 0:
        return out_TH
    # Contiguous copies live until the call is over; most routers make contiguous tensors anyway.
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    with support.on_device_of(hidden_TH):
        made = make_row_tiles(topk_ids_TK, config.num_experts, plan.up.rows, pdl=plan.pdl)
        up = (weights.gate_up, weights.gate_up_bias)
        act_RI = run_up(hidden_TH, topk_weights_TK, *up, config, plan, made)
        rows_RH = hidden_TH.new_empty((made.rows, config.hidden_size))
        launch_down(act_RI, weights.down, weights.down_bias, config, plan, made, rows_RH)
        launch_sum(rows_RH, topk_weights_TK, weights.post_norm, config, made, out_TH, pdl=plan.pdl)
    return out_TH


def run_up(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    config: ExpertsConfig,
    plan: LargePlan,
    made: RowTiles,
) -> Tensor:
    """The activations [R, I]; a Python activation runs between the two products."""
    if config.activation.function is None:
        act_RI = hidden_TH.new_empty((made.rows, config.intermediate_size))
        constants = activation_constants(config.activation)
        if plan.up.persistent and can_walk(hidden_TH, gate_up, config, plan.up):
            rows_RH = launch_copy(hidden_TH, made, plan.up, pdl=plan.pdl)
            launch_walk_up(
                rows_RH, topk_weights_TK, gate_up, bias, config, plan.up, made, act_RI, constants
            )
        else:
            launch_up(
                hidden_TH, topk_weights_TK, gate_up, bias, config, plan, made, act_RI, constants
            )
        return act_RI
    up_RJ = hidden_TH.new_empty((made.rows, config.up_size))
    plain = replace(
        config, gated=False, interleaved=False, intermediate_size=config.up_size,
        activation=Activation(),
    )  # fmt: skip
    launch_up(hidden_TH, topk_weights_TK, gate_up, bias, plain, plan, made, up_RJ, IDENTITY)
    return activate(
        up_RJ, config.activation, gated=config.gated, interleaved=config.interleaved
    ).contiguous()


def launch_up(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    config: ExpertsConfig,
    plan: LargePlan,
    made: RowTiles,
    act_RI: Tensor,
    constants: ActivationConstants,
) -> None:
    """The first product and its activation."""
    from moetor.kernels.triton import large_kernels

    tile = plan.up
    stride_e, stride_n, stride_k = support.output_stride(gate_up, transposed=config.transposed)
    # One product of twice the columns instead of two: rows are read from shared memory once.
    paired = tile.rows == 128 and config.gated and not (config.interleaved or config.transposed)
    described = _operand(
        gate_up,
        tile,
        config.hidden_size,
        transposed=config.transposed,
        width=2 * tile.columns if config.interleaved else tile.columns,
        paired=config.intermediate_size if paired else None,
    )
    blocks = cdiv(config.intermediate_size, tile.columns)
    large_kernels.large_up[(made.tiles * blocks,)](
        hidden_TH,
        topk_weights_TK,
        gate_up if described is None else described,
        support.flat(bias, hidden_TH),
        act_RI,
        made.order,
        made.expert,
        made.used,
        topk_weights_TK.numel(),
        config.intermediate_size * stride_n,
        stride_e,
        stride_n,
        stride_k,
        K=topk_weights_TK.shape[1],
        H=config.hidden_size,
        I=config.intermediate_size,
        GATED=config.gated,
        INTERLEAVED=config.interleaved,
        TRANSPOSED=config.transposed,
        HAS_BIAS=bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input,
        ACT=constants,
        TMA=described is not None,
        PAIRED=paired and described is not None,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        HALVES=tile.halves,
        PDL=plan.pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **support.chained(plan.pdl),
    )


def launch_down(
    act_RI: Tensor,
    down: Tensor,
    bias: Tensor | None,
    config: ExpertsConfig,
    plan: LargePlan,
    made: RowTiles,
    rows_RH: Tensor,
) -> None:
    """The second product, for every row of every tile."""
    from moetor.kernels.triton import large_kernels

    tile = plan.down
    formed = bias is None and not config.transposed
    if tile.roles and formed and can_have_roles(act_RI, down, tile):
        launch_down_by_roles(act_RI, down, made, tile, rows_RH, pdl=plan.pdl)
        return
    tile = tile.without_roles()
    stride_e, stride_n, stride_k = support.output_stride(down, transposed=config.transposed)
    described = _operand(
        down,
        tile,
        config.intermediate_size,
        transposed=config.transposed,
        width=tile.columns,
    )
    described_rows = rows_operand(act_RI, tile)
    programs = made.tiles * cdiv(config.hidden_size, tile.columns)
    if tile.persistent:
        programs = min(programs, tile.persistent)
    large_kernels.large_down[(programs,)](
        act_RI if described_rows is None else described_rows,
        down if described is None else described,
        support.flat(bias, act_RI),
        rows_RH,
        made.order,
        made.expert,
        made.used,
        made.place.numel(),
        stride_e,
        stride_n,
        stride_k,
        H=config.hidden_size,
        I=config.intermediate_size,
        TRANSPOSED=config.transposed,
        HAS_BIAS=bias is not None,
        TMA=described is not None,
        TMA_ROWS=described_rows is not None,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        PERSISTENT=tile.persistent > 0,
        HALVES=tile.halves,
        PDL=plan.pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **support.chained(plan.pdl),
    )
