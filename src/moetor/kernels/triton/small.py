"""Routed experts for few tokens on NVIDIA GPUs: two launches, neither sorting nor padding.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery, Weights, unquantized
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import (
    SmallPlan,
    activation_constants,
    next_power_of_2,
    small_plan,
)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def run_small(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: SmallPlan,
) -> Tensor:
    """Both launches, with the tiles of `plan`, on inputs that are known to be right."""
    from moetor.kernels.triton import small_kernels  # the first import of Triton

    tokens, top_k = topk_ids_TK.shape
    out_TH = torch.empty_like(hidden_TH)
    if tokens == 0:
        return out_TH
    slots, size = tokens * top_k, config.intermediate_size
    # Contiguous copies live until the call is over; most routers make contiguous tensors anyway.
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    act_SI = hidden_TH.new_empty((slots, size), dtype=torch.float32)
    stride_e, stride_n, stride_k = support.output_stride(
        weights.gate_up, transposed=config.transposed
    )
    launch = {"launch_pdl": True} if plan.overlap else {}
    with support.on_device_of(hidden_TH):
        small_kernels.small_up[(slots * _cdiv(size, plan.up.rows),)](
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
            K=top_k,
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
            PDL=plan.overlap,
            num_warps=plan.up.warps,
        )
        stride_e, stride_n, stride_k = support.output_stride(
            weights.down, transposed=config.transposed
        )
        small_kernels.small_down[(tokens * _cdiv(config.hidden_size, plan.down.rows),)](
            act_SI,
            topk_ids_TK,
            topk_weights_TK,
            weights.down,
            support.flat(weights.down_bias, hidden_TH),
            out_TH,
            tokens,
            stride_e,
            stride_n,
            stride_k,
            E=config.num_experts,
            K=top_k,
            H=config.hidden_size,
            I=size,
            HAS_BIAS=weights.down_bias is not None,
            WEIGHT_ON_INPUT=config.weight_on_input,
            KP=next_power_of_2(top_k),
            BN=plan.down.rows,
            BK=plan.down.depth,
            STAGES=plan.down.stages,
            PDL=plan.overlap,
            num_warps=plan.down.warps,
            **launch,
        )
    return out_TH


class TritonSmallKernel(ExpertsKernel):
    """One program per slot and block of rows. A token's bits depend on nothing else in the
    batch."""

    name = "triton_small"

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
        """See `ExpertsKernel`. Always batch-invariant; gradients are not recorded."""
        plain = unquantized(weights)
        support.check_call(self.name, hidden_TH, topk_weights_TK, topk_ids_TK, plain, config)
        tokens, top_k = topk_ids_TK.shape
        plan = small_plan(config, top_k, tokens, hidden_TH.element_size())
        return run_small(hidden_TH, topk_weights_TK, topk_ids_TK, plain, config, plan)

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """The activations of a token's slots in float32, and copies of a strided routing."""
        return top_k * (4 * config.intermediate_size + 8)
