"""How long text takes: the first token, the tokens after it, many prompts.

A backend generates; a run measures one or several on the same random prompts in turns.
Shape letters: B prompts of a batch, N prompts in all, S tokens of a prompt.
"""

from __future__ import annotations

import itertools
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetor.engine import Engine, SamplingParams
from moetor.engine.sequence import Request
from moetor.errors import MoetorError
from moetor.layer import MoELayer


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """One batch, in seconds.

    Attributes:
        first: from the call to the first generated tokens on the host.
        later: between the tokens of each step and of the one before.
    """

    first: float
    later: tuple[float, ...]

    @property
    def total(self) -> float:
        """To the last token."""
        return self.first + sum(self.later)


class TextBackend(ABC):
    """What turns prompts into tokens, greedily and to a given length."""

    name: str

    @abstractmethod
    def generate(self, prompts_BS: Tensor, new_tokens: int) -> StepTimes:
        """One batch, all prompts at once.

        Args:
            prompts_BS: token ids, int64, on the host.
            new_tokens: for every prompt, whatever they are.
        """

    def generate_all(self, prompts_NS: Tensor, new_tokens: int, batch_size: int) -> float:
        """Seconds for all prompts, at most `batch_size` at once; here in batches one after another,
        a backend with a scheduler does better."""
        start = time.perf_counter()
        for batch in prompts_NS.split(batch_size):
            self.generate(batch, new_tokens)
        return time.perf_counter() - start


