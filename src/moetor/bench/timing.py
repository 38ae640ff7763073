"""Timing several variants against each other in one run.

Samples of all variants are spread evenly over the run, so that what disturbs the machine for a
while disturbs all of them; medians are reported.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moetor.bench.rotation import Step

MIN_SECONDS, MIN_SAMPLES = 0.3, 5
CUDA_MIN_SECONDS = 0.1  # a GPU's times differ less from one to the next
_WARM_UP_SECONDS = 0.3
# A GPU at its power limit runs large products up to a fifth slower than one that has just paused.
RESTED_SAMPLES, REST_SECONDS = 3, 0.04

StepCall = Callable[[Step], Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds per call.

    Attributes:
        median, p10, p90: of calls back to back (`sustained`).
        samples: how many were taken.
        cuda_graph: whether calls were replayed from a CUDA graph; None on the CPU.
        rested: median of a GPU's calls after a pause each; None on the CPU.
    """

    median: float
    p10: float
    p90: float
    samples: int
    cuda_graph: bool | None
    rested: float | None = None


class Sampler(ABC):
    """One variant, to be timed."""

    cuda_graph: bool | None = None

    @property
    def least_seconds(self) -> float:
        """For how long it is sampled at least."""
        return MIN_SECONDS

    @abstractmethod
    def warm_up(self) -> float:
        """Runs untimed until later calls find everything in place; estimated seconds a sample."""

    @abstractmethod
    def sample(self) -> float:
        """Seconds per call, once."""

    def rested_sample(self) -> float | None:
        """The same after a pause, on a device whose clock follows its load; else None."""
        return None


class CpuSampler(Sampler):
    """Times single calls.

    Args:
        call: the variant.
        steps: endless; shared by all variants, so that no two calls in a row use one step and the
            weights that a variant reads are never those that the one before it left in the caches.
    """

    def __init__(self, call: StepCall, steps: Iterator[Step]) -> None:
        self._call = call
        self._steps = steps

    def warm_up(self) -> float:
        """At least one call; libraries prepare each product's shape when they first see it."""
        until = time.perf_counter() + _WARM_UP_SECONDS
        seconds = self.sample()
        while time.perf_counter() < until:
            seconds = min(seconds, self.sample())
        return seconds

    def sample(self) -> float:
        """The next step."""
        step = next(self._steps)
        start = time.perf_counter()
        self._call(step)
        return time.perf_counter() - start


class CudaSampler(Sampler, Generic[Item]):
    """Times a pass over all steps, from one CUDA graph where the variant can be captured.

    A graph of the whole pass keeps the host out of the result: launching from Python takes longer
    than a small call does.

    Args:
        passes: how often the graph walks through the steps; a graph of few short calls would
            measure its own start.
        capture: False for a variant that waits for the device inside, which a graph cannot hold.
    """

    def __init__(
        self,
        call: Callable[[Item], Tensor],
        steps: Sequence[Item],
        *,
        passes: int = 1,
        capture: bool = True,
    ) -> None:
        self._call = call
        self._capture = capture
        self._steps = list(steps) * passes
        self._run: Callable[[], None] = self._all_steps
        self.cuda_graph = False

    @property
    def least_seconds(self) -> float:
        """See `Sampler.least_seconds`."""
        return CUDA_MIN_SECONDS

    def warm_up(self) -> float:
        """Compiles what compiles at the first call, then captures."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._all_steps()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if self._capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._all_steps()
            self._run = graph.replay
            self.cuda_graph = True
        return 2 * min(self.sample() for _ in range(3)) * len(self._steps)

    def sample(self) -> float:
        """One pass, divided by its number of calls, right behind an untimed one."""
        self._run()
        return self._timed()

    def rested_sample(self) -> float | None:
        """One pass after a pause."""
        torch.cuda.synchronize()
        time.sleep(REST_SECONDS)
        return self._timed()

    def _timed(self) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / len(self._steps)

    def _all_steps(self) -> None:
        for step in self._steps:
            self._call(step)


def endless(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, over and over."""
    return itertools.cycle(steps)


def measure(samplers: Mapping[str, Sampler], estimates: Mapping[str, float]) -> dict[str, Timing]:
    """Times every variant in one interleaved run.

    Args:
        samplers: warmed up.
        estimates: seconds of a sample of each, from its `warm_up`.
    """
    counts = {
        name: max(MIN_SAMPLES, math.ceil(sampler.least_seconds / estimates[name]))
        for name, sampler in samplers.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    for name in spread(counts):
        taken[name].append(samplers[name].sample())
    rested: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(RESTED_SAMPLES):
        for name, sampler in samplers.items():
            seconds = sampler.rested_sample()
            if seconds is not None:
                rested[name].append(seconds)
    return {
        name: summarize(taken[name], samplers[name].cuda_graph, rested[name]) for name in samplers
    }


def spread(counts: Mapping[str, int]) -> list[str]:
    """Each name as often as it counts, spread evenly over the whole: a name's n-th place is drawn
    from the n-th of equal parts. In a fixed order each variant would meet the same few steps of the
    rotation again and again."""
    draw = random.Random(0).random
    places = [
        ((number + draw()) / count, name)
        for name, count in counts.items()
        for number in range(count)
    ]
    return [name for _, name in sorted(places)]


def summarize(
    seconds: Sequence[float], cuda_graph: bool | None = None, rested: Sequence[float] = ()
) -> Timing:
    """Median and the 10th and 90th percentiles, interpolated between samples."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(
        median=statistics.median(seconds),
        p10=deciles[0],
        p90=deciles[-1],
        samples=len(seconds),
        cuda_graph=cuda_graph,
        rested=statistics.median(rested) if rested else None,
    )
