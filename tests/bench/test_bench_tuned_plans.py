"""Where tuned plans are kept, and how damaged files are met."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tuning_cases import CONFIG, H100, START

from moetor.config import Activation
from moetor.kernels.triton import choose, fused, support, tuned
from moetor.kernels.triton.tuned import Plan, TunedPlan, TunedPlans, plan_key

KEY = plan_key(CONFIG, 8, 16, 2)
FOUND = TunedPlan(plan=START, seconds=1e-5, chosen_seconds=2e-5, complete=True)
SMALL = TunedPlan(
    plan=choose.small_plan(CONFIG, 8, 2, H100), seconds=1e-5, chosen_seconds=1e-5, complete=False
)


def test_plans_are_read_as_they_were_written(store: TunedPlans) -> None:
    store.put(KEY, FOUND)
    store.put(plan_key(CONFIG, 8, 1, 2), SMALL)
    again = TunedPlans(store.path, H100)
    assert again.get(KEY) == FOUND
    assert again.get(plan_key(CONFIG, 8, 1, 2)) == SMALL
    assert again.get(plan_key(CONFIG, 8, 17, 2)) is None
    assert again.get(plan_key(CONFIG, 4, 16, 2)) is None
    assert again.get(plan_key(replace(CONFIG, transposed=True), 8, 16, 2)) is None
    assert again.tokens(CONFIG, 8, 2) == [1, 16]
    assert again.tokens(CONFIG, 8, 4) == []
    again.drop(CONFIG, 8, 2, [16])
    assert TunedPlans(store.path, H100).tokens(CONFIG, 8, 2) == [1]


def test_a_plan_is_not_taken_for_a_form_that_its_path_lacks(store: TunedPlans) -> None:
    store.put(plan_key(CONFIG, 8, 1, 2), SMALL)
    normed = replace(CONFIG, post_norm_eps=1e-6)
    called = replace(CONFIG, activation=Activation(function=torch.tanh))
    for other in (normed, called):
        assert choose.small_form(other) is not None
        assert store.get(plan_key(other, 8, 1, 2)) is None


def test_a_range_ends_at_a_power_of_two() -> None:
    keys = [plan_key(CONFIG, 8, tokens, 2) for tokens in (1, 2, 3, 4, 5, 8)]
    assert keys[2] == keys[3]
    assert keys[4] == keys[5]
    assert len(set(keys)) == 4


def test_two_processes_keep_both_plans(store: TunedPlans) -> None:
    other = TunedPlans(store.path, H100)
    store.put(KEY, FOUND)
    other.put(plan_key(CONFIG, 8, 64, 2), FOUND)
    assert TunedPlans(store.path, H100).tokens(CONFIG, 8, 2) == [16, 64]


def damaged(record: dict[str, object], change: str) -> str:
    plans = record["plans"]
    assert isinstance(plans, dict)
    tile = plans[KEY]["plan"]["up"]
    match change:
        case "cut off":
            return json.dumps(record)[:-20]
        case "another format":
            record["format"] = "moetor-tuned/0"
        case "an unknown field":
            tile["swizzle"] = 1
        case "a missing field":
            del tile["depth"]
        case "a word for a number":
            tile["stages"] = "four"
        case "no power of two":
            tile["columns"] = 48
        case "a negative number":
            tile["stages"] = -1
        case "an unknown path":
            plans[KEY]["path"] = "medium"
        case "no time":
            plans[KEY]["seconds"] = 0.0
        case "a list":
            return "[]"
        case "products of unlike rows":
            tile["rows"] = 2 * tile["rows"]
        case "too much shared memory":
            tile["stages"] = 64
    return json.dumps(record)


@pytest.mark.parametrize(
    "change",
    [
        *("cut off", "another format", "an unknown field", "a missing field"),
        *("a word for a number", "no power of two", "a negative number", "an unknown path"),
        *("no time", "a list", "products of unlike rows", "too much shared memory"),
    ],
)
def test_a_damaged_file_is_not_used_and_that_is_said(store: TunedPlans, change: str) -> None:
    store.put(KEY, FOUND)
    record = json.loads(store.path.read_text())
    store.path.write_text(damaged(record, change))
    with pytest.warns(UserWarning, match=r"gpu\.json .*; they are not used"):
        again = TunedPlans(store.path, H100)
    assert not again
    assert again.get(KEY) is None


def test_a_file_that_is_not_text_is_not_used(store: TunedPlans) -> None:
    store.path.parent.mkdir(parents=True)
    store.path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert not TunedPlans(store.path, H100)


def test_a_write_that_fails_leaves_the_file(
    store: TunedPlans, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(KEY, FOUND)
    before = store.path.read_text()

    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tuned.json, "dump", broken)
    with pytest.raises(OSError, match="no space"):
        store.put(plan_key(CONFIG, 8, 64, 2), FOUND)
    assert store.path.read_text() == before
    assert [path.name for path in store.path.parent.iterdir()] == ["gpu.json"]


def test_the_file_is_named_after_gpu_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "fingerprint", lambda: "0123456789ab")
    path = tuned.plans_path("NVIDIA H100 80GB HBM3", H100)
    assert path == tmp_path / "moetor/tuned/nvidia-h100-80gb-hbm3-sm90-0123456789ab.json"


def test_the_kernel_takes_the_plan_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []

    def find(config: object, top_k: int, bucket: int, itemsize: int, index: int) -> Plan:
        asked.append((top_k, bucket, itemsize, index))
        return START

    monkeypatch.setattr(fused, "tuned_plan", find)

    def given(tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.empty(tokens, 2048, device=device, dtype=torch.bfloat16)
        return hidden, torch.empty(tokens, 8, device=device, dtype=torch.int32)

    with FakeTensorMode():
        for tokens in (1, 16, 17):
            assert fused.TritonKernel._tuned(*given(tokens, "cuda"), CONFIG) == START
        assert fused.TritonKernel._tuned(*given(0, "cuda"), CONFIG) is None
        assert fused.TritonKernel._tuned(*given(4, "cpu"), CONFIG) is None
    assert asked == [(8, 1, 2, 0), (8, 16, 2, 0), (8, 32, 2, 0)]
    monkeypatch.setattr(support, "have_triton", lambda: False)
    with FakeTensorMode():
        assert fused.TritonKernel._tuned(*given(4, "cuda"), CONFIG) is None
    assert len(asked) == 3


def test_a_user_without_a_home_has_no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(support, "gpu", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(tuned, "fingerprint", lambda: "0123456789ab")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    tuned.forget()
    plans = tuned.plans_of(0)
    tuned.forget()
    assert not plans
    assert plans.get(KEY) is None


@pytest.mark.skipif(not support.have_triton(), reason="Triton is not installed")
def test_the_fingerprint_is_short_and_steady() -> None:
    first = tuned.fingerprint()
    tuned.fingerprint.cache_clear()
    assert tuned.fingerprint() == first
    assert len(first) == 12
