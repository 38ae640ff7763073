"""The search for plans and where they are kept, with times that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moetor.bench import gpu_tuning
from moetor.bench.gpu_tuning import gpu_cases
from moetor.bench.shapes import SHAPES
from moetor.bench.tuning import PlanTimer, TuneCase, TuneRow, tune
from moetor.cli.main import main
from moetor.cli.tune import TuneOptions, _shapes
from moetor.config import Activation
from moetor.errors import UnsupportedError
from moetor.huggingface import loading
from moetor.kernels.triton import choose, fused, support, tuned
from moetor.kernels.triton.candidates import large_candidates, small_candidates
from moetor.kernels.triton.tuned import Plan, TunedPlan, TunedPlans, plan_key
from moetor.tools.tiny.models import tiny_config

KB = 1024
H100 = choose.Device(sms=132, shared=227 * KB, capability=(9, 0))
START = choose.LargePlan(
    up=choose.Tile(rows=16, columns=32, depth=128, warps=4, stages=4),
    down=choose.Tile(rows=16, columns=64, depth=128, warps=4, stages=4),
)
CONFIG = SHAPES["qwen3-30b-a3b"].experts


class Clock:
    """Moves a second with every plan that is timed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeTimer(PlanTimer):
    """Seconds by a formula; None and errors as it says."""

    def __init__(self, seconds: Callable[[Plan], float | None], clock: Clock) -> None:
        self.formula, self.clock = seconds, clock
        self.prepared: set[Plan] = set()

    def prepare(self, plans: list[Plan]) -> None:
        assert self.prepared.isdisjoint(plans)  # nothing is compiled twice
        self.prepared.update(plans)

    def seconds(self, plan: Plan) -> float | None:
        self.clock.now += 1
        return self.formula(plan)


def deeper(plan: Plan) -> float | None:
    """Faster with more stages, up to 8."""
    assert isinstance(plan, choose.LargePlan)
    return 1.0 / min(plan.up.stages, 8)


def more_or_less(plan: Plan) -> Iterator[tuple[str, Plan]]:
    assert isinstance(plan, choose.LargePlan)
    for change in (-1, 1):
        stages = plan.up.stages + change
        if stages:
            yield f"stages {stages}", replace(plan, up=replace(plan.up, stages=stages))


def case(tokens: int, timer: Callable[[], PlanTimer], *starts: Plan) -> TuneCase:
    return TuneCase(
        tokens=tokens,
        key=plan_key(CONFIG, 8, tokens, 2),
        starts=starts or (START,),
        neighbours=more_or_less,
        timer=timer,
    )


def search(
    store: TunedPlans,
    formula: Callable[[Plan], float | None],
    *tokens: int,
    seconds: float = 1000.0,
    starts: tuple[Plan, ...] = (),
) -> list[TuneRow]:
    clock = Clock()
    cases = [case(count, lambda: FakeTimer(formula, clock), *starts) for count in tokens]
    return list(tune(cases, store, seconds, clock=clock))


@pytest.fixture
def store(tmp_path: Path) -> TunedPlans:
    return TunedPlans(tmp_path / "tuned" / "gpu.json", H100)


def test_the_search_climbs_to_the_fastest_plan(store: TunedPlans) -> None:
    (row,) = search(store, deeper, 64)
    assert row.found is not None
    assert isinstance(row.found.plan, choose.LargePlan)
    assert row.found.plan.up.stages == 8
    assert (row.found.seconds, row.found.chosen_seconds) == (1 / 8, 1 / 4)
    assert row.found.complete
    assert row.note == ""
    assert store.get(plan_key(CONFIG, 8, 64, 2)) == row.found


def test_a_little_faster_is_not_faster(store: TunedPlans) -> None:
    def flat(plan: Plan) -> float:
        assert isinstance(plan, choose.LargePlan)
        return 1.0 - 0.001 * plan.up.stages

    (row,) = search(store, lambda plan: max(flat(plan), 0.99), 64)
    assert row.found is not None
    assert row.found.plan == START
    assert row.found.complete


