"""`moetor bench layer`: the routed experts of one layer against Transformers and the machine.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moetor.bench.ceilings import Ceilings, measure_ceilings
from moetor.bench.floor import Work, layer_work
from moetor.bench.hardware import OtherUse, available_memory, last_level_cache
from moetor.bench.peers import make_peer, refusal
from moetor.bench.rotation import Rotation, RotationRequest, Step, plan_rotation
from moetor.bench.shapes import LayerShape, check_tokens
from moetor.bench.timing import CpuSampler, CudaSampler, Sampler, StepCall, Timing, endless, measure
from moetor.bench.weights import make_weights
from moetor.errors import MoetorError, UnsupportedError
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.select import select_kernel
from moetor.layer.routing.simulator import Pattern

# Relative error (Euclidean norms) of an output against float32 arithmetic on the same weights.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Transformers rounds each expert's output and adds them in the hidden states' dtype.
_PEER_TOLERANCE = 4.0
_CHECKED_TOKENS = 3
# Of the free memory, what weights may take; the rest is for the calls.
_WEIGHTS_SHARE = 0.6
_UNKNOWN_CACHE = 64 * 2**20
_CALL_LIMIT_SECONDS = 20.0
# A row during which other processes took more of the cores than this is measured again.
QUIET = 0.05
_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBenchRequest:
    """What to measure.

    Attributes:
        tokens: each T to measure.
        device: `cpu` or `cuda`.
        threads: of the CPU; None leaves torch's setting.
        kernel: a kernel's name, or `auto`.
        peers: Transformers' implementations to compare with.
    """

    shapes: tuple[LayerShape, ...]
    tokens: tuple[int, ...]
    dtype: torch.dtype
    device: str
    threads: int | None
    kernel: str
    peers: tuple[str, ...]
    routing: Pattern
    seed: int

    def __post_init__(self) -> None:
        check_tokens(self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimes:
    """Times of one shape at one T.

    Attributes:
        kernel: name of the kernel of ours that ran.
        max_error: its relative error against float32 arithmetic.
        work: what a call must do, a mean over the rotation.
        timings: by implementation: the kernel's name, then the peers.
        skipped: peers that were left out, each with its reason.
        other_use: fraction of all cores' time that everything else on the machine took meanwhile;
            None where the system does not say.
    """

    shape: LayerShape
    tokens: int
    kernel: str
    max_error: float
    rotation: Rotation
    work: Work
    timings: dict[str, Timing]
    skipped: dict[str, str]
    other_use: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """A whole run.

    Attributes:
        threads: of the CPU, as it ran.
        ceilings: the higher of each rate before and after the run.
        ceilings_before, ceilings_after: the two measurements: how steady the machine was.
    """

    request: LayerBenchRequest
    threads: int
    ceilings: Ceilings
    ceilings_before: Ceilings
    ceilings_after: Ceilings
    times: tuple[LayerTimes, ...]


def bench_layers(
    request: LayerBenchRequest, progress: Callable[[int, int], None] = lambda done, total: None
) -> LayerReport:
    """Measures every shape at every T.

    Args:
        progress: called with (steps done, steps in all).

    Raises:
        UnsupportedError: no GPU, or not enough memory; before anything is measured.
        KernelRefusedError: the kernel does not run a shape; before anything is measured.
        MoetorError: the kernel's output is wrong.
    """
    _check_device(request.device)
    with _threads(request.threads), torch.inference_mode():
        kernels = {shape.name: _kernel(request, shape) for shape in request.shapes}
        _check_memory(request)
        total = len(request.shapes) * len(request.tokens) + 2
        progress(0, total)
        before = measure_ceilings(request.device, request.dtype)
        progress(1, total)
        times: list[LayerTimes] = []
        for shape in request.shapes:
            for row in _shape_times(request, shape, kernels[shape.name]):
                times.append(row)
                progress(len(times) + 1, total)
            gc.collect()
            if request.device == "cuda":
                torch.cuda.empty_cache()
        after = measure_ceilings(request.device, request.dtype)
        progress(total, total)
        threads = torch.get_num_threads()
    return LayerReport(
        request=request,
        threads=threads,
        ceilings=before.best_with(after),
        ceilings_before=before,
        ceilings_after=after,
        times=tuple(times),
    )


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            "device cuda: torch sees no NVIDIA GPU here; use --device cpu, or a torch build with "
            "CUDA on a machine with a GPU"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kernel(request: LayerBenchRequest, shape: LayerShape) -> ExpertsKernel:
    query = KernelQuery(
        device=request.device, dtype=request.dtype, experts=shape.experts, top_k=shape.top_k
    )
    return select_kernel(query, request.kernel).kernel


def _check_memory(request: LayerBenchRequest) -> None:
    free = available_memory(request.device)
    for shape in request.shapes:
        needed = shape.parameters * request.dtype.itemsize
        if needed > _WEIGHTS_SHARE * free:
            raise UnsupportedError(
                f"shape {shape.name} takes {needed / 1e9:.2f} GB of weights in "
                f"{str(request.dtype).removeprefix('torch.')}, and of {free / 1e9:.2f} GB of free "
                f"{request.device} memory {_WEIGHTS_SHARE:.0%} may be used; choose a smaller shape "
                f"or dtype"
            )


def _shape_times(
    request: LayerBenchRequest, shape: LayerShape, kernel: ExpertsKernel
) -> Iterator[LayerTimes]:
    """The rows of one shape; the weights live as long as it takes."""
    itemsize = request.dtype.itemsize
    cache = last_level_cache(request.device) or _UNKNOWN_CACHE
    room = int(_WEIGHTS_SHARE * available_memory(request.device))
    rotations = [
        plan_rotation(
            RotationRequest(
                num_experts=shape.experts.num_experts,
                top_k=shape.top_k,
                tokens=tokens,
                pattern=request.routing,
                seed=request.seed,
                expert_bytes=shape.parameters_per_expert * itemsize,
                target_bytes=2 * cache,
                max_sets=max(1, room // (shape.parameters * itemsize)),
            )
        )
        for tokens in request.tokens
    ]
    num_sets = max(rotation.num_sets for rotation in rotations)
    weights = make_weights(shape, num_sets, request.dtype, request.device, request.seed)
    for tokens, rotation in zip(request.tokens, rotations, strict=True):
        yield _Case(request, shape, kernel, weights, tokens, rotation).times()


class _Case:
    """One shape at one T."""

    def __init__(
        self,
        request: LayerBenchRequest,
        shape: LayerShape,
        kernel: ExpertsKernel,
        weights: Sequence[ExpertWeights],
        tokens: int,
        rotation: Rotation,
    ) -> None:
        self.request, self.shape, self.kernel, self.weights = request, shape, kernel, weights
        self.tokens, self.rotation = tokens, rotation
        self.steps = [step.to(request.device) for step in rotation.steps]
        generator = torch.Generator().manual_seed(request.seed)
        hidden_TH = torch.randn((tokens, shape.experts.hidden_size), generator=generator)
        self.hidden_TH = hidden_TH.to(device=request.device, dtype=request.dtype)
        self.expected = self._reference(self.steps[0])

    def times(self) -> LayerTimes:
        """Checks, warms up and measures every implementation."""
        error = self._error(self._ours)
        tolerance = TOLERANCES[self.request.dtype]
        if not error <= tolerance:
            raise MoetorError(
                f"kernel {self.kernel.name!r} is wrong on shape {self.shape.name} at "
                f"{self.tokens} tokens: relative error {error:.1e}, tolerance {tolerance:.1e}; "
                f"nothing is reported"
            )
        shared = endless(self.steps)
        samplers = {self.kernel.name: self._sampler(self._ours, shared)}
        estimates = {self.kernel.name: samplers[self.kernel.name].warm_up()}
        skipped: dict[str, str] = {}
        for name in self.request.peers:
            answer = self._warm_peer(name, shared)
            if isinstance(answer, str):
                skipped[name] = answer
            else:
                samplers[name], estimates[name] = answer
        timings, other_use = self._measure(samplers, estimates)
        itemsize = self.request.dtype.itemsize
        return LayerTimes(
            shape=self.shape,
            tokens=self.tokens,
            kernel=self.kernel.name,
            max_error=error,
            rotation=self.rotation,
            work=layer_work(
                self.shape, self.rotation.active_experts, self.rotation.slots, itemsize
            ),
            timings=timings,
            skipped=skipped,
            other_use=other_use,
        )

    def _measure(
        self, samplers: dict[str, Sampler], estimates: dict[str, float]
    ) -> tuple[dict[str, Timing], float | None]:
        """The least disturbed of a few measurements; one is enough on a quiet machine."""
        best: tuple[dict[str, Timing], float | None] | None = None
        for _ in range(_TRIES):
            others = OtherUse()
            timings = measure(samplers, estimates)
            use = others.share()
            if best is None or (use or 0.0) < (best[1] or 0.0):
                best = (timings, use)
            if (use or 0.0) <= QUIET:
                break
        assert best is not None, "_TRIES is at least 1"
        return best

    def _ours(self, step: Step) -> Tensor:
        return self.kernel(
            self.hidden_TH,
            step.topk_weights,
            step.topk_ids,
            self.weights[step.weight_set],
            self.shape.experts,
        )

    def _peer(self, name: str) -> StepCall:
        modules = [make_peer(name, self.shape, weights) for weights in self.weights]
        # The routers of Transformers answer with int64 ids and weights of the model's dtype.
        routings = [
            (step.topk_weights.to(self.request.dtype), step.topk_ids.long()) for step in self.steps
        ]

        def call(step: Step) -> Tensor:
            return modules[step.weight_set](self.hidden_TH, *routings[step.number])

        return call

    def _sampler(self, call: StepCall, shared: Iterator[Step]) -> Sampler:
        if self.request.device == "cuda":
            return CudaSampler(call, self.steps)
        return CpuSampler(call, shared)

    def _warm_peer(self, name: str, shared: Iterator[Step]) -> tuple[Sampler, float] | str:
        """A peer ready to be measured and its estimated time, or why it is left out."""
        device = self.request.device
        free = available_memory(device) // 2
        reason = refusal(name, self.shape, self.tokens, self.request.dtype.itemsize, device, free)
        if reason is not None:
            return reason
        call = self._peer(name)
        tolerance = _PEER_TOLERANCE * TOLERANCES[self.request.dtype]
        try:
            error = self._error(call)
        except RuntimeError as failure:  # a dtype that it lacks, or out of memory
            return f"fails: {str(failure).splitlines()[0]}"
        if not error <= tolerance:
            return f"computes something else: relative error {error:.1e}, expected {tolerance:.1e}"
        sampler = self._sampler(call, shared)
        seconds = sampler.warm_up()
        if seconds > _CALL_LIMIT_SECONDS:
            return f"took {seconds:.0f} s a call; left out above {_CALL_LIMIT_SECONDS:.0f} s"
        return sampler, seconds

    def _checked_rows(self) -> list[int]:
        return sorted({*range(min(_CHECKED_TOKENS - 1, self.tokens)), self.tokens - 1})

    def _reference(self, step: Step) -> Tensor:
        rows = self._checked_rows()
        return ReferenceKernel()(
            self.hidden_TH[rows].float(),
            step.topk_weights[rows],
            step.topk_ids[rows],
            self.weights[step.weight_set],
            self.shape.experts,
        )

    def _error(self, call: StepCall) -> float:
        out = call(self.steps[0])[self._checked_rows()].float()
        return float((out - self.expected).norm() / self.expected.norm())
