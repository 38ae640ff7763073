"""`moetor tune` on an NVIDIA GPU: what it keeps is what the kernel then takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetor.bench.shapes import parse_shapes
from moetor.bench.weights import make_weights
from moetor.cli.main import main
from moetor.kernels.base import KernelQuery
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.select import select_kernel
from moetor.kernels.triton import choose, fused, support, tuned
from moetor.kernels.triton.tuned import TunedPlan, plan_key, plans_of

pytestmark = pytest.mark.skipif(
    support.device_refusal("cuda") is not None, reason="the Triton kernel does not run here"
)
SHAPE = parse_shapes(["16,4,256,128"])[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.forget()
    yield
    tuned.forget()


def test_tune_keeps_plans_that_the_kernel_takes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["tune", "--shape", "16,4,256,128", "--tokens", "1,64", "--seconds", "20"]
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("16,4")] == ["1", "64"]
    query = KernelQuery(device="cuda", dtype=torch.bfloat16, experts=SHAPE.experts, top_k=4)
    assert select_kernel(query, "triton").note == "tuned on this GPU for up to 1, 64 tokens"
    (weights,) = make_weights(SHAPE, 1, torch.bfloat16, "cuda", seed=0)
    for tokens in (1, 33, 64):
        hidden = torch.randn(tokens, 256, device="cuda").bfloat16()
        ids = torch.rand(tokens, 16, device="cuda").topk(4).indices.int()
        slots = torch.rand(tokens, 4, device="cuda")
        out = fused.TritonKernel()(hidden, slots, ids, weights, SHAPE.experts)
        expected = ReferenceKernel()(hidden.float(), slots, ids, weights, SHAPE.experts)
        assert (out.float() - expected).norm() / expected.norm() < 8e-3
    assert main(flags) == 0
    assert "kept from before" in capsys.readouterr().out


def test_a_kept_plan_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SHAPE.experts
    plan = choose.large_plan(config, 4, 1, 2, support.gpu(0))
    plan = replace(plan, up=replace(plan.up, group=3), down=replace(plan.down, group=3))
    found = TunedPlan(plan=plan, seconds=1.0, chosen_seconds=2.0, complete=True)
    plans_of(0).put(plan_key(config, 4, 1, 2), found)
    tuned.forget()
    seen = []
    real = fused.run_large

    def run_large(*arguments: object) -> object:
        seen.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(fused, "run_large", run_large)
    (weights,) = make_weights(SHAPE, 1, torch.bfloat16, "cuda", seed=0)
    hidden, slots = torch.randn(1, 256, device="cuda").bfloat16(), torch.rand(1, 4, device="cuda")
    ids = torch.arange(4, device="cuda", dtype=torch.int32).view(1, 4)
    kernel = fused.TritonKernel()
    kernel(hidden, slots, ids, weights, config)
    assert seen == [plan]
    kernel(hidden, slots, ids, weights, config, batch_invariant=True)
    assert seen == [plan]