def test_a_plan_that_does_not_run_is_passed_over(store: TunedPlans) -> None:
    def some(plan: Plan) -> float | None:
        assert isinstance(plan, choose.LargePlan)
        return None if plan.up.stages == 6 else deeper(plan)

    (row,) = search(store, some, 64)
    assert row.found is not None
    assert isinstance(row.found.plan, choose.LargePlan)
    assert row.found.plan.up.stages == 5


def test_another_start_is_taken_where_it_is_faster(store: TunedPlans) -> None:
    other = replace(START, down=replace(START.down, warps=8))

    def times(plan: Plan) -> float:
        assert isinstance(plan, choose.LargePlan)
        return 0.1 if plan.down.warps == 8 else 1.0

    (row,) = search(store, times, 4, starts=(START, other))
    assert row.found is not None
    assert row.found.plan == other
    assert row.found.chosen_seconds == 1.0


def test_a_computed_plan_that_does_not_run_leaves_nothing(store: TunedPlans) -> None:
    (row,) = search(store, lambda plan: None, 64)
    assert row.found is None
    assert row.note == "no plan could be timed"
    assert not store.path.exists()


def test_a_second_run_measures_nothing_again(store: TunedPlans) -> None:
    search(store, deeper, 1, 64)
    again = TunedPlans(store.path, H100)
    rows = search(again, lambda plan: pytest.fail("was timed"), 1, 64)
    assert [row.tried for row in rows] == [0, 0]
    assert all(row.note == "kept from before" for row in rows)


def test_a_run_that_was_cut_off_is_taken_up(store: TunedPlans) -> None:
    (row,) = search(store, deeper, 64, seconds=4)
    assert row.found is not None
    assert not row.found.complete
    assert "run again" in row.note
    reached = row.found.plan
    assert isinstance(reached, choose.LargePlan)
    assert 4 < reached.up.stages < 8
    (row,) = search(TunedPlans(store.path, H100), deeper, 64)
    assert row.found is not None
    assert row.found.complete
    assert isinstance(row.found.plan, choose.LargePlan)
    assert row.found.plan.up.stages == 8


def test_time_is_shared_and_its_end_is_said(store: TunedPlans) -> None:
    rows = search(store, deeper, 1, 16, 64, seconds=1.5)
    assert rows[0].found is not None
    assert rows[0].note.startswith("time was up")
    assert rows[1].found is not None
    assert (rows[2].found, rows[2].note) == (None, "no time was left")


def test_out_of_memory_keeps_what_there_is(store: TunedPlans) -> None:
    clock = Clock()

    def full() -> PlanTimer:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cases = [
        case(64, lambda: FakeTimer(deeper, clock)),
        case(4096, full),
        case(16384, lambda: pytest.fail("larger ones are left out")),
    ]
    rows = list(tune(cases, store, 1000, clock=clock))
    assert rows[0].found is not None
    assert [row.note for row in rows[1:]] == [
        "out of memory",
        "left out: fewer tokens are out of memory already",
    ]
    assert TunedPlans(store.path, H100).tokens(CONFIG, 8, 2) == [64]


def test_one_plan_out_of_memory_is_one_plan_less(store: TunedPlans) -> None:
    def some(plan: Plan) -> float | None:
        assert isinstance(plan, choose.LargePlan)
        if plan.up.stages == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return deeper(plan)

    (row,) = search(store, some, 64)
    assert row.found is not None
    assert isinstance(row.found.plan, choose.LargePlan)
    assert row.found.plan.up.stages == 5


# --- the timer's errors, on a GPU that is made up ------------------------------------------------


def made_up_timer(call: Callable[[Plan, object], torch.Tensor]) -> gpu_tuning.GpuPlanTimer:
    timer = object.__new__(gpu_tuning.GpuPlanTimer)
    timer._steps, timer._passes, timer._expected = (object(),), 1, None
    timer._call = call
    return timer


def fail(plan: Plan, step: object) -> torch.Tensor:
    raise RuntimeError("out of resource: shared memory")


def test_a_plan_that_does_not_compile_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert made_up_timer(fail).seconds(START) is None


