"""The Triton kernels' temporary memory on an NVIDIA GPU: what chunks of tokens are cut by."""

from __future__ import annotations

import pytest
import torch

from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertWeights
from moetor.kernels.triton.fused import TritonKernel
from nvidia import needs_triton_gpu

pytestmark = needs_triton_gpu


@pytest.mark.parametrize("budget", [2**20, 2**24, 2**27])
@pytest.mark.parametrize("shape", [(64, 8, 512, 192), (8, 2, 1024, 2048)])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_call_keeps_to_its_budget(
    budget: int, shape: tuple[int, int, int, int], batch_invariant: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    experts, top_k, hidden, size = shape
    config = ExpertsConfig(num_experts=experts, hidden_size=hidden, intermediate_size=size)
    kernel = TritonKernel()
    tokens = kernel.tokens_within(config, top_k, torch.bfloat16, budget)
    weights = ExpertWeights(
        *(
            torch.randn(sizes, device="cuda", dtype=torch.bfloat16)
            for sizes in (config.gate_up_shape, config.down_shape)
        )
    )
    x_TH = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    scores, ids = torch.rand(tokens, experts, device="cuda").topk(top_k)
    inputs = (x_TH, scores, ids.int(), weights, config)
    kernel(*inputs, batch_invariant=batch_invariant)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out_TH = kernel(*inputs, batch_invariant=batch_invariant)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before - out_TH.nbytes
    # The allocator hands out multiples of 512 bytes.
    assert tokens == 1 or used <= budget + 16 * 512
    assert tokens == 1 or used > budget // 8
