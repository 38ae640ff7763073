"""Activations of more than 2^31 elements on an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch

from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertWeights
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.triton import support
from moetor.kernels.triton.fused import TritonKernel

REFUSED = support.device_refusal("cuda")
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=f"the Triton kernel {REFUSED}")


def test_outputs_of_more_than_two_to_the_31_elements(seed: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    torch.manual_seed(seed)
    config = ExpertsConfig(num_experts=4, hidden_size=8192, intermediate_size=32)
    tokens = 140_000  # two slots each: 2.3e9 numbers
    weights = ExpertWeights(
        torch.randn(config.gate_up_shape, device="cuda").bfloat16() / 90,
        torch.randn(config.down_shape, device="cuda").bfloat16() / 6,
    )
    hidden = torch.empty(tokens, 8192, device="cuda", dtype=torch.bfloat16).normal_()
    ids = torch.rand(tokens, 4, device="cuda").topk(2).indices.int()
    slots = torch.rand(tokens, 2, device="cuda")
    out = TritonKernel()(hidden, slots, ids, weights, config)
    rows = torch.tensor([0, 1, 65_535, 70_000, 131_071, 131_072, tokens - 1], device="cuda")
    expected = ReferenceKernel()(hidden[rows].float(), slots[rows], ids[rows], weights, config)
    errors = (out[rows].float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 2e-2
