from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from moetor.bench import ceilings, hardware
from moetor.bench.ceilings import Ceilings, measure_ceilings
from moetor.kernels.native.build import BuildError


def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_MIB", 2**12)
    monkeypatch.setattr(ceilings, "last_level_cache", lambda device: 0)
    monkeypatch.setattr(ceilings, "_CPU_GEMM_SIZE", 64)
    monkeypatch.setattr(ceilings, "_GEMM_SECONDS", 0.001)


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch)
    found = measure_ceilings("cpu", torch.bfloat16)
    assert found.read_bytes_per_s > 0
    assert list(found.gemm_flops_per_s) == ["bfloat16", "float32"]
    assert found.flops_per_s == found.gemm_flops_per_s[found.flops_dtype]
    assert "64^3" in found.describe()


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch)

    def none() -> None:
        raise BuildError("needs a C++ compiler")

    monkeypatch.setattr(ceilings, "find_compiler", none)
    found = measure_ceilings("cpu", torch.float32)
    assert "torch.sum" in found.read_method
    assert "needs a C++ compiler" in found.read_method
    assert list(found.gemm_flops_per_s) == ["float32"]


def test_the_reader_reads_every_line(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    read = ceilings._load_reader(tmp_path)
    words = torch.zeros(4096, dtype=torch.int64)
    words[::8] = torch.arange(512)  # a word of each 64-byte line
    for ahead, streams in ceilings._READ_PATTERNS:
        assert read(words.data_ptr(), words.nbytes, ahead, streams) == 511 * 512 // 2


def test_best_of_two() -> None:
    first = Ceilings(
        read_bytes_per_s=2.0, read_method="a", gemm_flops_per_s={"float32": 1.0}, gemm_size=8
    )
    second = Ceilings(
        read_bytes_per_s=1.0, read_method="b", gemm_flops_per_s={"float32": 3.0}, gemm_size=8
    )
    best = first.best_with(second)
    assert (best.read_bytes_per_s, best.read_method, best.flops_per_s) == (2.0, "a", 3.0)


def test_hardware_is_plain_values() -> None:
    found = hardware.describe_hardware("cpu", 2)
    assert found["threads"] == 2
    assert found["gpu"] is None
    assert isinstance(found["cpu"], str)
    assert hardware.available_memory("cpu") > 0


def test_the_use_by_others_is_a_share_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([(100.0, 50.0, 7.0), (110.0, 62.0, 9.0), (110.01, 99.0, 9.0)])
    monkeypatch.setattr(hardware.OtherUse, "_clocks", staticmethod(lambda: next(clocks)))
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 4)
    watch = hardware.OtherUse()
    assert watch.share() == pytest.approx((12 - 2) / (10 * 4))
    watch._start = (110.0, 62.0, 9.0)
    assert watch.share() is None, "too short to tell"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install triton)",
)
def test_the_gpu_reader_reads_every_element() -> None:
    code = (
        "import torch; from moetor.bench.gpu_read import read_all; "
        "data = torch.arange(4096.0); out = read_all(data, 256, 4); "
        "assert torch.equal(out, data.view(4, 1024).sum(dim=1)), out"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
