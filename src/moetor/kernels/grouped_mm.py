"""Routed experts by torch's own grouped product, `torch.nn.functional.grouped_mm`, on NVIDIA GPUs:
slots sorted by expert on the device, two grouped products, one sum. The host learns no expert
count, so a CUDA graph can hold it.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product,
R = T * K slots in expert order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import KernelRefusedError
from moetor.kernels.activations import activate
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery, Weights, unquantized
from moetor.kernels.norm import post_expert_norm
from moetor.kernels.triton.support import check_inputs

# Rows of the operands must begin at multiples of 16 bytes.
_MULTIPLE = 8


def _ends(sorted_ids_R: Tensor, num_experts: int) -> Tensor:
    """int32 [E]: where each expert's slots end."""
    experts_E = torch.arange(num_experts, device=sorted_ids_R.device, dtype=sorted_ids_R.dtype)
    return torch.searchsorted(sorted_ids_R, experts_E, right=True).to(torch.int32)


def run_grouped_mm(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
) -> Tensor:
    """The computation, without asking whether it is fast here."""
    tokens, top_k = topk_ids_TK.shape
    if tokens == 0:
        return torch.empty_like(hidden_TH)
    ids_R, order_R = topk_ids_TK.flatten().sort(stable=True)
    ends_E = _ends(ids_R, config.num_experts)
    expert_R = ids_R.clamp(max=config.num_experts - 1).long()
    x_RH = hidden_TH[order_R // top_k]
    if config.weight_on_input:
        x_RH = (x_RH * topk_weights_TK.flatten()[order_R, None]).to(hidden_TH.dtype)

    def product(x_RX: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # [E, in, out]: a view of what is stored, whichever way that is.
        by_input = weight if config.transposed else weight.transpose(1, 2)
        out_RX: Tensor = F.grouped_mm(x_RX, by_input, offs=ends_E)
        return out_RX.float() if bias is None else out_RX.float() + bias[expert_R]

    up_RJ = product(x_RH, weights.gate_up, weights.gate_up_bias)
    act_RI = activate(
        up_RJ, config.activation, gated=config.gated, interleaved=config.interleaved
    ).to(hidden_TH.dtype)
    out_RH = product(act_RI, weights.down, weights.down_bias)
    if config.post_norm_eps is not None:
        assert weights.post_norm is not None, "a form with post_norm_eps comes with its weight"
        out_RH = post_expert_norm(out_RH, weights.post_norm.float(), config)
    # The products of dropped slots are never written: what stands there is anything.
    out_RH = torch.where((ids_R == config.num_experts).unsqueeze(-1), 0.0, out_RH)
    slots_RH = torch.empty_like(out_RH)
    slots_RH[order_R] = out_RH
    slots_TKH = slots_RH.view(tokens, top_k, hidden_TH.shape[1])
    sum_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    for slot in range(top_k):
        if config.weight_on_input:
            sum_TH += slots_TKH[:, slot]
        else:
            sum_TH += slots_TKH[:, slot] * topk_weights_TK[:, slot, None]
    return sum_TH.to(hidden_TH.dtype)


class GroupedMMKernel(ExpertsKernel):
    """bfloat16 on GPUs of compute capability 9.0 and later. Only taken when it is named."""

    name = "grouped_mm"

    def refusal(self, query: KernelQuery) -> str | None:
        """Another device, dtype or format, sizes that are no multiples of 16 bytes, an older GPU,
        or batch invariance."""
        if query.device != "cuda":
            return f"runs on NVIDIA GPUs, not on {query.device}"
        if query.weight_format != "unquantized":
            return f"reads unquantised weights, not {query.weight_format}"
        if query.dtype != torch.bfloat16:
            return f"computes in bfloat16, not {str(query.dtype).removeprefix('torch.')}"
        if query.batch_invariant:
            return "does not promise that a token's bits are independent of its batch"
        sizes = (query.experts.hidden_size, query.experts.intermediate_size)
        if any(size % _MULTIPLE for size in sizes):
            return (
                f"needs hidden and intermediate sizes that are multiples of {_MULTIPLE}, not "
                f"{sizes[0]} and {sizes[1]}"
            )
        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU, and torch sees none"
        capability = torch.cuda.get_device_capability()
        if capability < (9, 0):
            return f"needs compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
        return None

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
        """See `ExpertsKernel`. Both products and the activation end in bfloat16, as torch's do.

        Raises:
            InputError: a tensor of the wrong shape, dtype or device.
            KernelRefusedError: `refusal` has the reason.
        """
        plain = unquantized(weights)
        check_inputs(hidden_TH, topk_weights_TK, topk_ids_TK, plain, config)
        query = KernelQuery(
            device=hidden_TH.device.type,
            dtype=hidden_TH.dtype,
            experts=config,
            top_k=topk_ids_TK.shape[1],
            batch_invariant=batch_invariant,
        )
        reason = self.refusal(query)
        if reason is not None:
            raise KernelRefusedError(f"kernel {self.name!r} {reason}; use kernel 'torch'")
        return run_grouped_mm(hidden_TH, topk_weights_TK, topk_ids_TK, plain, config)

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """Rows, products in both precisions and their biases, of all slots, and the sum."""
        rows = (config.hidden_size + config.intermediate_size) * dtype.itemsize
        wide = config.up_size + 3 * config.intermediate_size + 4 * config.hidden_size
        products = (config.up_size + config.hidden_size) * dtype.itemsize
        return top_k * (rows + products + 4 * wide + 48) + 8 * config.hidden_size
