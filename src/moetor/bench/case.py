"""One shape at one T: every implementation checked, then timed in turns.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from moetor.bench.floor import Work, layer_work
from moetor.bench.hardware import OtherUse, available_memory
from moetor.bench.llama_cpp import LLAMA_CPP, llama_cpp_refusal
from moetor.bench.peers import make_peer, refusal
from moetor.bench.plan_variants import VariantCall, plan_variants
from moetor.bench.request import LayerBenchRequest
from moetor.bench.rotation import Rotation, Step
from moetor.bench.shapes import LayerShape
from moetor.bench.timing import CpuSampler, CudaSampler, Sampler, StepCall, Timing, endless, measure
from moetor.errors import MoetorError
from moetor.kernels.base import ExpertsKernel, ExpertWeights
from moetor.kernels.reference import ReferenceKernel

# Relative error (Euclidean norms) of an output against float32 arithmetic on the same weights.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Transformers rounds each expert's output and adds them in the hidden states' dtype.
_PEER_TOLERANCE = 4.0
# Where inputs become codes: one that lies between two may become either, after other arithmetic.
_CODES_TOLERANCE = 3e-2
# On a CPU the float32 arithmetic of a whole batch takes longer than everything else.
_CPU_CHECKED_TOKENS = 3
_CALL_LIMIT_SECONDS = 20.0
_HIDDEN_STATES = 4  # different ones, in turn
# A CUDA graph of fewer short calls would measure its own start.
_GRAPH_CALLS, _SHORT_TOKENS = 16, 256
# They ask the device which experts have tokens; the report says that they were launched one by one.
_HOST_READERS = ("eager", "torch", "reference")
# A row during which other processes took more of the cores than this is measured again.
QUIET = 0.05
_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimes:
    """Times of one shape at one T.

    Attributes:
        kernel: name of the kernel of ours that ran.
        max_error: its relative error against float32 arithmetic.
        work: what a call must do, a mean over the rotation.
        timings: by implementation: the kernel's name, then other plans of it, then the peers.
        works: the same of quantised variants, which read fewer bytes.
        skipped: plans and peers that were left out, each with its reason.
        other_use: fraction of all cores' time that everything else on the machine took meanwhile;
            None where the system does not say, and on a GPU.
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
    works: dict[str, Work] = field(default_factory=dict)

    def work_of(self, name: str) -> Work:
        """What a call of an implementation must do."""
        return self.works.get(name, self.work)


def first_line(failure: Exception) -> str:
    """What went wrong, short enough for a table's foot."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return lines[0][:200]


class CopiedSets(Protocol):
    """The weight sets in other formats, under labels by which rows of a table are called."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all formats."""

    def rounds_inputs(self, label: str) -> bool:
        """Whether the inputs of its products become codes too."""

    def run(
        self, label: str, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, weight_set: int
    ) -> Tensor:
        """The layer's output [T, H]."""

    def reference(
        self, label: str, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, weight_set: int
    ) -> Tensor:
        """The same in float32 arithmetic, on the same codes."""

    def work(self, label: str, plain: Work) -> Work:
        """The work of a call whose twin in the request's dtype has `plain`."""


