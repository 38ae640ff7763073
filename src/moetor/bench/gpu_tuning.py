"""What `moetor tune` times on a GPU: plans of the Triton kernels, over weights from memory.

Shape letters: T tokens, K top_k.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from moetor.bench.hardware import available_memory, last_level_cache
from moetor.bench.rotation import RotationRequest, Step, plan_rotation
from moetor.bench.shapes import LayerShape
from moetor.bench.timing import CudaSampler
from moetor.bench.tuning import PlanTimer, TuneCase
from moetor.bench.weights import make_weights
from moetor.errors import UnsupportedError
from moetor.kernels.base import ExpertWeights
from moetor.kernels.triton import choose
from moetor.kernels.triton.candidates import large_candidates, small_candidates
from moetor.kernels.triton.fused import run_plan
from moetor.kernels.triton.tuned import Plan, plan_key

# Where the small path may still be the faster one.
_SMALL_TOKENS = 8
_GRAPH_CALLS, _SAMPLES, _THREADS = 16, 5, 8
_WEIGHTS_SHARE, _COLD_CACHES = 0.5, 4
# Relative error (Euclidean norms) between two plans of one kernel.
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class GpuPlanTimer(PlanTimer):
    """Plans for one shape and T, from CUDA graphs, each with the next weights of a rotation.

    The first plan that runs says what is right; a plan that computes something else does not run.

    Args:
        weights: as many sets as there are.
    """

    def __init__(
        self, shape: LayerShape, tokens: int, weights: list[ExpertWeights], seed: int
    ) -> None:
        self._config, self._weights = shape.experts, weights
        dtype = weights[0].down.dtype
        rotation = plan_rotation(
            RotationRequest(
                num_experts=shape.experts.num_experts,
                top_k=shape.top_k,
                tokens=tokens,
                pattern="uniform",
                seed=seed,
                expert_bytes=shape.parameters_per_expert * dtype.itemsize,
                target_bytes=_COLD_CACHES * last_level_cache("cuda"),
                max_sets=len(weights),
            )
        )
        self._steps = [step.to("cuda") for step in rotation.steps]
        generator = torch.Generator("cuda").manual_seed(seed)
        size = (tokens, shape.experts.hidden_size)
        self._hidden = torch.randn(size, generator=generator, device="cuda").to(dtype)
        self._passes = -(-_GRAPH_CALLS // len(self._steps)) if tokens <= 256 else 1
        self._expected: Tensor | None = None

    def prepare(self, plans: list[Plan]) -> None:
        """Compiles the plans side by side, by running each once; compiling takes seconds, timing
        does not.

        Raises:
            UnsupportedError: the GPU is lost to this process.
        """

        def run(plan: Plan) -> None:
            # What is wrong with a plan shows when it is timed.
            with contextlib.suppress(Exception), torch.inference_mode():
                self._call(plan, self._steps[0])

        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(run, plans))
        _check_alive()

    def seconds(self, plan: Plan) -> float | None:
        """See `PlanTimer.seconds`; also raises `UnsupportedError` where the GPU is lost."""
        call = partial(self._call, plan)
        try:
            if not self._right(call(self._steps[0])):
                return None
            sampler = CudaSampler(call, self._steps, passes=self._passes)
            sampler.warm_up()
            return statistics.median(sampler.sample() for _ in range(_SAMPLES))
        # Triton's compiler has errors of its own, and says that tiles do not fit.
        except Exception as error:
            _check_alive()
            full = _out_of_memory(error)
            if full is None:
                return None
            torch.cuda.empty_cache()
            raise full from None

    def _call(self, plan: Plan, step: Step) -> Tensor:
        weights = self._weights[step.weight_set]
        return run_plan(self._hidden, step.topk_weights, step.topk_ids, weights, self._config, plan)

    def _right(self, out: Tensor) -> bool:
        if self._expected is None:
            self._expected = out.float()
        error = (out.float() - self._expected).norm() / self._expected.norm()
        return bool(error <= _TOLERANCES[out.dtype])


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """What stands behind an error: the end of a capture that ran out of memory fails in its own
    words."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error


def _check_alive() -> None:
    """Waits for the GPU.

    Raises:
        UnsupportedError: a launch has failed in a way after which this process gets nothing more
            from the GPU, and every further plan would seem not to run.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise UnsupportedError(
            f"a plan ended in a CUDA error, after which this process cannot use the GPU: {error}; "
            "what was found for other numbers of tokens is kept, run again for those that are left"
        ) from error


def gpu_cases(
    shape: LayerShape, tokens: tuple[int, ...], dtype: torch.dtype, device: choose.Device, seed: int
) -> Iterator[TuneCase]:
    """A case for each T, rising; the weights are made for the first that is timed."""
    config, top_k, itemsize = shape.experts, shape.top_k, dtype.itemsize
    made: list[ExpertWeights] = []

    def weights() -> list[ExpertWeights]:
        if not made:
            room = int(_WEIGHTS_SHARE * available_memory("cuda"))
            sets = max(1, min(2, room // (shape.parameters * itemsize)))
            made.extend(make_weights(shape, sets, dtype, "cuda", seed))
        return made

    def neighbours(plan: Plan) -> Iterator[tuple[str, Plan]]:
        if isinstance(plan, choose.SmallPlan):
            yield from small_candidates(plan, transposed=config.transposed)
        else:
            yield from large_candidates(plan, device, gated=config.gated, itemsize=itemsize)

    def timer(count: int) -> Callable[[], PlanTimer]:
        return lambda: GpuPlanTimer(shape, count, weights(), seed)

    for count in sorted(tokens):
        small: Plan = choose.small_plan(config, top_k, itemsize, device)
        large: Plan = choose.large_plan(config, top_k, count, itemsize, device)
        starts: tuple[Plan, ...] = (large, small)
        if choose.use_small(config, top_k, count, itemsize):
            starts = (small, large)
        elif count > _SMALL_TOKENS:
            starts = (large,)
        yield TuneCase(
            tokens=count,
            key=plan_key(config, top_k, count, itemsize),
            starts=starts,
            neighbours=neighbours,
            timer=timer(count),
        )