class EngineBackend(TextBackend):
    """Our engine.

    Args:
        engine: nobody else may drive it; without prefix caching, for the prompts come again.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine
        self._numbers = itertools.count()

    def generate(self, prompts_BS: Tensor, new_tokens: int) -> StepTimes:
        """See `TextBackend.generate`: a token counts when every prompt has as many."""
        start = time.perf_counter()
        requests = self._add(prompts_BS, new_tokens)
        length = prompts_BS.shape[1]
        marks: list[float] = []
        core = self._engine.core
        while not core.idle:
            core.step()
            now, shortest = time.perf_counter(), min(map(_generated(length), requests))
            marks += [now] * (shortest - len(marks))
        self._check(requests, new_tokens)
        later = tuple(after - before for before, after in itertools.pairwise(marks))
        return StepTimes(first=marks[0] - start, later=later)

    def generate_all(self, prompts_NS: Tensor, new_tokens: int, batch_size: int) -> float:
        """Seconds for all prompts, which the engine takes as it has room."""
        start = time.perf_counter()
        requests = self._add(prompts_NS, new_tokens)
        while not self._engine.core.idle:
            self._engine.core.step()
        seconds = time.perf_counter() - start
        self._check(requests, new_tokens)
        return seconds

    def _add(self, prompts_NS: Tensor, new_tokens: int) -> list[Request]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        requests = [
            self._engine.intake.request(prompt, params, f"bench-{next(self._numbers)}")
            for prompt in prompts_NS.tolist()
        ]
        for request in requests:
            self._engine.core.add(request)
        return requests

    def _check(self, requests: Sequence[Request], new_tokens: int) -> None:
        for request in requests:
            if request.error is not None:
                raise MoetorError(f"the engine failed: {request.error}")
            made = len(request.sequences[0].output_ids)
            if made != new_tokens:
                raise MoetorError(f"the engine was asked for {new_tokens} tokens and made {made}")


def _generated(length: int) -> Callable[[Request], int]:
    return lambda request: request.sequences[0].known - length


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Prompts of one length, of random tokens.

    Attributes:
        batch_size: B, or for `throughput` the most prompts at once.
        prompts: N; equal to `batch_size` for `latency`.
    """

    input_length: int
    output_length: int
    batch_size: int
    prompts: int
    vocabulary: int
    seed: int

    def draw(self) -> Tensor:
        """Token ids int64 [N, S]."""
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.prompts, self.input_length)
        return torch.randint(0, self.vocabulary, size, generator=generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyRow:
    """Medians over rounds, in seconds.

    Attributes:
        warm_up: the first batch, with whatever is compiled or captured then.
        first: time to the first token (TTFT).
        per_token: time per later token (TPOT): the mean within a round.
        total: a whole batch.
    """

    backend: str
    workload: Workload
    rounds: int
    warm_up: float
    first: float
    per_token: float | None
    total: float

    @property
    def output_rate(self) -> float:
        """Generated tokens per second, of all prompts of the batch."""
        return self.workload.batch_size * self.workload.output_length / self.total


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputRow:
    """Median seconds for all prompts, and what the first go took."""

    backend: str
    workload: Workload
    rounds: int
    warm_up: float
    total: float

    @property
    def output_rate(self) -> float:
        """Generated tokens per second."""
        return self.workload.prompts * self.workload.output_length / self.total

    @property
    def total_rate(self) -> float:
        """Tokens of prompts and generated ones per second."""
        work = self.workload
        return work.prompts * (work.input_length + work.output_length) / self.total


Step = Callable[[], None]


def measure_latency(
    backends: Sequence[TextBackend],
    workload: Workload,
    rounds: int,
    done: Step = lambda: None,
) -> list[LatencyRow]:
    """Each backend's batch, warmed up twice, then in turns.

    Args:
        done: called after every batch.
    """
    prompts = workload.draw()
    warm: dict[str, float] = {}
    taken: dict[str, list[StepTimes]] = {backend.name: [] for backend in backends}
    for backend in backends:
        warm[backend.name] = backend.generate(prompts, workload.output_length).total
        # CUDA graphs are captured when a compiled step is first used again.
        backend.generate(prompts, workload.output_length)
        done()
    for _ in range(rounds):
        for backend in backends:
            taken[backend.name].append(backend.generate(prompts, workload.output_length))
            done()
    rows = []
    for name, times in taken.items():
        later = [statistics.fmean(one.later) for one in times if one.later]
        rows.append(
            LatencyRow(
                backend=name,
                workload=workload,
                rounds=rounds,
                warm_up=warm[name],
                first=statistics.median(one.first for one in times),
                per_token=statistics.median(later) if later else None,
                total=statistics.median(one.total for one in times),
            )
        )
    return rows


def measure_throughput(
    backends: Sequence[TextBackend],
    workload: Workload,
    rounds: int,
    done: Step = lambda: None,
) -> list[ThroughputRow]:
    """Each backend's go at all prompts, once untimed, then in turns."""
    prompts = workload.draw()
    size, length = workload.batch_size, workload.output_length
    warm: dict[str, float] = {}
    taken: dict[str, list[float]] = {backend.name: [] for backend in backends}
    for backend in backends:
        warm[backend.name] = backend.generate_all(prompts, length, size)
        done()
    for _ in range(rounds):
        for backend in backends:
            taken[backend.name].append(backend.generate_all(prompts, length, size))
            done()
    return [
        ThroughputRow(
            backend=name,
            workload=workload,
            rounds=rounds,
            warm_up=warm[name],
            total=statistics.median(times),
        )
        for name, times in taken.items()
    ]


def decode_bytes(model: Any, batch_size: int) -> float:
    """Bytes of weights that a decoding step reads at least on the model's device: all of them once,
    but of the routed experts those that `batch_size` tokens meet on average if each is equally
    likely, and of the input embedding nothing. Keys and values come on top. Of a layer with experts
    in host memory, those that are cached count.

    Args:
        model: a `PreTrainedModel`, fused, so that its layers say what they are; of a spread one the
            part on this rank.
    """
    routed: set[int] = set()
    needed = 0.0
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        met = _met(layer, batch_size) * (1.0 - _on_host(layer))
        for parameter in layer.routed_experts.parameters():
            routed.add(id(parameter))
            needed += met * _local_bytes(parameter)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        routed.add(id(embedding.weight))
    for parameter in model.parameters():
        if id(parameter) not in routed:
            needed += _local_bytes(parameter)
    return needed


def host_decode_bytes(model: Any, batch_size: int) -> float:
    """The same of host memory, where experts are computed there and not cached on the GPU."""
    needed = 0.0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            size = sum(map(_local_bytes, layer.routed_experts.parameters()))
            needed += _met(layer, batch_size) * _on_host(layer) * size
    return needed


def _met(layer: MoELayer, batch_size: int) -> float:
    """The part of a layer's experts that so many tokens meet."""
    router = layer.config.router
    return float(1.0 - (1.0 - router.top_k / router.num_experts) ** batch_size)


def _on_host(layer: MoELayer) -> float:
    """The part of them that the host computes, if each is equally likely to be cached."""
    offload = layer.routed_experts.offload
    if offload is None:
        return 0.0
    return 1.0 - min(offload.group.cache_experts, offload.num_experts) / offload.num_experts


def _local_bytes(parameter: Tensor) -> int:
    """Of what is on this rank."""
    local: Tensor = getattr(parameter, "_local_tensor", parameter)
    return local.nbytes
