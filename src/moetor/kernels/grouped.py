"""Routed experts in pure PyTorch: slots sorted by expert, one product per active expert. Runs on
any device.

Shape letters: T tokens, K top_k, H hidden, I intermediate, J rows of the first product, R = T * K
slots in expert order, S slots of one expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.activations import activate
from moetor.kernels.base import ExpertsKernel, KernelQuery, Weights
from moetor.kernels.dequantize import dequantize_expert, round_activations
from moetor.kernels.formats import (
    ActivationFormat,
    QuantizedExpertWeights,
    QuantizedMatrix,
    format_refusal,
)
from moetor.kernels.invariant import in_fixed_blocks
from moetor.kernels.norm import post_expert_norm


def _product(x_SX: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    return F.linear(x_SX, weight.T if transposed else weight, bias)


def _quantized_product(
    x_SD: Tensor,
    matrix: QuantizedMatrix,
    expert: int,
    bias: Tensor | None,
    activations: ActivationFormat,
) -> Tensor:
    """The product in float32 (float64 for float64 rows): a dequantised weight has more digits than
    a half-precision one.
    """
    wide_SD = x_SD if x_SD.dtype == torch.float64 else x_SD.float()
    scale = None if matrix.input_scales is None else matrix.input_scales[expert]
    rounded_SD = round_activations(wide_SD, activations, scale)
    weight_ND = dequantize_expert(matrix, expert, wide_SD.dtype)
    return F.linear(rounded_SD, weight_ND, None if bias is None else bias.to(wide_SD.dtype))


def _expert(hidden_SH: Tensor, expert: int, weights: Weights, config: ExpertsConfig) -> Tensor:
    gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias[expert]
    down_bias = None if weights.down_bias is None else weights.down_bias[expert]

    def product(x_SX: Tensor, weight: Tensor | QuantizedMatrix, bias: Tensor | None) -> Tensor:
        if isinstance(weights, QuantizedExpertWeights):
            assert isinstance(weight, QuantizedMatrix), "both products are quantised"
            return _quantized_product(x_SX, weight, expert, bias, weights.activation_format)
        assert isinstance(weight, Tensor), "neither is"
        return _product(x_SX, weight[expert], bias, transposed=config.transposed)

    up_SJ = product(hidden_SH, weights.gate_up, gate_up_bias)
    act_SI = activate(
        up_SJ if hidden_SH.dtype == torch.float64 else up_SJ.float(),
        config.activation,
        gated=config.gated,
        interleaved=config.interleaved,
    ).to(hidden_SH.dtype)
    out_SH = product(act_SI, weights.down, down_bias)
    if config.post_norm_eps is not None:
        assert weights.post_norm is not None, "a form with post_norm_eps comes with its weight"
        wide = out_SH if out_SH.dtype == torch.float64 else out_SH.float()
        out_SH = post_expert_norm(wide, weights.post_norm.to(wide.dtype), config)
    return out_SH.to(hidden_SH.dtype)


def _expert_in_fixed_blocks(
    hidden_SH: Tensor, expert: int, weights: Weights, config: ExpertsConfig
) -> Tensor:
    width = max(config.up_size, config.hidden_size)
    return in_fixed_blocks(lambda block: _expert(block, expert, weights, config), hidden_SH, width)


class GroupedKernel(ExpertsKernel):
    """One pair of products per active expert; the host reads the expert counts, so CUDA graphs
    cannot hold it.
    """

    name = "torch"

    def refusal(self, query: KernelQuery) -> str | None:
        """Only a weight format that is none is refused."""
        return format_refusal(query.weight_format)

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
        """See `ExpertsKernel`. The K contributions are added in slot order."""
        tokens, top_k = topk_ids_TK.shape
        run = _expert_in_fixed_blocks if batch_invariant else _expert
        ids_R, order_R = topk_ids_TK.flatten().sort(stable=True)
        counts = torch.bincount(ids_R, minlength=config.num_experts + 1).tolist()
        wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        out_RH = hidden_TH.new_empty((tokens * top_k, hidden_TH.shape[1]))
        start = 0
        for expert, count in enumerate(counts[: config.num_experts]):
            if count == 0:
                continue
            slots = order_R[start : start + count]
            x_SH = hidden_TH[slots // top_k]
            if config.weight_on_input:
                x_SH = (x_SH * topk_weights_TK.flatten()[slots, None]).to(hidden_TH.dtype)
            out_RH[slots] = run(x_SH, expert, weights, config)
            start += count
        out_RH[order_R[start:]] = 0
        out_TKH = out_RH.view(tokens, top_k, hidden_TH.shape[1])
        sum_TH = torch.zeros(hidden_TH.shape, dtype=wide, device=hidden_TH.device)
        for slot in range(top_k):
            if config.weight_on_input:
                sum_TH += out_TKH[:, slot]
            else:
                sum_TH += out_TKH[:, slot].to(wide) * topk_weights_TK[:, slot, None]
        return sum_TH.to(hidden_TH.dtype)

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """Outputs and places of all slots; one expert's rows, at worst every token, in both
        precisions, with the activation's temporaries. Of quantised weights one matrix at a time is
        dequantised as well, which no number of tokens divides.
        """
        size, wide = dtype.itemsize, max(4, dtype.itemsize)
        slots = top_k * (config.hidden_size * size + 32)
        rows = (config.up_size + 3 * config.hidden_size) * (size + wide)
        return slots + rows + 7 * config.intermediate_size * wide
