"""The search for plans and where they are kept, with times that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuning_cases import CONFIG, H100, KB, START

from moetor.bench import gpu_tuning
from moetor.bench.gpu_tuning import gpu_cases
from moetor.bench.shapes import SHAPES
from moetor.bench.tuning import PlanTimer, TuneCase, TuneRow, tune
from moetor.cli.main import main
from moetor.cli.tune import TuneOptions, _shapes
from moetor.errors import UnsupportedError
from moetor.huggingface import loading
from moetor.kernels.triton import choose
from moetor.kernels.triton.candidates import large_candidates, small_candidates
from moetor.kernels.triton.tuned import Plan, TunedPlans, plan_key
from moetor.tools.tiny.models import tiny_config


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


def test_a_product_without_roles_is_tried_and_changed() -> None:
    config, device = SHAPES["olmoe"].experts, replace(H100, roles=True)
    plan = choose.large_plan(config, 8, 4096, 2, device)
    found = dict(large_candidates(plan, device, gated=True, itemsize=2))
    assert plan.down.roles
    assert next(iter(found)) == "no roles"
    assert not any(other.down.roles for other in found.values())


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
