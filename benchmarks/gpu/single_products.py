"""Each of the two products of the path for many tokens by itself, with the plans that its tiles can
have: what the choice between them rests on.

    python benchmarks/gpu/single_products.py --out result.json

Both read what the launches ahead of them made; a first product over copied rows counts the copy.
CUDA graphs hold one call; those of all plans are replayed in turn, back to back for the sustained
figure and after a pause of 30 ms for the rested one. Medians in microseconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetor.bench.hardware import describe_run
from moetor.bench.shapes import SHAPES
from moetor.kernels.base import ExpertWeights
from moetor.kernels.triton import choose, support
from moetor.kernels.triton.large import launch_down, run_up
from moetor.kernels.triton.sort import make_row_tiles

_ROUNDS, _BURST, _PAUSE = 7, 0.012, 0.03  # seconds


def plans(plan: choose.LargePlan, sms: int) -> dict[str, choose.LargePlan]:
    """Other tiles of 128 rows for one of the two products, by name."""

    def down(**changes: Any) -> choose.LargePlan:
        tile = replace(plan.down, roles=False, halves=False, stages=4, warps=8, columns=256)
        return replace(plan, down=replace(tile, **changes))

    walking = replace(plan.up, halves=False, persistent=sms)
    return {
        "chosen": plan,
        "up: gathered": replace(plan, up=replace(plan.up, halves=True, persistent=0)),
        "up: copied": replace(plan, up=walking),
        "down: a tile each": down(halves=True, persistent=0),
        "down: walking, 128": down(columns=128, warps=4, stages=3, persistent=2 * sms),
        "down: walking, 256": down(persistent=sms),
        "down: roles": down(halves=True, persistent=sms, roles=True),
    }


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """One call in a graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def seconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Of one of `calls` replays, back to back."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / calls / 1000


def measured(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, dict[str, float]]:
    """Microseconds by name, sustained and rested."""
    calls = {name: max(2, int(_BURST / seconds(graph, 2))) for name, graph in graphs.items()}
    found: dict[str, dict[str, list[float]]] = {
        name: {"sustained": [], "rested": []} for name in graphs
    }
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            seconds(graph, max(1, calls[name] // 3))
            found[name]["sustained"].append(seconds(graph, calls[name]))
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            time.sleep(_PAUSE)
            found[name]["rested"].append(seconds(graph, 1))
    return {
        name: {how: round(1e6 * statistics.median(times), 1) for how, times in both.items()}
        for name, both in found.items()
    }


def weights_of(name: str) -> ExpertWeights:
    """Random bfloat16 weights of a shape, in its form of storage."""
    config = SHAPES[name].experts

    def drawn(*size: int) -> Tensor:
        return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)

    biases = (
        (drawn(config.num_experts, config.up_size), drawn(config.num_experts, config.hidden_size))
        if config.has_bias
        else (None, None)
    )
    return ExpertWeights(drawn(*config.gate_up_shape), drawn(*config.down_shape), *biases)


def products(name: str, tokens: int, weights: ExpertWeights) -> dict[str, dict[str, float]]:
    """Times of both products with every plan that the form has."""
    config, top_k, device = SHAPES[name].experts, SHAPES[name].top_k, support.gpu(0)
    x = torch.randn(tokens, config.hidden_size, device="cuda").bfloat16()
    scores = torch.rand(tokens, config.num_experts, device="cuda")
    routing, ids = scores.topk(top_k, dim=-1)
    ids = ids.int()
    chosen = replace(choose.large_plan(config, top_k, tokens, 2, device), pdl=False)
    made = make_row_tiles(ids, config.num_experts, chosen.up.rows, pdl=False)
    rows_RH = x.new_empty((made.rows, config.hidden_size))
    up = (weights.gate_up, weights.gate_up_bias)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    act_RI = run_up(x, routing, *up, config, chosen, made)
    for title, plan in plans(chosen, device.sms).items():
        if not title.startswith("down"):
            graphs[title.replace("chosen", "up: chosen")] = captured(
                functools.partial(run_up, x, routing, *up, config, plan, made)
            )
        if not title.startswith("up"):
            down = (act_RI, weights.down, weights.down_bias, config, plan, made, rows_RH)
            graphs[title.replace("chosen", "down: chosen")] = captured(
                functools.partial(launch_down, *down)
            )
    return measured(graphs)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b-a3b", "olmoe", "mixtral-8x7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384])
    given = parser.parse_args()
    record: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "run": describe_run("cuda", torch.get_num_threads()),
    }
    for name in given.shapes:
        weights = weights_of(name)
        for tokens in given.tokens:
            found = products(name, tokens, weights)
            record[f"{name}, T={tokens}"] = found
            for title, times in found.items():
                print(f"{name:16}{tokens:6}  {title:20}{times}", flush=True)
        del weights
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