def test_a_capture_that_ran_out_of_memory_is_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`torch.cuda.graph` ends the capture on the way out, which fails with an error of its own."""

    class Sampler:
        def __init__(self, *_: object, **__: object) -> None: ...

        def warm_up(self) -> None:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_tuning, "CudaSampler", Sampler)
    with pytest.raises(torch.OutOfMemoryError):
        made_up_timer(lambda plan, step: torch.ones(3)).seconds(START)


def test_a_lost_gpu_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every further plan would not run, and the computed one be kept as the fastest."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(UnsupportedError, match=r"illegal memory access.*run again"):
        made_up_timer(fail).seconds(START)
    with pytest.raises(UnsupportedError, match="illegal memory access"):
        made_up_timer(fail).prepare([START])


# --- candidates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shared", [99 * KB, 163 * KB, 227 * KB])
def test_no_candidate_exceeds_the_shared_memory(name: str, shared: int) -> None:
    shape, device = SHAPES[name], replace(H100, shared=shared)
    halves = 2 if shape.experts.gated else 1
    for tokens in (1, 16, 256, 4096):
        plan = choose.large_plan(shape.experts, shape.top_k, tokens, 2, device)
        found = list(large_candidates(plan, device, gated=shape.experts.gated, itemsize=2))
        assert len(found) >= 2
        assert plan not in [other for _, other in found]
        for _, other in found:
            assert other.up.rows == other.down.rows
            for tile, width, first in (
                (other.up, halves * other.up.columns, True),
                (other.down, other.down.columns, False),
            ):
                assert tile.shared_bytes(width=width, itemsize=2, first=first) <= shared


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_descriptors_are_tried_where_gpus_have_them(capability: tuple[int, int]) -> None:
    config, device = SHAPES["mixtral-8x7b"].experts, replace(H100, capability=capability)
    plan = choose.large_plan(config, 2, 4096, 2, device)
    found = [other for _, other in large_candidates(plan, device, gated=True, itemsize=2)]
    assert any(one.up.tma or one.up.persistent for one in found) == (capability >= (9, 0))


@pytest.mark.parametrize("name", SHAPES)
def test_the_list_is_short(name: str) -> None:
    shape = SHAPES[name]
    plan = choose.small_plan(shape.experts, shape.top_k, 2, H100)
    found = [other for _, other in small_candidates(plan, transposed=shape.experts.transposed)]
    assert 1 <= len(found) <= 40
    assert len(set(found)) == len(found)
    assert plan not in found


def test_cases_rise_and_make_no_weights() -> None:
    cases = list(gpu_cases(SHAPES["olmoe"], (64, 1, 4096), torch.bfloat16, H100, 0))
    assert [one.tokens for one in cases] == [1, 64, 4096]
    assert isinstance(cases[0].starts[0], choose.SmallPlan)
    assert [len(one.starts) for one in cases] == [2, 1, 1]
    assert isinstance(cases[2].starts[0], choose.LargePlan)


# --- where plans are kept ------------------------------------------------------------------------

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


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--shape", "olmoe"]) == 1
    assert "there is nothing to tune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "either a MODEL or --shape"),
        (["demo", "--shape", "olmoe"], "either a MODEL or --shape"),
        (["--shape", "gpt"], "qwen3-30b-a3b"),
        (["demo", "--tokens", "0"], "--tokens 0"),
        (["demo", "--seconds", "0"], "--seconds 0"),
        (["demo", "--dtype", "int8"], "bfloat16"),
    ],
)
def test_bad_usage(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *flags]) == 2
    assert word in capsys.readouterr().err


def test_the_shapes_of_a_model() -> None:
    (shape,) = _shapes(TuneOptions(model="demo"))
    config = loading.load_config("demo")
    assert shape.top_k == config.num_experts_per_tok
    assert shape.experts.num_experts == config.num_experts
    assert shape.experts.hidden_size == config.hidden_size
    assert [one.name for one in _shapes(TuneOptions(shape=("olmoe",)))] == ["olmoe"]


def test_the_form_of_a_model_is_kept(tmp_path: Path) -> None:
    tiny_config("gpt_oss").save_pretrained(tmp_path)
    (shape,) = _shapes(TuneOptions(model=str(tmp_path)))
    experts = shape.experts
    assert (experts.interleaved, experts.transposed, experts.has_bias) == (True, True, True)
