"""Routed experts on NVIDIA GPUs: the small or the large path, by the number of tokens, with the
tiles that `moetor tune` measured on this GPU or else with computed ones.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.base import (
    ExpertsKernel,
    ExpertWeights,
    KernelQuery,
    Weights,
)
from moetor.kernels.formats import QuantizedExpertWeights
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import SmallPlan, next_power_of_2, use_small
from moetor.kernels.triton.choose_small_quantized import use_small_quantized
from moetor.kernels.triton.large import run_large
from moetor.kernels.triton.large_kernel import TritonLargeKernel
from moetor.kernels.triton.small import TritonSmallKernel, run_small
from moetor.kernels.triton.tuned import Plan, plans_of, tuned_plan


def run_plan(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
    plan: Plan,
) -> Tensor:
    """The path of `plan`, with its tiles, on inputs that are known to be right."""
    if isinstance(plan, SmallPlan):
        return run_small(hidden_TH, topk_weights_TK, topk_ids_TK, weights, config, plan)
    return run_large(hidden_TH, topk_weights_TK, topk_ids_TK, weights, config, plan)


class TritonKernel(ExpertsKernel):
    """Decides on the host by the shape alone, so that a captured graph holds one of the two."""

    name = "triton"

    def __init__(self) -> None:
        self._small = TritonSmallKernel()
        self._large = TritonLargeKernel()

    def refusal(self, query: KernelQuery) -> str | None:
        """No NVIDIA GPU, no Triton, or a dtype, form or format that the kernels do not have."""
        return self._large.refusal(query)

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
        """See `ExpertsKernel`. With `batch_invariant` the large path takes every call, with one
        computed plan; gradients are not recorded."""
        call = (hidden_TH, topk_weights_TK, topk_ids_TK, weights, config)
        if isinstance(weights, QuantizedExpertWeights):
            few = (
                not batch_invariant
                and hidden_TH.dim() == 2
                and use_small_quantized(
                    config,
                    hidden_TH.shape[0],
                    (weights.gate_up.format, weights.down.format),
                    weights.activation_format,
                )
            )
            return (self._small if few else self._large)(*call, batch_invariant=batch_invariant)
        if not batch_invariant:
            plan = self._tuned(hidden_TH, topk_ids_TK, config)
            if plan is not None:
                plain = (hidden_TH, topk_weights_TK, topk_ids_TK, weights, config)
                support.check_call(self.name, *plain)
                return run_plan(*plain, plan)
        small = (
            not batch_invariant
            and hidden_TH.dim() == topk_ids_TK.dim() == 2
            and use_small(
                config, topk_ids_TK.shape[1], hidden_TH.shape[0], hidden_TH.element_size()
            )
        )
        return (self._small if small else self._large)(*call, batch_invariant=batch_invariant)

    @staticmethod
    def _tuned(hidden_TH: Tensor, topk_ids_TK: Tensor, config: ExpertsConfig) -> Plan | None:
        """The measured plan for this call, or None."""
        if not (hidden_TH.is_cuda and hidden_TH.dim() == topk_ids_TK.dim() == 2):
            return None
        if not support.have_triton():
            return None  # refused in a moment, with the reason
        tokens, top_k = topk_ids_TK.shape
        if tokens == 0:
            return None
        size = hidden_TH.element_size()
        return tuned_plan(config, top_k, next_power_of_2(tokens), size, hidden_TH.get_device())

    def note(self, query: KernelQuery) -> str | None:
        """For how many tokens plans are tuned on the current GPU."""
        if query.weight_format != "unquantized" or query.batch_invariant:
            return None
        if self.refusal(query) is not None:
            return None
        plans = plans_of(torch.cuda.current_device())
        tokens = plans.tokens(query.experts, query.top_k, query.dtype.itemsize)
        if not tokens:
            return None
        return f"tuned on this GPU for up to {', '.join(map(str, tokens))} tokens"

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """The larger of the two paths'."""
        return max(
            self._small.workspace_bytes_per_token(config, top_k, dtype),
            self._large.workspace_bytes_per_token(config, top_k, dtype),
        )

    def tokens_within(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype, budget: int
    ) -> int:
        """See `ExpertsKernel`; the large path, which takes all but a few tokens, needs more."""
        return self._large.tokens_within(config, top_k, dtype, budget)
