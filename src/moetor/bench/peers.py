"""Other implementations, run on the very tensors that our kernel reads: Transformers' own experts
here, the rest in `moetor.bench.gpu_peers`; `moetor.bench.llama_cpp` has weights in its own formats.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from moetor.bench.gpu_peers import DensePeer, VllmPeer, dense_refusal, vllm_refusal
from moetor.bench.shapes import LayerShape
from moetor.config import Activation
from moetor.errors import UnsupportedError
from moetor.kernels.base import ExpertWeights

PeerName = Literal["eager", "grouped_mm", "batched_mm", "vllm", "dense", "llama.cpp"]
PEERS: tuple[str, ...] = get_args(PeerName)
LIBRARIES = dict.fromkeys(PEERS, "transformers") | {
    "vllm": "vllm",
    "dense": "torch",
    "llama.cpp": "llama_cpp_python",
}
# `batched_mm` copies an expert's weights for every slot; beyond this a call takes seconds, on a GPU
# tens of milliseconds.
_CPU_COPY_BYTES, _CUDA_COPY_BYTES = 2 * 2**30, 16 * 2**30

PeerCall = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(hidden [T, H], weights [T, K] float32, ids [T, K] int32) -> [T, H]`."""


class TransformersPeer:
    """One of Transformers' implementations over one set of weights.

    Its routers answer with weights in the hidden states' dtype and int64 ids; both are converted
    once for each routing, outside of what is timed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._converted: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, hidden_TH: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor) -> Tensor:
        """The weighted sum of the routed experts."""
        key = id(topk_ids_TK)
        if key not in self._converted:
            # The tensor is kept with its copies: its id must stay its own.
            weights = topk_weights_TK.to(hidden_TH.dtype)
            self._converted[key] = (topk_ids_TK, topk_ids_TK.long(), weights)
        _, ids, weights = self._converted[key]
        out: Tensor = self._module(hidden_TH, ids, weights)
        return out


def make_peer(name: str, shape: LayerShape, weights: ExpertWeights) -> PeerCall:
    """The implementation called `name`, holding `weights` themselves.

    Raises:
        UnsupportedError: Transformers' modules known here do not have this form.
    """
    if name == "vllm":
        return VllmPeer(shape, weights)
    if name == "dense":
        return DensePeer(shape, weights)
    module = _empty_module(shape, name)
    for parameter, tensor in (
        ("gate_up_proj", weights.gate_up),
        ("down_proj", weights.down),
        ("gate_up_proj_bias", weights.gate_up_bias),
        ("down_proj_bias", weights.down_bias),
    ):
        if tensor is not None:
            setattr(module, parameter, nn.Parameter(tensor, requires_grad=False))
    return TransformersPeer(module.eval())


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
    if name == "vllm":
        return vllm_refusal(shape, device)
    if name == "dense":
        return dense_refusal(shape, tokens)
    if name != "batched_mm":
        return None
    copied = tokens * shape.top_k * shape.experts.params_per_expert * itemsize
    limit = min(free_bytes, _CPU_COPY_BYTES if device == "cpu" else _CUDA_COPY_BYTES)
    if copied <= limit:
        return None
    return (
        f"copies the weights of {tokens * shape.top_k} experts, {copied / 1e9:.1f} GB a call; "
        f"left out above {limit / 1e9:.1f} GB"
    )
