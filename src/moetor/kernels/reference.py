"""The oracle: routed experts written to be read, in float32 or float64. Slow, and right on any
device.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product,
S slots of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.activations import activate
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery, Weights
from moetor.kernels.dequantize import dequantize_expert, round_activations
from moetor.kernels.formats import QuantizedExpertWeights, QuantizedMatrix, format_refusal
from moetor.kernels.norm import post_expert_norm


def _quantized_product(
    x_SD: Tensor, matrix: QuantizedMatrix, expert: int, weights: QuantizedExpertWeights
) -> Tensor:
    scale = None if matrix.input_scales is None else matrix.input_scales[expert]
    rounded_SD = round_activations(x_SD, weights.activation_format, scale)
    return rounded_SD @ dequantize_expert(matrix, expert, x_SD.dtype).T


def _product(x_SD: Tensor, weight_EXY: Tensor, expert: int, *, transposed: bool) -> Tensor:
    weight = weight_EXY[expert].to(x_SD.dtype)
    return x_SD @ (weight if transposed else weight.T)


def one_expert(hidden_SH: Tensor, expert: int, weights: Weights, config: ExpertsConfig) -> Tensor:
    """Expert number `expert` on rows [S, H], in the dtype of the rows (float32 or float64); neither
    weighted nor summed.
    """
    dtype = hidden_SH.dtype
    if isinstance(weights, ExpertWeights):
        up_SJ = _product(hidden_SH, weights.gate_up, expert, transposed=config.transposed)
    else:
        up_SJ = _quantized_product(hidden_SH, weights.gate_up, expert, weights)
    if weights.gate_up_bias is not None:
        up_SJ = up_SJ + weights.gate_up_bias[expert].to(dtype)
    act_SI = activate(up_SJ, config.activation, gated=config.gated, interleaved=config.interleaved)
    if isinstance(weights, ExpertWeights):
        out_SH = _product(act_SI, weights.down, expert, transposed=config.transposed)
    else:
        out_SH = _quantized_product(act_SI, weights.down, expert, weights)
    if weights.down_bias is not None:
        out_SH = out_SH + weights.down_bias[expert].to(dtype)
    if config.post_norm_eps is not None:
        assert weights.post_norm is not None, "a form with post_norm_eps comes with its weight"
        out_SH = post_expert_norm(out_SH, weights.post_norm.to(dtype), config)
    return out_SH


class ReferenceKernel(ExpertsKernel):
    """Loops over experts and slots; every number in float32 (float64 for float64 input) until the
    last cast.
    """

    name = "reference"

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
        """See `ExpertsKernel`. With `batch_invariant` every row is multiplied by itself."""
        wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        out_TH = torch.zeros(hidden_TH.shape, dtype=wide, device=hidden_TH.device)
        for slot in range(topk_ids_TK.shape[1]):
            for expert in range(config.num_experts):
                rows = (topk_ids_TK[:, slot] == expert).nonzero().flatten()
                for chunk in rows.split(1 if batch_invariant else max(1, rows.numel())):
                    if chunk.numel() == 0:
                        continue
                    weight = topk_weights_TK[chunk, slot, None].to(wide)
                    x_SH = hidden_TH[chunk].to(wide)
                    if config.weight_on_input:
                        out_TH[chunk] += one_expert(x_SH * weight, expert, weights, config)
                    else:
                        out_TH[chunk] += one_expert(x_SH, expert, weights, config) * weight
        return out_TH.to(hidden_TH.dtype)

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """One expert's rows, at worst every token, and the sum, all in float32 or float64."""
        rows = 2 * config.up_size + 6 * config.intermediate_size + 8 * config.hidden_size
        return max(4, dtype.itemsize) * rows + 32
