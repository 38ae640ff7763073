"""What else runs on a GPU beside our kernels: vLLM's fused experts, and torch's dense products as
a measure of what arithmetic the GPU sustains.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate, J rows of
the first product.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from torch import Tensor

from moetor.bench.shapes import LayerShape
from moetor.config import Activation
from moetor.kernels.base import ExpertWeights

GpuPeerName = Literal["vllm", "dense"]
# The one clamped activation that vLLM's kernel has, GPT-OSS's.
_SWIGLU_OAI = Activation(alpha=1.702, limit=7.0, up_shift=1.0)
# Fewer rows an expert, and reading weights bounds a layer: dense products say nothing about it.
_DENSE_ROWS = 64


class VllmPeer:
    """`vllm.model_executor.layers.fused_moe.fused_experts` over one set of weights.

    Transposed storage is copied into the order that it reads, once.
    """

    def __init__(self, shape: LayerShape, weights: ExpertWeights) -> None:
        from vllm.model_executor.layers.fused_moe import fused_experts

        self._function = fused_experts
        up, down = weights.gate_up, weights.down
        if shape.experts.transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        self._up, self._down = up, down
        self._options: dict[str, Any] = {}
        if shape.experts.has_bias:
            from vllm.model_executor.layers.fused_moe.activation import MoEActivation
            from vllm.model_executor.layers.fused_moe.config import biased_moe_quant_config

            self._options = {
                "activation": MoEActivation.SWIGLUOAI,
                "quant_config": biased_moe_quant_config(
                    w1_bias=weights.gate_up_bias, w2_bias=weights.down_bias
                ),
            }

    def __call__(self, hidden_TH: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor) -> Tensor:
        """The weighted sum of the routed experts; weights float32, ids int32."""
        out: Tensor = self._function(
            hidden_TH, self._up, self._down, topk_weights_TK, topk_ids_TK, **self._options
        )
        return out


def vllm_refusal(shape: LayerShape, device: str) -> str | None:
    """Why vLLM is not measured, or None."""
    if device != "cuda":
        return f"its kernel runs on GPUs, not on {device}"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    experts = shape.experts
    form = (experts.gated, experts.interleaved, experts.has_bias, experts.activation)
    if form not in ((True, False, False, Activation()), (True, True, True, _SWIGLU_OAI)):
        return "its fused_experts has no experts of this form"
    return None


class DensePeer:
    """The two products of a layer as if all slots met one expert: [S, H] x [H, J], [S, I] x [I, H].

    No layer: its output means nothing. Another expert's weights are taken at every call.
    """

    def __init__(self, shape: LayerShape, weights: ExpertWeights) -> None:
        self._transposed = shape.experts.transposed
        self._size = shape.experts.intermediate_size
        self._weights = weights
        self._calls = 0
        self._repeated: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, hidden_TH: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor) -> Tensor:
        """[S, H], of the arithmetic of a layer."""
        expert = self._calls % self._weights.down.shape[0]
        self._calls += 1
        up, down = self._weights.gate_up[expert], self._weights.down[expert]
        if not self._transposed:
            up, down = up.T, down.T
        key = id(hidden_TH)
        if key not in self._repeated:
            self._repeated[key] = (hidden_TH, hidden_TH.repeat(topk_ids_TK.shape[1], 1))
        return (self._repeated[key][1] @ up)[:, : self._size] @ down


def dense_refusal(shape: LayerShape, tokens: int) -> str | None:
    """Why dense products are not measured, or None."""
    rows = tokens * shape.top_k / shape.experts.num_experts
    if rows < _DENSE_ROWS:
        return f"with {rows:.3g} rows an expert the layer is bound by reading, dense products not"
    return None