class Case:
    """One shape at one T.

    Args:
        weights: the sets that `rotation` walks through.
        copies: the same sets in other formats.
    """

    def __init__(
        self,
        request: LayerBenchRequest,
        shape: LayerShape,
        kernel: ExpertsKernel,
        weights: Sequence[ExpertWeights],
        tokens: int,
        rotation: Rotation,
        copies: Sequence[CopiedSets],
    ) -> None:
        self.copies = {label: sets for sets in copies for label in sets.labels}
        self.request, self.shape, self.kernel, self.weights = request, shape, kernel, weights
        self.tokens, self.rotation = tokens, rotation
        self.steps = [step.to(request.device) for step in rotation.steps]
        self.hidden = self._hidden_states()
        self.expected = self._reference(self.steps[0])
        self._expected_of = {
            label: self._copied_reference(label, self.steps[0]) for label in self.copies
        }

    def times(self) -> LayerTimes:
        """Checks, warms up and measures every implementation.

        Raises:
            MoetorError: our kernel's output is wrong.
        """
        error = self._error(self._ours, self.expected)
        tolerance = TOLERANCES[self.request.dtype]
        if not error <= tolerance:
            raise MoetorError(
                f"kernel {self.kernel.name!r} is wrong: relative error {error:.1e}, tolerance "
                f"{tolerance:.1e}"
            )
        shared = endless(self.steps)
        samplers = {self.kernel.name: self._sampler(self.kernel.name, self._ours, shared)}
        estimates = {self.kernel.name: samplers[self.kernel.name].warm_up()}
        skipped: dict[str, str] = {}
        for name, call in self._others():
            answer = call if isinstance(call, str) else self._warm(name, call, shared)
            if isinstance(answer, str):
                skipped[name] = answer
            else:
                samplers[name], estimates[name] = answer
        timings, other_use = self._measure(samplers, estimates)
        work = layer_work(
            self.shape,
            self.rotation.active_experts,
            self.rotation.slots,
            self.request.dtype.itemsize,
        )
        return LayerTimes(
            shape=self.shape,
            tokens=self.tokens,
            kernel=self.kernel.name,
            max_error=error,
            rotation=self.rotation,
            work=work,
            timings=timings,
            skipped=skipped,
            other_use=other_use,
            works={label: sets.work(label, work) for label, sets in self.copies.items()},
        )

    def _measure(
        self, samplers: dict[str, Sampler], estimates: dict[str, float]
    ) -> tuple[dict[str, Timing], float | None]:
        """The least disturbed of a few measurements; one is enough on a quiet machine, and on a
        GPU, where the processor takes no part."""
        if self.request.device == "cuda":
            return measure(samplers, estimates), None
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

    def _hidden_states(self) -> list[Tensor]:
        device, dtype = self.request.device, self.request.dtype
        generator = torch.Generator(device).manual_seed(self.request.seed)
        size = (self.tokens, self.shape.experts.hidden_size)
        return [
            torch.randn(size, generator=generator, device=device).to(dtype)
            for _ in range(min(_HIDDEN_STATES, len(self.steps)))
        ]

    def _hidden(self, step: Step) -> Tensor:
        return self.hidden[step.number % len(self.hidden)]

    def _ours(self, step: Step) -> Tensor:
        return self.kernel(
            self._hidden(step),
            step.topk_weights,
            step.topk_ids,
            self.weights[step.weight_set],
            self.shape.experts,
        )

    def _others(self) -> Iterator[tuple[str, StepCall | str]]:
        """Other plans and peers, each as a call or as the reason why it is left out."""
        itemsize = self.request.dtype.itemsize
        if self.request.variants:
            kinds = self.request.variants
            for name, variant in plan_variants(self.shape, self.tokens, itemsize, kinds):
                yield name, self._variant(variant)
        for label in self.copies:
            yield label, partial(self._run_copied, label)
        device = self.request.device
        for name in self.request.peers:
            if name == LLAMA_CPP:
                if (reason := llama_cpp_refusal(self.shape)) is not None:
                    yield name, reason
                continue
            free = available_memory(device) // 2
            reason = refusal(name, self.shape, self.tokens, itemsize, device, free)
            yield name, self._peer(name) if reason is None else reason

    def _run_copied(self, label: str, step: Step) -> Tensor:
        return self.copies[label].run(
            label, self._hidden(step), step.topk_weights, step.topk_ids, step.weight_set
        )

    def _variant(self, variant: VariantCall) -> StepCall:
        def call(step: Step) -> Tensor:
            weights = self.weights[step.weight_set]
            return variant(self._hidden(step), step.topk_weights, step.topk_ids, weights)

        return call

    def _peer(self, name: str) -> StepCall:
        peers = [make_peer(name, self.shape, weights) for weights in self.weights]

        def call(step: Step) -> Tensor:
            return peers[step.weight_set](self._hidden(step), step.topk_weights, step.topk_ids)

        return call

    def _sampler(self, name: str, call: StepCall, shared: Iterator[Step]) -> Sampler:
        if self.request.device != "cuda":
            return CpuSampler(call, shared)
        passes = -(-_GRAPH_CALLS // len(self.steps)) if self.tokens <= _SHORT_TOKENS else 1
        return CudaSampler(call, self.steps, passes=passes, capture=name not in _HOST_READERS)

    def _warm(
        self, name: str, call: StepCall, shared: Iterator[Step]
    ) -> tuple[Sampler, float] | str:
        """An implementation ready to be measured and its estimated time, or why it is left out."""
        limit = TOLERANCES[self.request.dtype]
        if name in self.request.peers:
            limit *= _PEER_TOLERANCE
        if name in self.copies and self.copies[name].rounds_inputs(name):
            limit = max(limit, _CODES_TOLERANCE)
        sampler = self._sampler(name, call, shared)
        try:
            expected = self._expected_of.get(name, self.expected)
            error = 0.0 if name == "dense" else self._error(call, expected)
            if not error <= limit:
                return f"computes something else: relative error {error:.1e}, expected {limit:.1e}"
            seconds = sampler.warm_up()
        except Exception as failure:  # a dtype that it lacks, out of memory, a compiler's error
            return f"fails: {first_line(failure)}"
        if seconds > _CALL_LIMIT_SECONDS:
            return f"took {seconds:.0f} s a call; left out above {_CALL_LIMIT_SECONDS:.0f} s"
        return sampler, seconds

    def _checked_rows(self) -> list[int]:
        if self.request.device == "cuda":
            return list(range(self.tokens))
        return sorted({*range(min(_CPU_CHECKED_TOKENS - 1, self.tokens)), self.tokens - 1})

    def _reference(self, step: Step) -> Tensor:
        rows = self._checked_rows()
        return ReferenceKernel()(
            self._hidden(step)[rows].float(),
            step.topk_weights[rows],
            step.topk_ids[rows],
            self.weights[step.weight_set],
            self.shape.experts,
        )

    def _copied_reference(self, label: str, step: Step) -> Tensor:
        rows = self._checked_rows()
        return self.copies[label].reference(
            label,
            self._hidden(step)[rows],
            step.topk_weights[rows],
            step.topk_ids[rows],
            step.weight_set,
        )

    def _error(self, call: StepCall, expected: Tensor) -> float:
        # What a kernel does not write shall not be the right answer of the one before it.
        torch.full_like(self._hidden(self.steps[0]), float("nan"))
        out = call(self.steps[0])[self._checked_rows()].float()
        return float((out - expected).norm() / expected.norm())
