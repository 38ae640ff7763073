"""Transformers' own experts, run on the very tensors that our kernel reads.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from moetor.bench.shapes import LayerShape
from moetor.config import Activation
from moetor.errors import UnsupportedError
from moetor.kernels.base import ExpertWeights

PeerName = Literal["eager", "grouped_mm", "batched_mm"]
PEERS: tuple[str, ...] = get_args(PeerName)
# `batched_mm` copies an expert's weights for every slot; beyond this a call takes seconds.
_CPU_COPY_BYTES = 2 * 2**30


class Peer:
    """One implementation over one set of weights: `(hidden [T, H], weights [T, K], ids [T, K]) ->
    [T, H]`, in Transformers' dtypes (weights as the hidden states, ids int64)."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._module = module

    def __call__(self, hidden_TH: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor) -> Tensor:
        """The weighted sum of the routed experts."""
        out: Tensor = self._module(hidden_TH, topk_ids_TK, topk_weights_TK)
        return out


def make_peer(name: str, shape: LayerShape, weights: ExpertWeights) -> Peer:
    """Transformers' module of the shape's form, holding `weights` themselves.

    Raises:
        UnsupportedError: Transformers' modules known here do not have this form.
    """
    module = _empty_module(shape, name)
    for parameter, tensor in (
        ("gate_up_proj", weights.gate_up),
        ("down_proj", weights.down),
        ("gate_up_proj_bias", weights.gate_up_bias),
        ("down_proj_bias", weights.down_bias),
    ):
        if tensor is not None:
            setattr(module, parameter, nn.Parameter(tensor, requires_grad=False))
    return Peer(name, module.eval())


def _empty_module(shape: LayerShape, implementation: str) -> nn.Module:
    experts = shape.experts
    sizes: dict[str, Any] = {
        "hidden_size": experts.hidden_size,
        "num_experts_per_tok": shape.top_k,
        "experts_implementation": implementation,
    }
    form = (experts.gated, experts.interleaved, experts.transposed, experts.has_bias)
    activation = experts.activation
    with torch.device("meta"):
        if form == (True, False, False, False) and activation == Activation():
            from transformers import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

            qwen = Qwen3MoeConfig(
                num_experts=experts.num_experts,
                moe_intermediate_size=experts.intermediate_size,
                **sizes,
            )
            module: nn.Module = Qwen3MoeExperts(qwen)
            return module
        known = Activation(alpha=activation.alpha, limit=activation.limit, up_shift=1.0)
        if form == (True, True, True, True) and activation == known:
            from transformers import GptOssConfig
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

            gpt_oss = GptOssConfig(
                num_local_experts=experts.num_experts,
                intermediate_size=experts.intermediate_size,
                swiglu_alpha=activation.alpha,
                swiglu_limit=activation.limit,
                **sizes,
            )
            module = GptOssExperts(gpt_oss)
            return module
    raise UnsupportedError(
        f"shape {shape.name}: no Transformers module of this form is known here; measure without "
        f"peers"
    )


def refusal(
    name: str, shape: LayerShape, tokens: int, itemsize: int, device: str, free_bytes: int
) -> str | None:
    """Why a peer is left out before it is run, or None.

    Args:
        itemsize: bytes of a weight.
        free_bytes: memory that a call may take.
    """
    if name != "batched_mm":
        return None
    copied = tokens * shape.top_k * shape.experts.params_per_expert * itemsize
    limit = min(free_bytes, _CPU_COPY_BYTES) if device == "cpu" else free_bytes
    if copied <= limit:
        return None
    return (
        f"copies the weights of {tokens * shape.top_k} experts, {copied / 1e9:.1f} GB a call; "
        f"left out above {limit / 1e9:.1f} GB"
    )
