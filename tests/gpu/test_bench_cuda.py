"""`moetor bench` on an NVIDIA GPU, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moetor.bench import ceilings, timing
from moetor.bench.timing import CudaSampler
from moetor.cli.main import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_CUDA_READ_BYTES", 64 * 2**20)
    monkeypatch.setattr(ceilings, "_CUDA_GEMM_SIZE", 1024)
    monkeypatch.setattr(ceilings, "_GEMM_SECONDS", 0.01)
    monkeypatch.setattr(timing, "CUDA_MIN_SECONDS", 0.001)


@pytest.mark.usefixtures("quick")
def test_a_layer_with_peers_and_variants(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    flags = ["--device", "cuda", "--shape", "16,4,256,128", "--tokens", "1,300"]
    flags += ["--peers", "eager,grouped_mm,batched_mm,dense", "--variants", "small,large,routing"]
    assert main(["bench", "layer", *flags, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    first, second = (
        {found["name"]: found for found in row["implementations"]} for row in record["rows"]
    )
    assert {"small", "large", "routing + triton", "eager", "grouped_mm", "batched_mm"} <= set(first)
    assert "dense" not in first
    assert {"large", "dense"} <= set(second)
    assert not first["eager"]["cuda_graph"]
    for found in (first["large"], first["grouped_mm"], second["dense"]):
        assert found["cuda_graph"]
        assert found["median_us"] > 0
        assert found["rested_us"] > 0


def test_a_graph_takes_every_step_in_turn() -> None:
    from moetor.bench.rotation import Step

    taken = torch.zeros(3, device="cuda")
    steps = [Step(number, 0, torch.empty(0), torch.empty(0)) for number in range(3)]

    def call(step: Step) -> torch.Tensor:
        taken[step.number] += 1
        return taken

    sampler = CudaSampler(call, steps, passes=4)
    sampler.warm_up()
    taken.zero_()
    sampler.sample()  # one pass untimed, one timed
    assert taken.tolist() == [8, 8, 8]
    sampler.rested_sample()
    assert taken.tolist() == [12, 12, 12]
