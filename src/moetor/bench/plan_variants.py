"""The Triton kernels with other plans than the chosen one: what a choice is judged by.

Shape letters: T tokens, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from moetor.bench.shapes import LayerShape
from moetor.config import RouterConfig
from moetor.kernels.base import ExpertWeights
from moetor.kernels.select import select_router
from moetor.kernels.triton import choose, support
from moetor.kernels.triton.candidates import large_candidates, small_candidates
from moetor.kernels.triton.fused import TritonKernel
from moetor.kernels.triton.large import run_large
from moetor.kernels.triton.small import run_small

VariantName = Literal["small", "large", "plans", "routing"]
VARIANTS: tuple[str, ...] = get_args(VariantName)
# Beyond this the small path reads every expert once per token.
_SMALL_TOKENS = 8

VariantCall = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]
"""`(hidden [T, H], weights [T, K], ids [T, K], experts) -> [T, H]`."""


class RoutedCall:
    """Routing and experts from router logits on.

    The logits are made from the ids that a call is given, once for each and outside of what is
    timed: equal for those, so that each of the K weights is 1 / K, and far below for the rest.
    """

    def __init__(self, shape: LayerShape) -> None:
        self._config = shape.experts
        self._router = RouterConfig(
            num_experts=shape.experts.num_experts, top_k=shape.top_k, renormalize=True
        )
        self._kernel = TritonKernel()
        self._logits: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        hidden_TH: Tensor,
        topk_weights_TK: Tensor,
        topk_ids_TK: Tensor,
        weights: ExpertWeights,
    ) -> Tensor:
        """The layer's output [T, H]; `topk_weights_TK` must be 1 / K."""
        key = id(topk_ids_TK)
        if key not in self._logits:
            size = (topk_ids_TK.shape[0], self._router.num_experts)
            logits_TE = torch.full(size, -30.0, device=hidden_TH.device)
            logits_TE.scatter_(1, topk_ids_TK.long(), 1.0)
            # The tensor is kept with them: its id must stay its own.
            self._logits[key] = (topk_ids_TK, logits_TE.to(hidden_TH.dtype))
        logits_TE = self._logits[key][1]
        choice = select_router(self._router, logits_TE.device.type, logits_TE.dtype)
        routing = choice.route(logits_TE, self._router, None, hidden_TH.dtype)
        return self._kernel(
            hidden_TH, routing.topk_weights, routing.topk_ids, weights, self._config
        )


def plan_variants(
    shape: LayerShape, tokens: int, itemsize: int, kinds: tuple[str, ...]
) -> Iterator[tuple[str, VariantCall]]:
    """Names and calls.

    Args:
        kinds: `small` and `large`: that path with its chosen plan; `plans`: the plans around it;
            `routing`: the kernel behind the launch that routes, from router logits on.
    """
    config, top_k = shape.experts, shape.top_k
    device = support.gpu(0)
    small = choose.small_plan(config, top_k, itemsize, device)
    large = choose.large_plan(config, top_k, tokens, itemsize, device)

    def of_small(plan: choose.SmallPlan) -> VariantCall:
        return lambda x, w, ids, weights: run_small(x, w, ids, weights, config, plan)

    def of_large(plan: choose.LargePlan) -> VariantCall:
        return lambda x, w, ids, weights: run_large(x, w, ids, weights, config, plan)

    if "routing" in kinds:
        yield "routing + triton", RoutedCall(shape)
    if "small" in kinds and tokens <= _SMALL_TOKENS:
        yield "small", of_small(small)
    if "large" in kinds:
        yield "large", of_large(large)
    if "plans" not in kinds:
        return
    if tokens <= _SMALL_TOKENS // 2:
        for name, plan in small_candidates(small, transposed=config.transposed):
            yield f"small {name}", of_small(plan)
    if tokens > 2:
        for name, changed in large_candidates(large, device, gated=config.gated, itemsize=itemsize):
            yield f"large {name}", of_large(changed)
