"""The native CPU kernel of the routed experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import KernelRefusedError
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery


class NativeKernel(ExpertsKernel):
    """Placeholder until the native library lands: refuses everything."""

    name = "native"

    def refusal(self, query: KernelQuery) -> str | None:
        """Everything, for now."""
        return "is not built yet"

    def __call__(
        self,
        hidden_TH: Tensor,
        topk_weights_TK: Tensor,
        topk_ids_TK: Tensor,
        weights: ExpertWeights,
        config: ExpertsConfig,
        *,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Not available yet."""
        raise KernelRefusedError("kernel 'native' is not built yet")

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """Nothing yet."""
        return 0
