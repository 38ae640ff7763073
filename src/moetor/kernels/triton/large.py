"""Routed experts for many tokens on NVIDIA GPUs: slots sorted by expert on the device, two grouped
matrix products, one sum. The host learns no expert count, so a CUDA graph can hold it.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery, Weights, unquantized
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import (
    LargePlan,
    Tile,
    activation_constants,
    large_plan,
    next_power_of_2,
    tma_allowed,
)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class _TileMap(NamedTuple):
    """Slots sorted by expert, and per row tile: its expert, first sorted slot, rows (0: empty)."""

    order: Tensor
    expert: Tensor
    start: Tensor
    rows: Tensor

    @property
    def tiles(self) -> int:
        return self.rows.shape[0]


def _make_tile_map(topk_ids_TK: Tensor, config: ExpertsConfig, rows: int) -> _TileMap:
    from moetor.kernels.triton import large_kernels

    slots = topk_ids_TK.numel()
    tiles = slots // rows + config.num_experts
    order_S = topk_ids_TK.new_empty((slots,))
    maps = topk_ids_TK.new_empty((3, tiles))
    made = _TileMap(order_S, maps[0], maps[1], maps[2])
    chunk = min(4096, max(128, next_power_of_2(slots)))
    large_kernels.tile_map[(config.num_experts,)](
        topk_ids_TK,
        *made,
        slots,
        tiles,
        E=config.num_experts,
        BM=rows,
        CHUNK=chunk,
        num_warps=8 if chunk > 1024 else 4,
    )
    return made


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


def run_large(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: LargePlan,
) -> Tensor:
    """All four launches, with the tiles of `plan`, on inputs that are known to be right."""
    tokens, top_k = topk_ids_TK.shape
    out_TH = torch.empty_like(hidden_TH)
    if tokens == 0:
        return out_TH
    # Contiguous copies live until the call is over; most routers make contiguous tensors anyway.
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    act_SI = hidden_TH.new_empty((tokens * top_k, config.intermediate_size))
    slot_out_SH = hidden_TH.new_empty((tokens * top_k, config.hidden_size))
    with support.on_device_of(hidden_TH):
        made = _make_tile_map(topk_ids_TK, config, plan.up.rows)
        _launch_up(hidden_TH, topk_weights_TK, weights, config, plan.up, made, act_SI)
        _launch_down(act_SI, topk_weights_TK, weights, config, plan.down, made, slot_out_SH)
        _launch_sum(slot_out_SH, topk_ids_TK, config, out_TH)
    return out_TH


def _launch_up(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    tile: Tile,
    made: _TileMap,
    act_SI: Tensor,
) -> None:
    from moetor.kernels.triton import large_kernels

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
        act_SI,
        *made,
        made.tiles,
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
        ACT=activation_constants(config.activation),
        TMA=described is not None,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _launch_down(
    act_SI: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    tile: Tile,
    made: _TileMap,
    slot_out_SH: Tensor,
) -> None:
    from moetor.kernels.triton import large_kernels

    stride_e, stride_n, stride_k = support.output_stride(weights.down, transposed=config.transposed)
    described = _operand(
        weights.down,
        tile,
        config.intermediate_size,
        transposed=config.transposed,
        width=tile.columns,
    )
    blocks = _cdiv(config.hidden_size, tile.columns)
    large_kernels.large_down[(made.tiles * blocks,)](
        act_SI,
        topk_weights_TK,
        weights.down if described is None else described,
        support.flat(weights.down_bias, act_SI),
        slot_out_SH,
        *made,
        made.tiles,
        stride_e,
        stride_n,
        stride_k,
        H=config.hidden_size,
        I=config.intermediate_size,
        TRANSPOSED=config.transposed,
        HAS_BIAS=weights.down_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input,
        TMA=described is not None,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _launch_sum(
    slot_out_SH: Tensor, topk_ids_TK: Tensor, config: ExpertsConfig, out_TH: Tensor
) -> None:
    from moetor.kernels.triton import large_kernels

    columns = min(1024, next_power_of_2(config.hidden_size))
    large_kernels.sum_slots[(out_TH.shape[0], _cdiv(config.hidden_size, columns))](
        slot_out_SH,
        topk_ids_TK,
        out_TH,
        E=config.num_experts,
        K=topk_ids_TK.shape[1],
        H=config.hidden_size,
        BN=columns,
        num_warps=4,
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
        """Activations and outputs of a token's slots, their order, copies of a strided routing,
        and the tile map as if each token had one of its own."""
        rows = (config.intermediate_size + config.hidden_size) * dtype.itemsize
        return top_k * (rows + 16) + 12 * (config.num_experts + top_k)
