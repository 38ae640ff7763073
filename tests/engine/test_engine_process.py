"""The engine in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Coroutine, Iterator
from pathlib import Path
from platform import libc_ver
from typing import Any

import pytest

from moetor import LLM, SamplingParams
from moetor.engine import (
    EngineConfig,
    EngineProcess,
    EngineStoppedError,
    ModelSource,
    RequestOutput,
)
from moetor.engine.wire import FrameReader, frame
from moetor.errors import CheckpointError, ConfigError

SOURCE = ModelSource(model="demo", dtype="float32")
CONFIG = EngineConfig(max_num_seqs=4, kv_cache_blocks=256, record_expert_load=True)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
PROMPTS = ("ROMEO:", "JULIET:\nI", "To be", "KING HENRY:", "First Citizen:", "My lord,")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 100))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32")


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    made = EngineProcess(SOURCE, CONFIG)
    yield made
    asyncio.run(made.shutdown())
    assert not made.healthy


@pytest.fixture
def own_engine() -> Iterator[EngineProcess]:
    made = EngineProcess(SOURCE, CONFIG)
    yield made
    asyncio.run(made.shutdown())


async def read(engine: EngineProcess, prompt: Any, params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in await engine.add_request(prompt, params)]


def assert_same(told: Any, own: Any) -> None:
    """Log-probabilities that differ by no more than what else is in the batch makes."""
    assert (told is None) == (own is None)
    for entry, its in zip(told or (), own or (), strict=True):
        assert (entry is None) == (its is None)
        assert set(entry or ()) == set(its or ())
        for token, found in (entry or {}).items():
            assert found.logprob == pytest.approx(its[token].logprob, abs=1e-4)
            assert (found.rank, found.decoded_token) == (its[token].rank, its[token].decoded_token)


CASES = {
    "greedy": SamplingParams(temperature=0, max_tokens=24),
    "stop": SamplingParams(temperature=0, max_tokens=40, stop=["you", "\n\n"]),
    "logprobs": SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1),
    "choices": SamplingParams(temperature=0.9, seed=5, n=3, max_tokens=12),
}


def test_it_says_what_the_engine_says(engine: EngineProcess, llm: LLM) -> None:
    async def work() -> None:
        for params in CASES.values():
            # at once: they share the first connection
            told = await asyncio.gather(*(read(engine, one, params) for one in PROMPTS))
            for outputs, own in zip(told, llm.generate(list(PROMPTS), params, False), strict=True):
                last = outputs[-1]
                assert last.finished
                assert last.prompt_token_ids == own.prompt_token_ids
                assert_same(last.prompt_logprobs, own.prompt_logprobs)
                for index, (one, its) in enumerate(zip(last.outputs, own.outputs, strict=True)):
                    assert one.token_ids == its.token_ids
                    assert one.text == its.text
                    assert_same(one.logprobs, its.logprobs)
                    assert one.finish_reason == its.finish_reason
                    assert one.stop_reason == its.stop_reason
                    assert one.cumulative_logprob == pytest.approx(its.cumulative_logprob)
                    pieces = [output.outputs[index] for output in outputs]
                    assert "".join(piece.new_text for piece in pieces) == its.text
                    new = [token for piece in pieces for token in piece.new_token_ids]
                    assert new == its.token_ids
        stats = engine.stats()
        assert stats.running == stats.waiting == stats.blocks_used == 0
        assert stats.requests_finished == len(CASES) * len(PROMPTS)
        load = await engine.expert_load()
        assert len(load) == len(engine.fused.blocks or []) == 4
        assert all(sum(counts) > 100 for counts in load.values())

    run(work())


def test_the_end_alone_can_be_waited_for(engine: EngineProcess, llm: LLM) -> None:
    async def work() -> None:
        params = CASES["greedy"]
        stream = await engine.add_request(PROMPTS[0], params, merge=True)
        output = await stream.last()
        (own,) = llm.generate(PROMPTS[0], params, False)
        assert output.outputs[0].text == own.outputs[0].text
        aborted = await engine.add_request(PROMPTS[0], LONG)
        await anext(aborted)
        await aborted.aclose()
        while engine.stats().running or engine.stats().requests_aborted != 1:
            await asyncio.sleep(0.001)

    run(work())


def test_a_killed_process_fails_all_that_waits(own_engine: EngineProcess) -> None:
    async def work() -> None:
        running = [await own_engine.add_request(one, LONG) for one in PROMPTS]  # two of them wait
        await anext(running[0])
        os.kill(own_engine.pid, signal.SIGKILL)
        for stream in running:
            last = await stream.last()
            assert last.outputs[0].finish_reason == "error"
            assert "ended by signal 9" in (last.error or "")
        assert not own_engine.healthy
        with pytest.raises(EngineStoppedError, match="signal 9"):
            await own_engine.add_request(PROMPTS[0], LONG)
        with pytest.raises(EngineStoppedError, match="signal 9"):
            await own_engine.expert_load()

    run(work())


def test_signals_for_the_whole_group_leave_it_to_its_owner(engine: EngineProcess) -> None:
    async def work() -> None:
        stream = await engine.add_request(PROMPTS[0], CASES["greedy"])
        await anext(stream)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine.pid, number)
        assert (await stream.last()).outputs[0].finish_reason == "length"

    run(work())


def test_shutdown_drains_then_aborts(own_engine: EngineProcess) -> None:
    async def work() -> None:
        short = await own_engine.add_request(PROMPTS[0], CASES["greedy"])
        long = await own_engine.add_request(PROMPTS[1], LONG)
        await own_engine.shutdown(drain_s=0.4)
        assert (await short.last()).outputs[0].finish_reason in ("length", "abort")
        assert (await long.last()).outputs[0].finish_reason == "abort"
        with pytest.raises(EngineStoppedError, match="shut down"):
            await own_engine.add_request(PROMPTS[0], LONG)

    run(work())


def test_what_cannot_be_built_is_told() -> None:
    with pytest.raises(CheckpointError, match="/nowhere"):
        EngineProcess(ModelSource(model="/nowhere"), CONFIG)
    with pytest.raises(ConfigError, match="live model"):
        EngineProcess(ModelSource(model=object()), CONFIG)


def test_frames_in_pieces_of_any_size(seed: int) -> None:
    said = [("a", seed), None, {"b": b"x" * 5000}, []]
    data = b"".join(frame(one) for one in said)
    for size in (1, 3, 7, 8, 100, len(data)):
        reader = FrameReader()
        pieces = [data[place : place + size] for place in range(0, len(data), size)]
        assert [one for piece in pieces for one in reader.feed(piece)] == said


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_its_heap_is_on_huge_pages_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str, wanted: str
) -> None:
    started: list[dict[str, str]] = []

    def start(*_: Any, env: dict[str, str], **__: Any) -> None:
        started.append(env)
        raise OSError("not started")

    monkeypatch.setenv("GLIBC_TUNABLES", given)
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="not started"):
        EngineProcess(SOURCE, CONFIG)
    assert started == [{**os.environ, "GLIBC_TUNABLES": wanted}]


def test_a_heap_has_huge_pages_where_there_are_some(engine: EngineProcess) -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    kind, version = libc_ver()
    able = kind == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    if not able or not modes.exists() or "[never]" in modes.read_text():
        pytest.skip("there are none here")
    lines = Path(f"/proc/{engine.pid}/smaps_rollup").read_text().splitlines()
    sizes = dict(line.split()[:2] for line in lines[1:])
    assert int(sizes["AnonHugePages:"]) > 0
