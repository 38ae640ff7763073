"""Routed experts on one GPU: our plans, their variants and Transformers' own, checked and timed.

    python benchmarks/gpu/layer.py --out result.json [--shapes qwen3-30b-a3b ...] [--tokens 1 ...]
        [--variants default small large plans] [--seconds 400]

Every implementation is captured in a CUDA graph of several calls, each with its own routing and
hidden states and, in turn, with one of several sets of weights, so that weights come from memory.
Graphs of all implementations are replayed in turn; the figure is the median of a call's time.
`sustained` replays back to back, `rested` pauses before each replay: the card is power-capped, and
large products run up to a fifth faster rested. A result is compared with the float32 reference
before it is timed; what fails is reported and not timed.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetor.bench.peers import make_peer
from moetor.bench.shapes import SHAPES, LayerShape
from moetor.kernels.base import ExpertWeights
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.triton import choose, support
from moetor.kernels.triton.fused import TritonKernel
from moetor.kernels.triton.large import run_large
from moetor.kernels.triton.small import run_small

DTYPE = torch.bfloat16
_SETS_BYTES = 3 * 2**30  # weights in rotation, at least two sets where they are small
_LIMIT = 8e-3  # relative error of a bfloat16 result

Call = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this GPU reached a moment ago."""

    read_bytes_per_s: float
    gemm_flops_per_s: float


@dataclass(kw_only=True)
class Variant:
    """One implementation and what came of it, times in microseconds."""

    name: str
    call: Call = field(repr=False)
    error: float | None = None
    failed: str | None = None
    sustained: list[float] = field(default_factory=list)
    rested: list[float] = field(default_factory=list)


