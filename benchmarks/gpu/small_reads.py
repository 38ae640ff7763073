"""How long reading alone takes at one token: the bytes of a layer's active experts, and no
arithmetic but a sum, in one launch or in two of which the second begins before the first has ended.

    python benchmarks/gpu/small_reads.py --out result.json

That is what bounds a layer at T = 1 beside the bandwidth of long reads: the start and the tail of
each launch. Buffers are rotated so that they come from memory; CUDA graphs hold 40 calls; the
graphs of all variants are replayed in turn; figures are medians in microseconds a call.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moetor.bench.ceilings import measure_ceilings
from moetor.bench.hardware import describe_run
from moetor.bench.shapes import SHAPES

_CALLS, _ROUNDS = 40, 9
_FOREIGN = 256 * 2**20  # bytes between two uses of a buffer
# (warps, elements of a load, loads of a program)
_PATTERNS = ((1, 1024, 4), (1, 2048, 2), (2, 2048, 4), (4, 4096, 2), (8, 8192, 2), (8, 8192, 8))


@triton.jit
def read_part(
    data, out, BLOCK: tl.constexpr, STEPS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr
):
    """Each program's sum of BLOCK * STEPS neighbouring elements."""
    if FIRST:
        gdc_launch_dependents()
    base = data + tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        here = base + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(here, eviction_policy="evict_first").to(tl.float32)
    if SECOND:
        gdc_wait()
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


def calls_for(buffers: list[torch.Tensor], out: torch.Tensor) -> dict[str, Callable[[int], None]]:
    """Calls by name; each reads the buffer of its number."""
    calls: dict[str, Callable[[int], None]] = {}
    for warps, block, steps in _PATTERNS:
        grid = buffers[0].numel() // (block * steps)
        first = grid * 2 // 3  # the first product has two thirds of a gated expert
        sizes = {"BLOCK": block, "STEPS": steps, "num_warps": warps}

        def one(number: int, grid: int = grid, sizes: dict[str, int] = sizes) -> None:
            read_part[(grid,)](
                buffers[number % len(buffers)], out, FIRST=False, SECOND=False, **sizes
            )

        def two(
            number: int, grid: int = grid, first: int = first, sizes: dict[str, int] = sizes
        ) -> None:
            data = buffers[number % len(buffers)]
            rest = data[first * sizes["BLOCK"] * sizes["STEPS"] :]
            read_part[(first,)](data, out, FIRST=True, SECOND=False, **sizes)
            read_part[(grid - first,)](
                rest, out, FIRST=False, SECOND=True, launch_pdl=True, **sizes
            )

        calls[f"one launch, {warps} warps, {block} x {steps}"] = one
        calls[f"two launches, {warps} warps, {block} x {steps}"] = two
    return calls


def measure(calls: dict[str, Callable[[int], None]]) -> dict[str, float]:
    """Microseconds a call, by name."""
    graphs = {}
    for name, call in calls.items():
        call(0)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for number in range(_CALLS):
                call(number)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / _CALLS * 1e3)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def main() -> None:
    """Measures all named shapes and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        sys.exit("needs an NVIDIA GPU of compute capability 9.0 or later")
    ceilings = measure_ceilings("cuda", torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        read = 2 * shape.top_k * shape.experts.params_per_expert
        elements = read // 2 // 65536 * 65536
        count = max(2, -(-_FOREIGN // read) + 1)
        buffers = [torch.randn(elements, device="cuda").bfloat16() for _ in range(count)]
        times = measure(calls_for(buffers, torch.empty(elements // 1024, device="cuda")))
        floor = 2 * elements / ceilings.read_bytes_per_s * 1e6
        best = {
            kind: min(taken for label, taken in times.items() if label.startswith(kind))
            for kind in ("one", "two")
        }
        rows.append({"shape": name, "bytes": 2 * elements, "floor_us": floor, "us": times})
        print(
            f"{name:16} floor {floor:6.1f} us; one launch {best['one']:6.1f} "
            f"({floor / best['one']:.0%}), two {best['two']:6.1f} ({floor / best['two']:.0%})",
            flush=True,
        )
        del buffers
        torch.cuda.empty_cache()
    options.out.write_text(
        json.dumps(
            describe_run("cuda") | {"read": ceilings.read_bytes_per_s, "rows": rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
