"""The Triton kernels with other plans than the chosen one: what a choice is judged by.

Shape letters: T tokens, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

from torch import Tensor

from moetor.bench.shapes import LayerShape
from moetor.kernels.base import ExpertWeights
from moetor.kernels.triton import choose, support
from moetor.kernels.triton.candidates import large_candidates, small_candidates
from moetor.kernels.triton.large import run_large
from moetor.kernels.triton.small import run_small

VariantName = Literal["small", "large", "plans"]
VARIANTS: tuple[str, ...] = get_args(VariantName)
# Beyond this the small path reads every expert once per token.
_SMALL_TOKENS = 8

VariantCall = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]
"""`(hidden [T, H], weights [T, K], ids [T, K], experts) -> [T, H]`."""


def plan_variants(
    shape: LayerShape, tokens: int, itemsize: int, kinds: tuple[str, ...]
) -> Iterator[tuple[str, VariantCall]]:
    """Names and calls.

    Args:
        kinds: `small` and `large`: that path with its chosen plan; `plans`: the plans around it.
    """
    config, top_k = shape.experts, shape.top_k
    device = support.gpu(0)
    small = choose.small_plan(config, top_k, itemsize, device)
    large = choose.large_plan(config, top_k, tokens, itemsize, device)

    def of_small(plan: choose.SmallPlan) -> VariantCall:
        return lambda x, w, ids, weights: run_small(x, w, ids, weights, config, plan)

    def of_large(plan: choose.LargePlan) -> VariantCall:
        return lambda x, w, ids, weights: run_large(x, w, ids, weights, config, plan)

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