def _timed(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `run`."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


@triton.jit
def _read(data, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    base = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    for step in tl.static_range(STEPS):
        total += tl.load(data + base + step * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


def _read_bandwidth(data: Tensor, block: int, steps: int) -> float:
    out = torch.empty(data.numel() // block // steps, device="cuda")
    took = _timed(lambda: _read[(out.numel(),)](data, out, block, steps, num_warps=8), 15)
    return data.numel() * data.element_size() / took * 1e3


def measure_ceilings() -> Ceilings:
    """Read bandwidth over 4 GiB, and the rate of a bf16 product of 8192^3."""
    data = torch.ones(2**31, device="cuda", dtype=DTYPE)
    best = max(_read_bandwidth(data, *size) for size in ((2048, 4), (4096, 4), (8192, 2)))
    a, b = (torch.randn(8192, 8192, device="cuda").to(DTYPE) for _ in range(2))
    took = _timed(lambda: a @ b, 10)
    return Ceilings(read_bytes_per_s=best, gemm_flops_per_s=2 * 8192**3 / took * 1e3)


def random_weights(shape: LayerShape) -> ExpertWeights:
    """One set, outputs of the order of one."""
    config = shape.experts

    def normal(*size: int, fan_in: int = 1) -> Tensor:
        return torch.empty(size, dtype=DTYPE, device="cuda").normal_(std=fan_in**-0.5)

    biases = (None, None)
    if config.has_bias:
        biases = (
            normal(config.num_experts, config.up_size),
            normal(config.num_experts, config.hidden_size),
        )
    return ExpertWeights(
        normal(*config.gate_up_shape, fan_in=config.hidden_size),
        normal(*config.down_shape, fan_in=config.intermediate_size),
        *biases,
    )


@dataclass
class Load:
    """The rotated inputs of one shape and T."""

    hidden: list[Tensor]
    weights: list[Tensor]
    ids: list[Tensor]
    active: float  # experts met by a call, on average


def make_load(shape: LayerShape, tokens: int, calls: int) -> Load:
    """Uniform random routing, another one for every call."""
    config = shape.experts
    load = Load([], [], [], 0.0)
    for _ in range(calls):
        load.hidden.append(torch.randn(tokens, config.hidden_size, device="cuda").to(DTYPE))
        scores = torch.rand(tokens, config.num_experts, device="cuda")
        load.ids.append(scores.topk(shape.top_k, dim=-1).indices.int())
        load.weights.append(torch.rand(tokens, shape.top_k, device="cuda") / shape.top_k)
        load.active += load.ids[-1].unique().numel() / calls
    return load


def variants(
    shape: LayerShape, tokens: int, kinds: list[str], peers: dict[str, list[Any]]
) -> Iterator[Variant]:
    """What is compared: the default, both paths, other plans, Transformers."""
    config, top_k, itemsize = shape.experts, shape.top_k, DTYPE.itemsize
    device = support.gpu(0)
    kernel = TritonKernel()
    yield Variant(name="triton", call=lambda x, w, ids, weights: kernel(x, w, ids, weights, config))
    small, large = (
        choose.small_plan(config, top_k, itemsize, device),
        choose.large_plan(config, top_k, tokens, itemsize, device),
    )

    def of_small(name: str, plan: choose.SmallPlan) -> Variant:
        return Variant(
            name=f"small {name}",
            call=lambda x, w, ids, weights: run_small(x, w, ids, weights, config, plan),
        )

    def of_large(name: str, plan: choose.LargePlan) -> Variant:
        return Variant(
            name=f"large {name}",
            call=lambda x, w, ids, weights: run_large(x, w, ids, weights, config, plan),
        )

    if "small" in kinds and tokens <= 8:
        yield of_small("", small)
        yield of_small("unchained", replace(small, pdl=False))
    if "large" in kinds:
        yield of_large("", large)
    if "plans" in kinds and tokens <= 4:
        for rows, depth, warps, stages in (
            (4, 256, 4, 1), (8, 256, 4, 1), (8, 512, 4, 1), (4, 1024, 4, 1), (2, 1024, 4, 1),
            (4, 512, 2, 1), (4, 512, 8, 1), (4, 512, 4, 3), (8, 512, 8, 1),
        ):  # fmt: skip
            if not config.transposed:
                tile = choose.VectorTile(rows=rows, depth=depth, warps=warps, stages=stages)
                yield of_small(f"up {rows}x{depth} w{warps} s{stages}", replace(small, up=tile))
        for rows, depth, warps, stages in (
            (1, 512, 4, 1), (2, 512, 4, 1), (4, 256, 4, 1), (4, 128, 4, 1), (8, 128, 4, 1),
            (1, 256, 4, 1), (2, 256, 2, 1), (2, 256, 4, 3), (2, 256, 8, 1),
        ):  # fmt: skip
            if not config.transposed:
                tile = choose.VectorTile(rows=rows, depth=depth, warps=warps, stages=stages)
                yield of_small(f"down {rows}x{depth} w{warps} s{stages}", replace(small, down=tile))
    if "plans" in kinds and tokens > 2:
        for name, plan in _large_plans(large, device):
            yield of_large(name, plan)
    for name, modules in peers.items():
        if name == "batched_mm" and tokens * top_k * config.params_per_expert > 8e9:
            continue
        calls = {id(module.weights.gate_up): module.peer for module in modules}
        yield Variant(
            name=name,
            call=lambda x, w, ids, weights, calls=calls: calls[id(weights.gate_up)](
                x, w.to(x.dtype), ids.long()
            ),
        )


def _large_plans(
    plan: choose.LargePlan, device: choose.Device
) -> Iterator[tuple[str, choose.LargePlan]]:
    """The chosen plan with one thing changed."""

    def both(name: str, **changes: Any) -> tuple[str, choose.LargePlan]:
        up, down = (replace(tile, **changes) for tile in (plan.up, plan.down))
        return name, choose.LargePlan(up=up, down=down)

    rows = plan.up.rows
    for other in (rows // 2, rows * 2):
        if 16 <= other <= 128:
            yield both(f"BM{other}", rows=other)
    yield both(f"tma={not plan.up.tma}", tma=not plan.up.tma)
    yield both("group1", group=1)
    yield both("group32", group=32)
    yield both("stages-1", stages=max(1, plan.up.stages - 1))
    if rows <= 32:
        yield both("stages+2", stages=plan.up.stages + 2)
        yield both("BK64 s6", depth=64, stages=6)
        yield (
            "BN*2",
            choose.LargePlan(
                up=replace(plan.up, columns=2 * plan.up.columns, stages=3),
                down=replace(plan.down, columns=2 * plan.down.columns, stages=3),
            ),
        )
    if rows == 128:
        yield (
            "BN/2 w4",
            choose.LargePlan(
                up=replace(plan.up, columns=plan.up.columns // 2, warps=4),
                down=replace(plan.down, columns=plan.down.columns // 2, warps=4),
            ),
        )
        yield "down BN128", replace(plan, down=replace(plan.down, columns=128))


@dataclass(frozen=True)
class PeerSet:
    """A peer over one set of weights."""

    weights: ExpertWeights
    peer: Any


def check(variant: Variant, load: Load, weights: ExpertWeights, expected: Tensor) -> None:
    """Runs a call on poisoned memory and compares it with the reference."""
    try:
        torch.full((expected.numel() * 2,), float("nan"), device="cuda", dtype=DTYPE)
        out = variant.call(load.hidden[0], load.weights[0], load.ids[0], weights)
        error = float((out.float() - expected).norm() / expected.norm())
        variant.error = error
        if not error < _LIMIT:
            variant.failed = f"relative error {error:.2e}"
    except Exception as error:  # a variant that does not compile must not end the measurement
        traceback.print_exc(limit=1, file=sys.stderr)
        variant.failed = f"{type(error).__name__}: {error}"[:300]


def capture(variant: Variant, load: Load, sets: list[ExpertWeights]) -> torch.cuda.CUDAGraph | None:
    """All calls in one graph; None where the implementation cannot be captured."""

    def run() -> None:
        for number, x in enumerate(load.hidden):
            variant.call(x, load.weights[number], load.ids[number], sets[number % len(sets)])

    try:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        variant.failed = f"{type(error).__name__}: {error}"[:300]
        torch.cuda.synchronize()
        return None
    return graph


def time_all(found: list[Variant], load: Load, sets: list[ExpertWeights], rounds: int) -> None:
    """Replays every graph in turn."""
    graphs = [(variant, capture(variant, load, sets)) for variant in found if not variant.failed]
    calls = len(load.hidden)
    for pause, times in ((0.0, "sustained"), (0.04, "rested")):
        for _ in range(rounds):
            for variant, graph in graphs:
                if graph is None:
                    continue
                if pause == 0.0:
                    graph.replay()
                else:
                    torch.cuda.synchronize()
                    time.sleep(pause)
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                getattr(variant, times).append(start.elapsed_time(stop) * 1e3 / calls)


def measure(
    shape: LayerShape, tokens: int, kinds: list[str], sets: list[ExpertWeights], ceilings: Ceilings
) -> dict[str, Any]:
    """All variants of one shape and T."""
    config = shape.experts
    slots = tokens * shape.top_k
    calls = 16 if tokens <= 256 else 4 if tokens <= 4096 else 2
    load = make_load(shape, tokens, calls)
    peers: dict[str, list[Any]] = {}
    if "peers" in kinds:
        for name in ("grouped_mm", "batched_mm"):
            peers[name] = [PeerSet(one, make_peer(name, shape, one)) for one in sets]
    expected = ReferenceKernel()(
        load.hidden[0].float(), load.weights[0], load.ids[0], sets[0], config
    )
    found = list(variants(shape, tokens, kinds, peers))
    with torch.no_grad():
        for variant in found:
            check(variant, load, sets[0], expected)
        time_all(found, load, sets, rounds=15 if tokens <= 1024 else 7)
    read = load.active * shape.parameters_per_expert * DTYPE.itemsize
    read += 2 * tokens * config.hidden_size * DTYPE.itemsize
    flops = 2.0 * slots * config.params_per_expert
    floor = 1e6 * max(read / ceilings.read_bytes_per_s, flops / ceilings.gemm_flops_per_s)
    rows = []
    for variant in found:
        row = {"name": variant.name, "error": variant.error, "failed": variant.failed}
        for key in ("sustained", "rested"):
            times = getattr(variant, key)
            if times:
                row[f"{key}_us"] = round(statistics.median(times), 2)
                row[f"{key}_share"] = round(floor / statistics.median(times), 3)
        rows.append(row)
        print(
            f"{shape.name:16} T={tokens:<6} floor {floor:8.1f} {variant.name:28} "
            f"{row.get('sustained_us', '-'):>9} {row.get('sustained_share', '-'):>6} "
            f"{row.get('rested_us', '-'):>9} {variant.failed or ''}",
            flush=True,
        )
    return {
        "shape": shape.name,
        "tokens": tokens,
        "active_experts": load.active,
        "floor_us": floor,
        "variants": rows,
    }


def main() -> None:
    """Measures until the time is up; what was measured is written after every case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[1, 2, 4, 16, 64, 256, 1024, 4096, 16384]
    )
    parser.add_argument("--variants", nargs="*", default=["small", "large", "peers"])
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    import transformers

    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "commit": arguments.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "ceilings": asdict(ceilings),
        "cases": [],
    }
    print(ceilings)
    for name in arguments.shapes:
        if time.monotonic() - started > arguments.seconds:
            break
        shape = SHAPES[name]
        size = shape.parameters * DTYPE.itemsize
        sets = [random_weights(shape) for _ in range(max(1, -(-_SETS_BYTES // size)))]
        for tokens in arguments.tokens:
            if time.monotonic() - started > arguments.seconds:
                print(f"time is up before {name} T={tokens}")
                break
            try:
                case = measure(shape, tokens, arguments.variants, sets, ceilings)
            except torch.cuda.OutOfMemoryError as error:
                case = {"shape": name, "tokens": tokens, "failed": str(error)[:200]}
            result["cases"].append(case)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            torch.cuda.empty_cache()
        del sets
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
