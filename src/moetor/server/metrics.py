"""`/metrics`: figures of requests and of the experts for Prometheus, under vLLM's names."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from moetor.engine import EngineClient
from moetor.engine.sequence import Request as EngineRequest
from moetor.server.experts import balancedness

_Buckets = tuple[float, ...]
_SLOW: _Buckets = (0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TTFT: _Buckets = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, *_SLOW, 160, 640, 2560)
_TOKEN: _Buckets = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, *_SLOW)
_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_LENGTH = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))


class Metrics:
    """Counts the requests of one server.

    Args:
        engine: whose counters are told beside.
        model: name of the model, a label of every figure.
        expert_tokens: whether each expert's tokens are told, a line for each.

    Attributes:
        registry: what `/metrics` prints.
    """

    def __init__(self, engine: EngineClient, model: str, *, expert_tokens: bool) -> None:
        self.registry = CollectorRegistry()
        self._collector = _EngineCollector(engine, model, expert_tokens)
        self.registry.register(self._collector)
        self._reasons = Counter(
            "vllm:request_success",
            "Choices that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._model = model

        def histogram(name: str, text: str, buckets: _Buckets) -> Any:
            made = Histogram(
                f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry
            )
            return made.labels(model)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to token.", _TTFT)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean of a request after the first.", _TOKEN
        )
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "Before the first step.", _REQUEST)
        self._prompt = histogram("request_prompt_tokens", "Of a prompt.", _LENGTH)
        self._generated = histogram("request_generation_tokens", "Of a choice.", _LENGTH)

    def ended(self, reason: str, choices: int) -> None:
        """Choices ended for a reason."""
        self._reasons.labels(self._model, reason).inc(choices)

    def text(self, expert_load: Mapping[str, Sequence[int]] | None) -> bytes:
        """What `/metrics` answers.

        Args:
            expert_load: tokens of each expert by layer, where they are counted.
        """
        self._collector.expert_load = expert_load
        return generate_latest(self.registry)

    def token_times(self, before: dict[int, float], number: int, new: int) -> None:
        """Notes the time between tokens.

        Args:
            before: of the request: when each choice had its last token; is brought up to date.
            number: of the choice.
            new: tokens that came now.
        """
        if not new:
            return
        now, last = time.monotonic(), before.get(number)
        if last is not None:
            # Tokens that came together share the time since the one before.
            self._collector.gaps.add((now - last) / new, new)
        before[number] = now

    def finished(self, request: EngineRequest) -> None:
        """Notes a request that is over."""
        times = request.metrics
        self._prompt.observe(len(request.prompt_ids))
        lengths = [one.known - one.prompt_len for one in request.sequences]
        for one, length in zip(request.sequences, lengths, strict=True):
            self.ended(one.finish_reason or "error", 1)
            self._generated.observe(length)
        if times.first_scheduled_time is not None:
            self._queue.observe(times.first_scheduled_time - times.arrival_time)
        if times.finished_time is None or times.first_token_time is None:
            return
        self._ttft.observe(times.first_token_time - times.arrival_time)
        self._e2e.observe(times.finished_time - times.arrival_time)
        if max(lengths) > 1:
            decoding = times.finished_time - times.first_token_time
            self._tpot.observe(decoding / (max(lengths) - 1))


class _Gaps:
    """The times between tokens: a histogram that is cheap to add to, since every token does."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_TOKEN) + 1)
        self._sum = 0.0

    def add(self, seconds: float, count: int) -> None:
        """Counts one time `count` times."""
        self._counts[bisect_left(_TOKEN, seconds)] += count
        self._sum += seconds * count

    def told(self) -> tuple[list[tuple[str, float]], float]:
        """Upper bounds as text with the times up to them, and the sum of all."""
        bounds = [*(str(float(bound)) for bound in _TOKEN), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum


class _EngineCollector(Collector):
    """Reads the engine's own counters when it is asked."""

    def __init__(self, engine: EngineClient, model: str, expert_tokens: bool) -> None:
        self._engine, self._model, self._expert_tokens = engine, model, expert_tokens
        self.expert_load: Mapping[str, Sequence[int]] | None = None
        self.gaps = _Gaps()

    def describe(self) -> list[Metric]:
        return []  # nothing is read when the collector is registered

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            "num_requests_running": ("Sequences that are computed.", stats.running),
            "num_requests_waiting": ("Sequences that wait.", stats.waiting),
            "kv_cache_usage_perc": ("Share of the cache's blocks in use.", stats.kv_cache_usage),
        }
        counters = {
            "prompt_tokens": ("Computed for prompts.", stats.prompt_tokens),
            "generation_tokens": ("Generated.", stats.generated_tokens),
            "prefix_cache_queries": ("Prompt tokens looked for.", stats.prefix_query_tokens),
            "prefix_cache_hits": ("Prompt tokens found.", stats.prefix_hit_tokens),
            "num_preemptions": ("Sequences that were computed again.", stats.preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        gaps = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between two tokens.", labels=["model_name"]
        )
        gaps.add_metric([self._model], *self.gaps.told())
        yield gaps
        yield from self._experts()

    def _experts(self) -> Iterator[Metric]:
        blocks = self._engine.fused.blocks
        if blocks is not None:
            info = GaugeMetricFamily(
                "moe_kernel_info", "What runs the experts.", labels=["layer", "level", "kernel"]
            )
            for block in blocks:
                info.add_metric([block["name"], block["level"], block["kernel"] or "none"], 1)
            yield info
        if self.expert_load is None:
            return
        balance = GaugeMetricFamily(
            "moe_balancedness", "Mean over maximum of the experts' tokens.", labels=["layer"]
        )
        tokens = CounterMetricFamily(
            "moe_expert_tokens", "Tokens of each expert.", labels=["layer", "expert"]
        )
        for layer, counts in self.expert_load.items():
            value = balancedness(counts)
            if value is not None:
                balance.add_metric([layer], value)
            for expert, count in enumerate(counts):
                tokens.add_metric([layer, str(expert)], count)
        yield balance
        if self._expert_tokens:
            yield tokens
