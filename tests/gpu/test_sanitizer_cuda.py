"""NVIDIA's compute-sanitizer over every path of the Triton kernels: no access outside a tensor.

Sizes that no tile divides, and an allocation of its own for every tensor, so that a read past the
end is one past an allocation. The child is this file, run as a script.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve()
TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed"),
]
CLEAN = "ERROR SUMMARY: 0 errors"


def under_the_sanitizer(*arguments: str) -> str:
    assert TOOL is not None
    done = subprocess.run(
        [TOOL, "--tool", "memcheck", sys.executable, str(HERE), *arguments],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout + done.stderr
    if "not supported" in output or "Unable to find" in output:
        pytest.skip(f"compute-sanitizer does not work here: {output[-300:]}")
    return output


def test_no_access_outside_a_tensor(seed: int) -> None:
    output = under_the_sanitizer("kernels", str(seed))
    assert "all paths ran" in output, output[-4000:]
    assert CLEAN in output, output[-4000:]


def test_the_sanitizer_sees_one(seed: int) -> None:
    output = under_the_sanitizer("outside", str(seed))
    assert "Invalid __global__ read" in output, output[-4000:]
    assert CLEAN not in output, output[-4000:]


def _kernels(seed: int) -> None:
    from moetor.config import ExpertsConfig, RouterConfig
    from moetor.kernels.base import ExpertWeights
    from moetor.kernels.triton import choose, support
    from moetor.kernels.triton.large import run_large
    from moetor.kernels.triton.routing import route
    from moetor.kernels.triton.small import run_small

    torch.manual_seed(seed)
    device = support.gpu(0)
    for form in ({}, {"transposed": True, "interleaved": True, "has_bias": True}):
        config = ExpertsConfig(num_experts=5, hidden_size=136, intermediate_size=72, **form)

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, device="cuda").bfloat16()

        biases = {}
        if config.has_bias:
            biases = {
                "gate_up_bias": draw(5, config.up_size),
                "down_bias": draw(5, config.hidden_size),
            }
        weights = ExpertWeights(draw(*config.gate_up_shape), draw(*config.down_shape), **biases)
        router = RouterConfig(num_experts=5, top_k=2)
        for tokens in (1, 3, 77, 600):
            routing = route(draw(tokens, 5), router, None, torch.bfloat16)
            inputs = (
                draw(tokens, config.hidden_size), routing.topk_weights, routing.topk_ids, weights,
                config,
            )  # fmt: skip
            if tokens < 10:
                run_small(*inputs, choose.small_plan(config, 2, 2, device))
            plan = choose.large_plan(config, 2, tokens, 2, device)
            run_large(*inputs, plan)
            if device.capability[0] >= 9:
                tile = replace(plan.up, depth=64, columns=32, tma=True, persistent=7, halves=False)
                down = replace(plan.down, rows=tile.rows)
                run_large(*inputs, choose.LargePlan(up=tile, down=down, pdl=True))
    torch.cuda.synchronize()
    print("all paths ran")


def _outside() -> None:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

    @triton.jit
    def read(source, target, N: tl.constexpr):  # type: ignore[no-untyped-def]
        n = tl.arange(0, N)
        tl.store(target + n, tl.load(source + n + 2**22))

    source = torch.randn(1024, device="cuda")
    read[(1,)](source, torch.empty_like(source), 1024)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1] == "kernels":
        _kernels(int(sys.argv[2]))
    else:
        _outside()
