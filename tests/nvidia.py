"""Whether the Triton kernels can run on this machine's GPU."""

from __future__ import annotations

import pytest
import torch

from moetor.config import ExpertsConfig
from moetor.kernels.base import KernelQuery
from moetor.kernels.triton import support

REFUSED = support.refusal(
    KernelQuery(
        device="cuda",
        dtype=torch.bfloat16,
        experts=ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=8),
        top_k=2,
    )
)
needs_triton_gpu = pytest.mark.skipif(REFUSED is not None, reason=f"the Triton kernel {REFUSED}")
