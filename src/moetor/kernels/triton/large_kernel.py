"""The path for many tokens as a kernel of its own: unquantised and quantised weights.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertsKernel, KernelQuery, Weights
from moetor.kernels.formats import QuantizedExpertWeights
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import large_plan, next_power_of_2, tile_rows
from moetor.kernels.triton.large import run_large
from moetor.kernels.triton.large_quantized import run_planned
from moetor.kernels.triton.quantized_support import check_quantized_call, quantized_refusal
from moetor.kernels.triton.sort import count_bytes, most_tiles

_ENDS = 48  # bytes: parts of the sort's memory end at multiples of 16


class TritonLargeKernel(ExpertsKernel):
    """Grouped products over tiles of one expert's rows; each slot's output is rounded once to the
    model's dtype, weighted, before the float32 sum."""

    name = "triton_large"

    def refusal(self, query: KernelQuery) -> str | None:
        """No NVIDIA GPU, no Triton, or a dtype, form or format that the kernels do not have."""
        if query.weight_format != "unquantized":
            return quantized_refusal(query)
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
        inputs = (hidden_TH, topk_weights_TK, topk_ids_TK)
        if isinstance(weights, QuantizedExpertWeights):
            check_quantized_call(self.name, *inputs, weights, config)
            return run_planned(*inputs, weights, config, batch_invariant=batch_invariant)
        support.check_call(self.name, *inputs, weights, config)
        tokens, top_k = topk_ids_TK.shape
        plan = large_plan(
            config,
            top_k,
            None if batch_invariant else tokens,
            hidden_TH.element_size(),
            support.device_of(hidden_TH),
        )
        return run_large(*inputs, weights, config, plan)

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """That of one token, whose slots begin a tile each, and its part of what many tokens are
        counted by."""
        counts = top_k * next_power_of_2(config.num_experts + 1) // 16
        return top_k * (65 * _row_bytes(config, dtype) + 24) + counts + _ENDS

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
    return rows * _row_bytes(config, dtype) + 24 * slots + counts + _ENDS


def _row_bytes(config: ExpertsConfig, dtype: torch.dtype) -> int:
    """Of a row's input, activations, output and slot number."""
    widths = 2 * config.hidden_size + config.intermediate_size
    if config.activation.function is not None:
        widths += 2 * config.up_size
    return widths * dtype.itemsize + 4
