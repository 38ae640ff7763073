"""Routed experts for few tokens on NVIDIA GPUs: no launch sorts or pads.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import KernelRefusedError
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery, Weights
from moetor.kernels.formats import QuantizedExpertWeights
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import (
    MOST_PARTS,
    SmallPlan,
    activation_constants,
    cdiv,
    next_power_of_2,
    small_form,
    small_plan,
)
from moetor.kernels.triton.choose_small_quantized import quantized_form
from moetor.kernels.triton.quantized_support import check_quantized_call, quantized_refusal
from moetor.kernels.triton.small_quantized import plan_small_quantized, run_small_quantized


def run_small(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: SmallPlan,
) -> Tensor:
    """All launches, with the tiles of `plan`, on inputs that are known to be right."""

    out_TH = torch.empty_like(hidden_TH)
    if topk_ids_TK.shape[0] == 0:
        return out_TH
    # Contiguous copies live until the call is over; most routers make contiguous tensors anyway.
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    slots = topk_ids_TK.numel()
    act_SI = hidden_TH.new_empty((slots, config.intermediate_size), dtype=torch.float32)
    with support.on_device_of(hidden_TH):
        _launch_up(hidden_TH, topk_weights_TK, topk_ids_TK, weights, config, plan, act_SI)
        launch_down = _launch_down_parts if plan.parts else _launch_down
        launch_down(act_SI, topk_weights_TK, topk_ids_TK, weights, config, plan, out_TH)
    return out_TH


def _launch_up(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: SmallPlan,
    act_SI: Tensor,
) -> None:
    from moetor.kernels.triton import small_kernels  # the first import of Triton

    slots, size = act_SI.shape
    stride_e, stride_n, stride_k = support.output_stride(
        weights.gate_up, transposed=config.transposed
    )
    small_kernels.small_up[(slots * cdiv(size, plan.up.rows),)](
        hidden_TH,
        topk_ids_TK,
        topk_weights_TK,
        weights.gate_up,
        support.flat(weights.gate_up_bias, hidden_TH),
        act_SI,
        slots,
        size * stride_n,
        stride_e,
        stride_n,
        stride_k,
        E=config.num_experts,
        K=topk_ids_TK.shape[1],
        H=config.hidden_size,
        I=size,
        GATED=config.gated,
        INTERLEAVED=config.interleaved,
        HAS_BIAS=weights.gate_up_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input,
        ACT=activation_constants(config.activation),
        BN=plan.up.rows,
        BK=plan.up.depth,
        STAGES=plan.up.stages,
        PDL=plan.pdl,
        num_warps=plan.up.warps,
        **support.chained(plan.pdl),
    )


def _launch_down(
    act_SI: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: SmallPlan,
    out_TH: Tensor,
) -> None:
    from moetor.kernels.triton import small_kernels

    (tokens, top_k), tile = topk_ids_TK.shape, plan.down
    stride_e, stride_n, stride_k = support.output_stride(weights.down, transposed=config.transposed)
    small_kernels.small_down[(tokens * cdiv(config.hidden_size, tile.rows),)](
        act_SI,
        topk_ids_TK,
        topk_weights_TK,
        weights.down,
        support.flat(weights.down_bias, out_TH),
        out_TH,
        tokens,
        stride_e,
        stride_n,
        stride_k,
        E=config.num_experts,
        K=top_k,
        H=config.hidden_size,
        I=config.intermediate_size,
        HAS_BIAS=weights.down_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input,
        KP=next_power_of_2(top_k),
        BN=tile.rows,
        BK=tile.depth,
        STAGES=tile.stages,
        AHEAD=tile.ahead,
        PDL=plan.pdl,
        num_warps=tile.warps,
        **support.chained(plan.pdl),
    )


def _launch_down_parts(
    act_SI: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: SmallPlan,
    out_TH: Tensor,
) -> None:
    from moetor.kernels.triton import small_kernels

    (tokens, top_k), tile, hidden = topk_ids_TK.shape, plan.down, config.hidden_size
    parts = act_SI.new_empty((tokens * top_k, plan.parts, hidden))
    stride_e, stride_n, stride_k = support.output_stride(weights.down, transposed=config.transposed)
    small_kernels.small_down_parts[(tokens * top_k * plan.parts * cdiv(hidden, tile.rows),)](
        act_SI,
        topk_ids_TK,
        weights.down,
        parts,
        stride_e,
        stride_n,
        stride_k,
        E=config.num_experts,
        H=hidden,
        I=config.intermediate_size,
        PARTS=plan.parts,
        DEPTH=cdiv(config.intermediate_size, plan.parts),
        BN=tile.rows,
        BK=tile.depth,
        PDL=plan.pdl,
        num_warps=tile.warps,
        **support.chained(plan.pdl),
    )
    columns = min(256, next_power_of_2(hidden))
    small_kernels.small_sum[(tokens, cdiv(hidden, columns))](
        parts,
        topk_ids_TK,
        topk_weights_TK,
        support.flat(weights.down_bias, out_TH),
        out_TH,
        E=config.num_experts,
        K=top_k,
        H=hidden,
        HAS_BIAS=weights.down_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input,
        PARTS=plan.parts,
        BN=columns,
        PDL=plan.pdl,
        num_warps=4,
        **support.chained(plan.pdl),
    )


class TritonSmallKernel(ExpertsKernel):
    """One program per slot and block of rows. A token's bits depend on nothing else in the
    batch."""

    name = "triton_small"

    def refusal(self, query: KernelQuery) -> str | None:
        """No NVIDIA GPU, no Triton, or a dtype, form or format that the kernels do not have."""
        if query.weight_format != "unquantized":
            return quantized_refusal(query) or quantized_form(query.experts)
        return support.refusal(query) or small_form(query.experts)

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
        """See `ExpertsKernel`. Unquantised weights: always batch-invariant. Gradients are not
        recorded."""
        inputs = (hidden_TH, topk_weights_TK, topk_ids_TK)
        if isinstance(weights, QuantizedExpertWeights):
            check_quantized_call(self.name, *inputs, weights, config)
            self._refuse(quantized_form(config))
            if batch_invariant:
                self._refuse("sums quantised weights in an order that depends on the batch")
            quantized = plan_small_quantized(*inputs, weights, config)
            return run_small_quantized(*inputs, weights, config, quantized)
        support.check_call(self.name, *inputs, weights, config)
        self._refuse(small_form(config))
        device = support.device_of(hidden_TH)
        slots, top_k = topk_ids_TK.numel(), topk_ids_TK.shape[1]
        plan = small_plan(config, top_k, hidden_TH.element_size(), device)
        down = slots * plan.parts if plan.parts else slots // top_k
        programs = max(
            slots * cdiv(config.intermediate_size, plan.up.rows),
            down * cdiv(config.hidden_size, plan.down.rows),
        )
        support.check_programs(self.name, programs, "triton_large")
        return run_small(*inputs, weights, config, plan)

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            raise KernelRefusedError(f"kernel {self.name!r} {reason}; use kernel 'triton'")

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """The activations and outputs of a token's slots in float32, and copies of a strided
        routing. Of quantised weights, rounded inputs of both products as well."""
        parts = MOST_PARTS * config.hidden_size if config.transposed else 2 * config.hidden_size
        return top_k * (4 * (2 * config.intermediate_size + parts) + 8)
