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
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery, Weights, unquantized
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import (
    ActivationConstants,
    LargePlan,
    Tile,
    activation_constants,
    large_plan,
    next_power_of_2,
    tile_rows,
    tma_allowed,
)
from moetor.kernels.triton.gathered import can_walk, launch_copy, launch_walk_up
from moetor.kernels.triton.sort import RowTiles, count_bytes, make_row_tiles, most_tiles

# The activation of a first product that ends without one.
_IDENTITY: ActivationConstants = ("identity", 1.0, None, False, 0.0, None, None)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _operand(weight_EXY: Tensor, tile: Tile, depth: int, *, transposed: bool, width: int) -> Any:
    """A tensor descriptor over `[E * X, Y]`, or None where pointers must do."""
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
    from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found, unused-ignore]
        TensorDescriptor,
    )

    block = [tile.depth, width] if transposed else [width, tile.depth]
    return TensorDescriptor.from_tensor(weight_EXY.view(-1, inner), block)


def _rows_operand(act_RI: Tensor, tile: Tile) -> Any:
    """A tensor descriptor over the rows of a product's input, or None where pointers must do."""
    depth = act_RI.shape[1]
    if not tile.tma or tile.halves or depth * act_RI.element_size() % 16 or depth < tile.depth:
        return None
    from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found, unused-ignore]
        TensorDescriptor,
    )

    return TensorDescriptor.from_tensor(act_RI, [tile.rows, tile.depth])


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
        act_RI = _activated(hidden_TH, topk_weights_TK, weights, config, plan, made)
        rows_RH = hidden_TH.new_empty((made.rows, config.hidden_size))
        launch_down(act_RI, weights, config, plan, made, rows_RH)
        launch_sum(rows_RH, topk_weights_TK, weights, config, plan, made, out_TH)
    return out_TH


def _activated(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: LargePlan,
    made: RowTiles,
) -> Tensor:
    """The activations [R, I]; a Python activation runs between the two products."""
    if config.activation.function is None:
        act_RI = hidden_TH.new_empty((made.rows, config.intermediate_size))
        constants = activation_constants(config.activation)
        if plan.up.persistent and can_walk(hidden_TH, weights, config, plan.up):
            rows_RH = launch_copy(hidden_TH, made, plan.up, pdl=plan.pdl)
            launch_walk_up(
                rows_RH, topk_weights_TK, weights, config, plan.up, made, act_RI, constants
            )
        else:
            launch_up(hidden_TH, topk_weights_TK, weights, config, plan, made, act_RI, constants)
        return act_RI
    up_RJ = hidden_TH.new_empty((made.rows, config.up_size))
    plain = replace(
        config, gated=False, interleaved=False, intermediate_size=config.up_size,
        activation=Activation(),
    )  # fmt: skip
    launch_up(hidden_TH, topk_weights_TK, weights, plain, plan, made, up_RJ, _IDENTITY)
    return activate(
        up_RJ, config.activation, gated=config.gated, interleaved=config.interleaved
    ).contiguous()


