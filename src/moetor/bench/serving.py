"""Load on a server: many streamed completions, timed where the client stands."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from moetor.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingLoad:
    """What is sent.

    Attributes:
        url: of the server, without `/v1`.
        request_rate: requests a second, at random times (a Poisson process); infinity sends all at
            once.
        max_concurrency: requests under way at most; None for no bound.
        input_len, output_len: tokens of each prompt and of each answer.
        vocab_size: prompts are random ids below it; None asks the server's `/tokenizer_info`.
    """

    url: str
    model: str | None
    num_prompts: int
    input_len: int
    output_len: int
    request_rate: float
    max_concurrency: int | None
    vocab_size: int | None
    seed: int
    api_key: str | None


@dataclass(slots=True)
class RequestTimes:
    """One request; times in seconds of `time.perf_counter`."""

    begin: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingResult:
    """All requests, and how long they took together, in seconds."""

    requests: list[RequestTimes]
    seconds: float

    @property
    def good(self) -> list[RequestTimes]:
        """Those without an error."""
        return [one for one in self.requests if one.error is None]


async def measure_serving(load: ServingLoad, done: Callable[[int, int], None]) -> ServingResult:
    """Sends the load.

    Args:
        done: is called with the number of requests that ended, and of all.

    Raises:
        InputError: there is no such server, or it refuses the first request.
    """
    headers = {} if load.api_key is None else {"Authorization": f"Bearer {load.api_key}"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        load.url, headers=headers, connector=connector, timeout=timeout
    ) as session:
        model = load.model or await _first_model(session, load)
        draw = random.Random(load.seed)
        size = load.vocab_size or await _vocab_size(session)
        prompts = [
            [draw.randrange(size) for _ in range(load.input_len)] for _ in range(load.num_prompts)
        ]
        trial = await _ask(session, load, model, prompts[0])  # also warms the server up
        if trial.error is not None:
            raise InputError(f"the server at {load.url} refuses the first request: {trial.error}")
        gate = asyncio.Semaphore(load.max_concurrency or load.num_prompts)
        ended = 0

        async def one(prompt: list[int]) -> RequestTimes:
            nonlocal ended
            async with gate:
                times = await _ask(session, load, model, prompt)
            ended += 1
            done(ended, load.num_prompts)
            return times

        begin = time.perf_counter()
        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(one(prompt)))
            if load.request_rate != float("inf"):
                await asyncio.sleep(draw.expovariate(load.request_rate))
        requests = list(await asyncio.gather(*tasks))
        return ServingResult(requests=requests, seconds=time.perf_counter() - begin)


async def _first_model(session: aiohttp.ClientSession, load: ServingLoad) -> str:
    try:
        async with session.get("/v1/models") as answer:
            if answer.status != 200:
                raise InputError(f"the server at {load.url} answers {await answer.text()}")
            return str((await answer.json())["data"][0]["id"])
    except (aiohttp.ClientError, OSError) as error:
        raise InputError(f"there is no server at {load.url}: {error}; start one first") from error


async def _vocab_size(session: aiohttp.ClientSession) -> int:
    async with session.get("/tokenizer_info") as answer:
        if answer.status != 200:
            raise InputError("this server does not tell its vocabulary; give --vocab-size N")
        return int((await answer.json())["vocab_size"])


async def _ask(
    session: aiohttp.ClientSession, load: ServingLoad, model: str, prompt: list[int]
) -> RequestTimes:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times = RequestTimes(begin=time.perf_counter())
    try:
        async with session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                times.error = await answer.text()
                return times
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    _take(times, json.loads(line[6:]))
    except (aiohttp.ClientError, OSError, ValueError) as error:
        times.error = f"{type(error).__name__}: {error}"
    times.end = time.perf_counter()
    if times.error is None and not times.tokens:
        times.error = "the answer ended without a count of its tokens"
    return times


def _take(times: RequestTimes, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        times.error = str(chunk["error"].get("message"))
    elif chunk.get("choices") and chunk["choices"][0]["text"]:
        times.arrivals.append(time.perf_counter())
    if chunk.get("usage"):
        times.prompt_tokens = chunk["usage"]["prompt_tokens"]
        times.tokens = chunk["usage"]["completion_tokens"]


def summary(result: ServingResult) -> dict[str, Any]:
    """Figures of a run: counts, rates a second, and times in milliseconds.

    TTFT is the time to the first piece of text, ITL the time between two pieces, and TPOT what a
    token after the first took on average in a request.
    """
    good = [one for one in result.good if one.arrivals]
    generated = sum(one.tokens for one in good)
    given = sum(one.prompt_tokens for one in good)
    ttft = [one.arrivals[0] - one.begin for one in good]
    tpot = [
        (one.arrivals[-1] - one.arrivals[0]) / (one.tokens - 1) for one in good if one.tokens > 1
    ]
    itl = [
        later - before
        for one in good
        for before, later in zip(one.arrivals, one.arrivals[1:], strict=False)
    ]
    return {
        "successful_requests": len(good),
        "failed_requests": len(result.requests) - len(good),
        "duration_s": result.seconds,
        "input_tokens": given,
        "generated_tokens": generated,
        "request_throughput": len(good) / result.seconds,
        "output_throughput": generated / result.seconds,
        "total_throughput": (given + generated) / result.seconds,
        "ttft_ms": _spread(ttft),
        "tpot_ms": _spread(tpot),
        "itl_ms": _spread(itl),
        "e2e_ms": _spread([one.end - one.begin for one in good]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 99th percentile in milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {
        "mean": 1e3 * statistics.fmean(ordered),
        "median": 1e3 * statistics.median(ordered),
        "p99": 1e3 * last,
    }


_COUNTS = (
    ("Successful requests:", "successful_requests", "d"),
    ("Failed requests:", "failed_requests", "d"),
    ("Benchmark duration (s):", "duration_s", ".2f"),
    ("Total input tokens:", "input_tokens", "d"),
    ("Total generated tokens:", "generated_tokens", "d"),
    ("Request throughput (req/s):", "request_throughput", ".2f"),
    ("Output token throughput (tok/s):", "output_throughput", ".2f"),
    ("Total token throughput (tok/s):", "total_throughput", ".2f"),
)
_TIMES = (
    ("Time to First Token", "TTFT", "ttft_ms"),
    ("Time per Output Token (excl. 1st token)", "TPOT", "tpot_ms"),
    ("Inter-token Latency", "ITL", "itl_ms"),
    ("End-to-end Latency", "E2EL", "e2e_ms"),
)


def block(figures: dict[str, Any]) -> list[str]:
    """The figures as lines, in the form that benchmarks of servers have in common."""
    lines = ["{:=^50}".format(" Serving Benchmark Result ")]
    lines += [f"{text:<40} {figures[name]:<10{form}}".rstrip() for text, name, form in _COUNTS]
    for title, short, name in _TIMES:
        if figures[name] is None:
            continue
        lines.append(f"{title:-^50}")
        for text, key in (("Mean", "mean"), ("Median", "median"), ("P99", "p99")):
            lines.append(f"{f'{text} {short} (ms):':<40} {figures[name][key]:<10.2f}".rstrip())
    return [*lines, "=" * 50]
