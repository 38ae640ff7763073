"""`moetor bench layer`: the routed experts of one layer against Transformers and the machine.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from moetor.bench.case import Case, CopiedSets, LayerTimes, first_line
from moetor.bench.ceilings import Ceilings, measure_ceilings
from moetor.bench.hardware import available_memory, last_level_cache
from moetor.bench.llama_cpp import (
    LLAMA_CPP,
    LlamaCppSets,
    bytes_of_types,
    check_llama_cpp,
    llama_cpp_refusal,
)
from moetor.bench.quantized import QuantizedSets, quantized_kernel, share_of_bytes
from moetor.bench.request import LayerBenchRequest
from moetor.bench.rotation import RotationRequest, plan_rotation
from moetor.bench.shapes import LayerShape
from moetor.bench.weights import make_weights
from moetor.errors import UnsupportedError
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery
from moetor.kernels.select import select_kernel

# Of the free memory, what weights may take; the rest is for the calls.
_WEIGHTS_SHARE = 0.6
_COMPILE_THREADS = 8
_UNKNOWN_CACHE = 64 * 2**20
# Bytes between two uses of an expert, in last-level caches. A GPU's is not one: each half of an
# H100 keeps copies of its own.
_COLD_CACHES = {"cpu": 2, "cuda": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """A whole run.

    Attributes:
        threads: of the CPU, as it ran.
        ceilings: the higher of each rate before and after the run.
        ceilings_before, ceilings_after: the two measurements: how steady the machine was; `after`
            is `before` in the report of an unfinished run.
        failures: rows that were not measured because our kernel failed or was wrong, with why.
        unmeasured: rows (shape, T) for which no time was left.
    """

    request: LayerBenchRequest
    threads: int
    ceilings: Ceilings
    ceilings_before: Ceilings
    ceilings_after: Ceilings
    times: tuple[LayerTimes, ...] = ()
    failures: tuple[str, ...] = ()
    unmeasured: tuple[tuple[str, int], ...] = ()


def bench_layers(
    request: LayerBenchRequest,
    progress: Callable[[int, int], None] = lambda done, total: None,
    keep: Callable[[LayerReport], None] = lambda report: None,
) -> LayerReport:
    """Measures every shape at every T, or as many as there is time for.

    Args:
        progress: called with (steps done, steps in all).
        keep: called after each row with what there is so far.

    Raises:
        UnsupportedError: no GPU, or not enough memory; before anything is measured.
        KernelRefusedError: the kernel does not run a shape; before anything is measured.
    """
    started = time.monotonic()
    _check_device(request.device)
    if LLAMA_CPP in request.peers:
        check_llama_cpp(request.device)
    with _threads(request.threads), torch.inference_mode():
        kernels = {shape.name: _kernel(request, shape) for shape in request.shapes}
        for shape, name in product(request.shapes, request.quantizations):
            quantized_kernel(
                shape, name, device=request.device, dtype=request.dtype, kernel=request.kernel
            )
        _check_memory(request)
        total = len(request.shapes) * len(request.tokens) + 2
        progress(0, total)
        before = measure_ceilings(request.device, request.dtype)
        _release(request.device)
        progress(1, total)
        report = LayerReport(
            request=request,
            threads=torch.get_num_threads(),
            ceilings=before,
            ceilings_before=before,
            ceilings_after=before,
        )
        until = None if request.seconds is None else started + request.seconds
        done = 1
        for shape in request.shapes:
            for row in _shape_rows(request, shape, kernels[shape.name], until):
                report = replace(report, **_with(report, row))
                done += 1
                progress(done, total)
                keep(report)
            _release(request.device)
        after = measure_ceilings(request.device, request.dtype)
        progress(total, total)
    return replace(report, ceilings=before.best_with(after), ceilings_after=after)


def _with(report: LayerReport, row: LayerTimes | str | tuple[str, int]) -> dict[str, Any]:
    """The field of `report` that a row belongs to, with it."""
    if isinstance(row, LayerTimes):
        return {"times": (*report.times, row)}
    if isinstance(row, str):
        return {"failures": (*report.failures, row)}
    return {"unmeasured": (*report.unmeasured, row)}


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


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
        copies = 1 + sum(_shares(request, shape))
        needed = int(shape.parameters * request.dtype.itemsize * copies)
        if needed > _WEIGHTS_SHARE * free:
            raise UnsupportedError(
                f"shape {shape.name} takes {needed / 1e9:.2f} GB of weights in "
                f"{str(request.dtype).removeprefix('torch.')}, and of {free / 1e9:.2f} GB of free "
                f"{request.device} memory {_WEIGHTS_SHARE:.0%} may be used; choose a smaller shape "
                f"or dtype"
            )


def _shares(request: LayerBenchRequest, shape: LayerShape) -> list[float]:
    """Bytes of each copy of a weight set in another format, over its own."""
    itemsize = request.dtype.itemsize
    shares = [share_of_bytes(shape, name, itemsize) for name in request.quantizations]
    if _with_llama_cpp(request, shape):
        shares += [size / itemsize for size in bytes_of_types(request)]
    return shares


def _with_llama_cpp(request: LayerBenchRequest, shape: LayerShape) -> bool:
    return LLAMA_CPP in request.peers and llama_cpp_refusal(shape) is None


def _shape_rows(
    request: LayerBenchRequest, shape: LayerShape, kernel: ExpertsKernel, until: float | None
) -> Iterator[LayerTimes | str | tuple[str, int]]:
    """The rows of one shape: times, why there are none, or that no time was left. The weights live
    as long as it takes.

    Args:
        until: on the monotonic clock.
    """

    def late() -> bool:
        return until is not None and time.monotonic() > until

    if late():
        yield from ((shape.name, tokens) for tokens in request.tokens)
        return
    itemsize = request.dtype.itemsize
    cache = last_level_cache(request.device) or _UNKNOWN_CACHE
    shares = _shares(request, shape)
    room = int(_WEIGHTS_SHARE * available_memory(request.device) / (1 + sum(shares)))
    rotations = [
        plan_rotation(
            RotationRequest(
                num_experts=shape.experts.num_experts,
                top_k=shape.top_k,
                tokens=tokens,
                pattern=request.routing,
                seed=request.seed,
                # Sets are counted by the smallest of them, so that it, too, comes from memory.
                expert_bytes=int(shape.parameters_per_expert * itemsize * min([1.0, *shares])),
                target_bytes=_COLD_CACHES[request.device] * cache,
                max_sets=max(1, room // (shape.parameters * itemsize)),
            )
        )
        for tokens in request.tokens
    ]
    num_sets = max(rotation.num_sets for rotation in rotations)
    weights = make_weights(shape, num_sets, request.dtype, request.device, request.seed)
    copies: list[CopiedSets] = [
        QuantizedSets(
            shape, weights, request.quantizations, device=request.device, kernel=request.kernel
        )
    ]
    if _with_llama_cpp(request, shape):
        copies.append(LlamaCppSets(shape, weights, request.quantizations))
    if request.device == "cuda":
        _compile_all(request, shape, kernel, weights[0])
    for tokens, rotation in zip(request.tokens, rotations, strict=True):
        if late():
            yield shape.name, tokens
            continue
        try:
            yield Case(request, shape, kernel, weights, tokens, rotation, copies).times()
        except Exception as failure:  # Triton's compiler has errors of its own
            yield f"{shape.name}, T={tokens}: {first_line(failure)}"
        _release(request.device)


def _compile_all(
    request: LayerBenchRequest, shape: LayerShape, kernel: ExpertsKernel, weights: ExpertWeights
) -> None:
    """Runs the kernel once at every T, side by side: compiling takes longer than measuring."""

    def run(tokens: int) -> None:
        size = (tokens, shape.experts.num_experts)
        # What is wrong shows, with its row, when the row is measured.
        with suppress(Exception), torch.inference_mode():
            ids = torch.rand(size, device="cuda").topk(shape.top_k).indices.int()
            hidden = torch.zeros(
                (tokens, shape.experts.hidden_size), dtype=request.dtype, device="cuda"
            )
            slots = torch.ones(ids.shape, device="cuda")
            kernel(hidden, slots, ids, weights, shape.experts)

    with ThreadPoolExecutor(_COMPILE_THREADS) as pool:
        list(pool.map(run, request.tokens))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