def launch_up(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: LargePlan,
    made: RowTiles,
    act_RI: Tensor,
    constants: ActivationConstants,
) -> None:
    """The first product and its activation."""
    from moetor.kernels.triton import large_kernels

    tile = plan.up
    stride_e, stride_n, stride_k = support.output_stride(
        weights.gate_up, transposed=config.transposed
    )
    described = _operand(
        weights.gate_up,
        tile,
        config.hidden_size,
        transposed=config.transposed,
        width=2 * tile.columns if config.interleaved else tile.columns,
    )
    blocks = _cdiv(config.intermediate_size, tile.columns)
    large_kernels.large_up[(made.tiles * blocks,)](
        hidden_TH,
        topk_weights_TK,
        weights.gate_up if described is None else described,
        support.flat(weights.gate_up_bias, hidden_TH),
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
        HAS_BIAS=weights.gate_up_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input,
        ACT=constants,
        TMA=described is not None,
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
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: LargePlan,
    made: RowTiles,
    rows_RH: Tensor,
) -> None:
    """The second product, for every row of every tile."""
    from moetor.kernels.triton import large_kernels

    tile = plan.down
    stride_e, stride_n, stride_k = support.output_stride(weights.down, transposed=config.transposed)
    described = _operand(
        weights.down,
        tile,
        config.intermediate_size,
        transposed=config.transposed,
        width=tile.columns,
    )
    described_rows = _rows_operand(act_RI, tile)
    programs = made.tiles * _cdiv(config.hidden_size, tile.columns)
    if tile.persistent:
        programs = min(programs, tile.persistent)
    large_kernels.large_down[(programs,)](
        act_RI if described_rows is None else described_rows,
        weights.down if described is None else described,
        support.flat(weights.down_bias, act_RI),
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
        HAS_BIAS=weights.down_bias is not None,
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


def launch_sum(
    rows_RH: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: LargePlan,
    made: RowTiles,
    out_TH: Tensor,
) -> None:
    """The weighted sum over a token's slots, after the norm of each expert's output if there is
    one."""
    from moetor.kernels.triton import large_kernels

    columns = next_power_of_2(config.hidden_size)
    if config.post_norm_eps is None:
        columns = min(1024, columns)
    large_kernels.sum_rows[(out_TH.shape[0], _cdiv(config.hidden_size, columns))](
        rows_RH,
        made.place,
        topk_weights_TK,
        support.flat(weights.post_norm, rows_RH),
        out_TH,
        K=topk_weights_TK.shape[1],
        H=config.hidden_size,
        WEIGHT_ON_INPUT=config.weight_on_input,
        EPS=None if config.post_norm_eps is None else float(config.post_norm_eps),
        SCALE_FIRST=config.post_norm_order == "scale_first",
        BN=columns,
        PDL=plan.pdl,
        num_warps=4 if columns <= 2048 else 8,
        **support.chained(plan.pdl),
    )


class TritonLargeKernel(ExpertsKernel):
    """Grouped products over tiles of one expert's rows; each slot's output is rounded once to the
    model's dtype, weighted, before the float32 sum."""

    name = "triton_large"

    def refusal(self, query: KernelQuery) -> str | None:
        """No NVIDIA GPU, no Triton, or a dtype or form that the kernels do not have."""
        return support.refusal(query)

    def __call__(
        self,
        hidden_TH: Tensor,
        topk_weights_TK: Tensor,
        topk_ids_TK: Tensor,
        weights: Weights,
        config: ExpertsConfig,
        *,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See `ExpertsKernel`. With `batch_invariant` one plan serves every number of tokens;
        gradients are not recorded."""
        plain = unquantized(weights)
        support.check_call(self.name, hidden_TH, topk_weights_TK, topk_ids_TK, plain, config)
        tokens, top_k = topk_ids_TK.shape
        plan = large_plan(
            config,
            top_k,
            None if batch_invariant else tokens,
            hidden_TH.element_size(),
            support.device_of(hidden_TH),
        )
        return run_large(hidden_TH, topk_weights_TK, topk_ids_TK, plain, config, plan)

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """That of one token, whose slots begin a tile each, and its part of what many tokens are
        counted by."""
        counts = top_k * next_power_of_2(config.num_experts + 1) // 16
        return top_k * (65 * _row_bytes(config, dtype) + 24) + counts

    def tokens_within(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype, budget: int
    ) -> int:
        """See `ExpertsKernel`: many tokens pad their tiles much less than one does."""
        most = 1
        while _workspace_bytes(config, top_k, dtype, 2 * most) <= budget:
            most *= 2
        step = most // 2
        while step:
            if _workspace_bytes(config, top_k, dtype, most + step) <= budget:
                most += step
            step //= 2
        return most


def _workspace_bytes(config: ExpertsConfig, top_k: int, dtype: torch.dtype, tokens: int) -> int:
    """Upper bound of a call's temporary memory: rows of both products, their maps, a strided
    routing's copies. A batch-invariant call has tiles of 64 rows whatever T is."""
    slots = tokens * top_k
    rows = 0
    for height in {64, tile_rows(config, top_k, tokens)}:
        rows = max(rows, height * most_tiles(slots, config.num_experts, height))
    counts = count_bytes(slots, config.num_experts)
    return rows * _row_bytes(config, dtype) + 24 * slots + counts


def _row_bytes(config: ExpertsConfig, dtype: torch.dtype) -> int:
    """Of a row's input, activations, output and slot number."""
    widths = 2 * config.hidden_size + config.intermediate_size
    if config.activation.function is not None:
        widths += 2 * config.up_size
    return widths * dtype.itemsize + 4
