"""A bench that takes milliseconds: stand-in ceilings, few samples, small caches."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuning_cases import H100

from moetor.bench import layer, timing
from moetor.bench.ceilings import Ceilings
from moetor.kernels.triton.tuned import TunedPlans

CEILINGS = Ceilings(
    read_bytes_per_s=1e9,
    read_method="made up",
    gemm_flops_per_s={"bfloat16": 1e9, "float32": 2e9},
    gemm_size=64,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(layer, "last_level_cache", lambda device: 4096)
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.001)
    monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.001)


@pytest.fixture
def store(tmp_path: Path) -> TunedPlans:
    return TunedPlans(tmp_path / "tuned" / "gpu.json", H100)
