"""The engine on its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import torch

from engine.engine_cases import (
    assert_empty,
    greedy,
    make_engine,
    make_model,
    own_tokens,
    random_prompts,
)
from moetor import AsyncEngine, SamplingParams
from moetor.engine import EngineStoppedError, RequestOutput
from moetor.errors import ConfigError, InputError

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("qwen3_moe", 3)


@pytest.fixture
def engine(model: Any) -> Iterator[AsyncEngine]:
    made = AsyncEngine(make_engine(model, max_model_len=250))
    yield made
    if made.healthy:
        asyncio.run(made.shutdown())


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def outputs_of(engine: AsyncEngine, prompt: Any, params: Any) -> list[RequestOutput]:
    return [output async for output in await engine.add_request(prompt, params)]


def test_concurrent_streams_give_the_tokens_piece_by_piece(engine: AsyncEngine, model: Any) -> None:
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)

    async def work() -> None:
        streams = await asyncio.gather(*(outputs_of(engine, one, greedy()) for one in prompts))
        for prompt, outputs in zip(prompts, streams, strict=True):
            pieces = [token for output in outputs for token in output.outputs[0].new_token_ids]
            last = outputs[-1].outputs[0]
            assert pieces == last.token_ids == own_tokens("qwen3_moe", model, prompt)
            assert [output.finished for output in outputs] == [False] * 7 + [True]
            assert outputs[-1].metrics.time_to_first_token is not None
        assert engine.stats().requests_finished == len(prompts)
        assert engine.healthy

    run(work())
    assert_empty(engine.engine)


def test_abort_and_a_closed_stream_free_everything(engine: AsyncEngine) -> None:
    async def work() -> None:
        first = await engine.add_request([5, 6, 7], LONG, "first")
        second = await engine.add_request([5, 6], LONG, "second")
        with pytest.raises(InputError, match="'first'"):
            await engine.add_request([5], LONG, "first")
        await anext(first)
        await anext(second)
        await engine.abort("first")
        await engine.abort("never was")
        rest = [output async for output in first]
        assert rest[-1].finished
        assert rest[-1].outputs[0].finish_reason == "abort"
        await second.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(second)
        while engine.stats().running or engine.stats().requests_aborted < 2:
            await asyncio.sleep(0.001)

    run(work())
    assert_empty(engine.engine)


def test_a_cancelled_consumer_aborts_its_request(engine: AsyncEngine) -> None:
    async def work() -> None:
        task = asyncio.create_task(outputs_of(engine, [5, 6, 7], LONG))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine.stats().running:
            await asyncio.sleep(0.001)

    run(work())
    assert_empty(engine.engine)


def test_a_refusal_comes_before_the_stream(engine: AsyncEngine) -> None:
    async def work() -> None:
        with pytest.raises(InputError, match="no tokens"):
            await engine.add_request([], greedy())
        assert not engine._streams

    run(work())


def test_shutdown_drains_then_aborts_and_refuses(engine: AsyncEngine) -> None:
    async def work() -> None:
        short = asyncio.create_task(outputs_of(engine, [5, 6, 7], greedy()))
        await asyncio.sleep(0)
        while not engine._streams:
            await asyncio.sleep(0)
        await engine.shutdown(drain_s=30)
        assert (await short)[-1].outputs[0].finish_reason == "length"
        assert not engine.healthy
        with pytest.raises(EngineStoppedError):
            await engine.add_request([5], greedy())

    run(work())


def test_shutdown_without_draining_aborts(engine: AsyncEngine) -> None:
    async def work() -> None:
        stream = await engine.add_request([5, 6, 7], LONG)
        await anext(stream)
        await engine.shutdown()
        assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"

    run(work())
    assert_empty(engine.engine)


def test_a_failure_of_the_loop_ends_requests_and_the_thread_goes_on(
    engine: AsyncEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise RuntimeError("the scheduler is broken")

    async def work() -> None:
        scheduler = engine.engine.core.scheduler
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "schedule", broken)
            last = (await outputs_of(engine, [5, 6], greedy()))[-1]
        assert last.error is not None
        assert "scheduler is broken" in last.error
        assert any("scheduler is broken" in one for one in engine.errors)
        good = await outputs_of(engine, [5, 6], greedy())
        assert good[-1].outputs[0].token_ids == own_tokens("qwen3_moe", model, [5, 6])

    run(work())
    assert_empty(engine.engine)


def test_an_add_behind_a_failure_is_not_lost(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = engine.engine.core
    add = core.add

    def broken(request: Any) -> None:
        if request.request_id == "broken":
            raise RuntimeError("this one cannot be added")
        add(request)

    async def work() -> None:
        monkeypatch.setattr(core, "add", broken)
        with engine._loop._work:  # so that both are posted before the thread looks
            bad = await engine.add_request([5, 6], greedy(), "broken")
            good = await engine.add_request([5, 6], greedy(), "good")
        last = [output async for output in bad][-1]
        assert last.error == "RuntimeError: this one cannot be added"
        assert last.outputs[0].finish_reason == "error"
        assert [output async for output in good][-1].outputs[0].finish_reason == "length"

    run(work())


@pytest.mark.parametrize("kind", ["device", "loop"])
def test_a_dead_engine_ends_its_streams_and_says_so(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    core = engine.engine.core

    def broken(*_: Any) -> Any:
        if kind == "device":
            raise torch.AcceleratorError("CUDA error: an illegal memory access")
        raise SystemExit("out of everything")

    async def work() -> None:
        first = await engine.add_request([5, 6, 7], LONG)
        await anext(first)
        monkeypatch.setattr(core.runner, "start", broken)
        rest = [output async for output in first]
        assert rest[-1].finished
        assert rest[-1].error is not None
        while engine.healthy:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineStoppedError, match="failed"):
            await engine.add_request([5], greedy())

    run(work())


def test_a_step_that_does_not_end(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    core, goes_on = engine.engine.core, threading.Event()
    step = core.step

    def stands_still() -> Any:
        goes_on.wait(60)
        return step()

    async def work() -> None:
        engine.watch(1.0)
        with pytest.raises(ConfigError, match="already"):
            engine.watch(2.0)
        first = await engine.add_request([5, 6, 7], LONG)
        await anext(first)
        monkeypatch.setattr(core, "step", stands_still)
        rest = [output async for output in first]
        assert "no sign of life" in (rest[-1].error or "")
        assert engine.hung
        with pytest.raises(EngineStoppedError, match="1 s are the limit"):
            await engine.add_request([5], greedy())
        goes_on.set()
        while not engine.healthy:
            await asyncio.sleep(0.01)
        outputs = await outputs_of(engine, [5], greedy())
        assert outputs[-1].error is None
        goes_on.clear()
        await engine.add_request([5], LONG)
        await engine.shutdown()  # gives up waiting for the thread
        assert not engine.healthy
        goes_on.set()
        while engine._loop.thread.is_alive():
            await asyncio.sleep(0.01)

    run(work())
    assert_empty(engine.engine)


def test_outputs_that_nobody_reads_become_one(engine: AsyncEngine) -> None:
    async def work() -> None:
        stream = await engine.add_request([5, 6, 7], greedy(40), merge=True)
        while engine.stats().requests_finished == 0:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        (output,) = [output async for output in stream]
        assert output.outputs[0].new_token_ids == output.outputs[0].token_ids
        assert len(output.outputs[0].token_ids) == 40

    run(work())


@pytest.mark.parametrize("merge", [False, True])
def test_outputs_of_several_tokens(engine: AsyncEngine, merge: bool) -> None:
    async def work() -> None:
        params = greedy(14)
        stream = await engine.add_request([5, 6, 7], params, merge=merge, interval=4)
        outputs = [output async for output in stream]
        new = [len(output.outputs[0].new_token_ids) for output in outputs]
        if merge:  # what nobody read in time became part of the next
            assert all(count >= 4 for count in new[1:-1])
        else:
            assert new == [1, 4, 4, 4, 1]
        pieces = [token for output in outputs for token in output.outputs[0].new_token_ids]
        assert pieces == outputs[-1].outputs[0].token_ids
        several = SamplingParams(n=3, seed=4, max_tokens=11, ignore_eos=True)
        stream = await engine.add_request([5, 6, 7], several, interval=100)
        assert len([output async for output in stream]) == 2

    run(work())


@pytest.mark.parametrize("merge", [False, True])
def test_outputs_of_what_is_new_alone(engine: AsyncEngine, merge: bool) -> None:
    async def work() -> None:
        params = SamplingParams(n=2, seed=3, max_tokens=9, ignore_eos=True, logprobs=2)
        whole = await (await engine.add_request([5, 6, 7], params)).last()
        stream = await engine.add_request([5, 6, 7], params, merge=merge, delta=True)
        outputs = [output async for output in stream]
        for index, wanted in enumerate(whole.outputs):
            pieces = [output.outputs[index] for output in outputs]
            assert [token for one in pieces for token in one.token_ids] == wanted.token_ids
            assert [entry for one in pieces for entry in one.logprobs or []] == wanted.logprobs
            assert all(one.token_ids == one.new_token_ids for one in pieces)
            assert "".join(one.text for one in pieces) == wanted.text
            assert pieces[-1].cumulative_logprob == wanted.cumulative_logprob

    run(work())


def test_expert_load_is_counted_when_asked_for() -> None:
    model = make_model("qwen3_moe", 3)
    engine = AsyncEngine.from_model(
        model, config=make_engine(make_model("qwen3_moe", 3), record_expert_load=True).config
    )

    async def work() -> None:
        await outputs_of(engine, [5, 6, 7], greedy(4))
        load = await engine.expert_load()
        assert engine.fusion_report is not None
        assert len(load) == len(engine.fusion_report.blocks) == 2
        top_k = model.config.num_experts_per_tok
        # three tokens of the prompt, and three of the four generated ones go through the model
        assert [sum(counts) for counts in load.values()] == [6 * top_k] * 2
        await engine.shutdown()

    run(work())


def test_expert_load_is_refused_otherwise(engine: AsyncEngine) -> None:
    with pytest.raises(ConfigError, match="record_expert_load"):
        asyncio.run(engine.expert_load())
