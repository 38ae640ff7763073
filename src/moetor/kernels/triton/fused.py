"""Routed experts on NVIDIA GPUs: the small or the large path, by the number of tokens.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertsKernel, KernelQuery, Weights
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import use_small
from moetor.kernels.triton.large import TritonLargeKernel
from moetor.kernels.triton.small import TritonSmallKernel


class TritonKernel(ExpertsKernel):
    """Decides on the host by the shape alone, so that a captured graph holds one of the two."""

    name = "triton"

    def __init__(self) -> None:
        self._small = TritonSmallKernel()
        self._large = TritonLargeKernel()

    def refusal(self, query: KernelQuery) -> str | None:
        """No NVIDIA GPU, no Triton, or a dtype or form that the kernels do not have."""
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
        """See `ExpertsKernel`. With `batch_invariant` the large path takes every call, with one
        plan; gradients are not recorded."""
        small = (
            not batch_invariant
            and hidden_TH.dim() == topk_ids_TK.dim() == 2
            and use_small(
                config, topk_ids_TK.shape[1], hidden_TH.shape[0], hidden_TH.element_size()
            )
        )
        return (self._small if small else self._large)(
            hidden_TH,
            topk_weights_TK,
            topk_ids_TK,
            weights,
            config,
            batch_invariant=batch_invariant,
        )

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """The larger of the two paths'."""
        return max(
            self._small.workspace_bytes_per_token(config, top_k, dtype),
            self._large.workspace_bytes_per_token(config, top_k, dtype),
        )
