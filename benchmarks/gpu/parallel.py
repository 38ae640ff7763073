"""One MoE layer on two GPUs against one, in CUDA graphs, with the communication measured alone.

    torchrun --nproc-per-node 2 benchmarks/gpu/parallel.py --json parallel.json

T is the number of tokens of the whole job: data-parallel ranks have half of them each. Every
variant is captured once, checked against the layer on one GPU, and timed interleaved with the
others; a time is the slower rank's, the median over the samples. Floors are the collectives of a
variant, alone, of the same bytes. `dp_alone` computes what data-parallel ranks compute and sends
nothing: what a variant takes more is communication that is not hidden.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetor.bench.hardware import describe_run
from moetor.bench.shapes import SHAPES, LayerShape
from moetor.bench.weights import make_weights
from moetor.config import MoEConfig, RouterConfig, RunnerConfig
from moetor.kernels.base import ExpertWeights
from moetor.kernels.routing import Routing
from moetor.layer import MoELayer
from moetor.layer.parts import LayerParts
from moetor.layer.sharding import shard_layer
from moetor.parallel.allgather import AllGatherDispatcher
from moetor.parallel.config import EplbConfig, ParallelConfig
from moetor.parallel.dispatch import Exchange, TokenDispatcher, agreed_rows
from moetor.parallel.eplb.statistics import save_loads
from moetor.parallel.groups import make_groups, start_process_group

CALLS = 4  # different inputs, one after the other in a graph
ERROR = 0.03  # of the largest output, in bfloat16
NCCL: dict[str, Any] = {"collectives": "backend"}
DIRECT: dict[str, Any] = {"collectives": "direct"}
TP: dict[str, Any] = {"tensor_parallel_size": 2}
EP: dict[str, Any] = {"enable_expert_parallel": True}
DP: dict[str, Any] = {"data_parallel_size": 2, **EP}
SPREAD: dict[str, ParallelConfig] = {
    "tp": ParallelConfig(**TP, **NCCL),
    "tp, direct": ParallelConfig(**TP, **DIRECT),
    "ep": ParallelConfig(**TP, **EP, **NCCL),
    "sp_ep": ParallelConfig(**TP, **EP, sequence_parallel=True, **NCCL),
    "sp_ep, direct": ParallelConfig(**TP, **EP, sequence_parallel=True, **DIRECT),
    "dp_alone": ParallelConfig(**DP, dispatcher="allgather", **NCCL),
    "dp_allgather": ParallelConfig(**DP, dispatcher="allgather", **NCCL),
    "dp_allgather, direct": ParallelConfig(**DP, dispatcher="allgather", **DIRECT),
    "dp_alltoall": ParallelConfig(**DP, dispatcher="alltoall", **NCCL),
    "dp_dual": ParallelConfig(**DP, dispatcher="allgather", **NCCL),
}


class Silent(TokenDispatcher):
    """Gathers once, and from then on gives what it has."""

    def __init__(self, like: TokenDispatcher) -> None:
        super().__init__(like.group, like.experts)
        self.real = AllGatherDispatcher(like.group, like.experts)
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def begin(self, hidden_TH: Tensor, routing: Routing, rows: int) -> Exchange:
        """See `Dispatcher.begin`."""
        key = hidden_TH.data_ptr(), rows
        if key not in self.kept:
            made: Any = self.real.begin(hidden_TH, routing, rows)
            self.kept[key] = made.hidden.wait(), made.packed.wait()
        return _Kept(self, self.kept[key], routing)


class _Kept(Exchange):
    def __init__(self, dispatcher: Silent, kept: tuple[Tensor, Tensor], routing: Routing) -> None:
        self.dispatcher, self.kept, self.routing = dispatcher, kept, routing

    def arrived(self) -> tuple[Tensor, Routing]:
        hidden, packed = self.kept
        top_k = self.routing.topk_ids.shape[1]
        weights = packed.view(torch.float32)[:, :top_k]
        return hidden, self.dispatcher.experts.held(weights, packed[:, top_k:])

    def send_back(self, out_NH: Tensor) -> None:
        self.out = out_NH

    def returned(self) -> Tensor:
        return self.out[: self.routing.topk_ids.shape[0]]


@dataclass
class Variant:
    """A captured graph of `CALLS` calls."""

    name: str
    graph: torch.cuda.CUDAGraph
    samples: list[float]
    keep: object  # what the graph reads: a capture gives unused memory back to the driver
    error: float | None = None


def capture(name: str, call: Callable[[int], Tensor]) -> tuple[Variant, list[Tensor]]:
    """Captures a variant's calls, after two that compile; the results live in the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(CALLS):
            call(number)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events from another thread meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [call(number) for number in range(CALLS)]
    return Variant(name, graph, [], call), results


def sample(variant: Variant, host: dist.ProcessGroup) -> None:
    """One time per call, in microseconds, appended; the ranks start together."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier(group=host)
    begin.record()
    variant.graph.replay()
    end.record()
    end.synchronize()
    variant.samples.append(begin.elapsed_time(end) * 1e3 / CALLS)


def layer_of(shape: LayerShape, weights: ExpertWeights, runner: RunnerConfig) -> MoELayer:
    """The routed experts of a shape behind router logits."""
    router = RouterConfig(
        num_experts=shape.experts.num_experts, top_k=shape.top_k, renormalize=True
    )
    config = MoEConfig(
        hidden_size=shape.experts.hidden_size,
        router=router,
        experts=shape.experts,
        runner=runner,
        internal_gate=False,
    )
    return MoELayer(config, parts=LayerParts(experts=weights)).eval()


def floors(shape: LayerShape, tokens: int) -> dict[str, Callable[[int], Tensor]]:
    """The collectives of each way of communicating, alone."""
    hidden, half = shape.experts.hidden_size, -(-tokens // 2)
    whole = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    part = torch.randn(half, hidden, device="cuda", dtype=torch.bfloat16)
    both = torch.empty(2 * half, hidden, device="cuda", dtype=torch.bfloat16)
    routing = torch.zeros(half, 2 * shape.top_k, device="cuda", dtype=torch.int32)
    routings = torch.empty(2 * half, 2 * shape.top_k, device="cuda", dtype=torch.int32)

    def all_reduce(_: int) -> Tensor:
        dist.all_reduce(whole)
        return whole

    def gather_scatter(_: int) -> Tensor:
        dist.all_gather_into_tensor(both, part)
        dist.all_gather_into_tensor(routings, routing)
        dist.reduce_scatter_tensor(part, both)
        return part

    def all_to_all(_: int) -> Tensor:
        dist.all_to_all_single(both, both.clone())
        dist.all_to_all_single(routings, routings.clone())
        dist.all_to_all_single(both, both.clone())
        return both

    return {
        "floor: all-reduce": all_reduce,
        "floor: all-gather + reduce-scatter": gather_scatter,
        "floor: all-to-all twice": all_to_all,
    }


def logits_for(shape: LayerShape, tokens: int, skew: float) -> list[Tensor]:
    """Router logits of every call; with skew, experts in order get ever fewer tokens."""
    rng = torch.Generator().manual_seed(tokens)
    experts = shape.experts.num_experts
    ranks = torch.arange(1, experts + 1).log() * skew
    return [(torch.randn(tokens, experts, generator=rng) - ranks).cuda() for _ in range(CALLS)]


def own(rows: list[Tensor], rank: int) -> list[Tensor]:
    """One data-parallel rank's half of the tokens."""
    half = -(-rows[0].shape[0] // 2)
    return [row[rank * half : (rank + 1) * half] for row in rows]


def measure(
    shape: LayerShape, layers: dict[str, MoELayer], tokens: int, args: Any, host: dist.ProcessGroup
) -> dict[str, Any]:
    """Every variant at one number of tokens."""
    rank, bound = dist.get_rank(), -(-tokens // 2)
    rng = torch.Generator().manual_seed(1)
    hidden = [
        torch.randn(tokens, shape.experts.hidden_size, generator=rng).to("cuda", torch.bfloat16)
        for _ in range(CALLS)
    ]
    variants, expected = [], {}
    for name, layer in layers.items():
        skewed = "zipf" in name
        if (skewed and tokens < 512) or (name.startswith("dp_") and tokens < 2):
            continue
        if name == "dp_dual" and tokens < 1024:
            continue
        logits = logits_for(shape, tokens, 1.0 if skewed else 0.0)
        joint = layer.parallel is not None and SPREAD_OF[name].joint
        x, y = (own(hidden, rank), own(logits, rank)) if joint else (hidden, logits)
        with agreed_rows(bound):
            variant, results = capture(name, lambda n, layer=layer, x=x, y=y: layer(x[n], y[n]))
        variant.graph.replay()
        torch.cuda.synchronize()
        if layer.parallel is None:
            expected[skewed] = [result.clone() for result in results]
        if skewed in expected:
            whole = own(expected[skewed], rank) if joint else expected[skewed]
            silent = name == "dp_alone"  # whose results lack the other ranks' part
            variant.error = (
                0.0
                if silent
                else max(
                    float((a - b).abs().max() / b.abs().max()) if b.numel() else 0.0
                    for a, b in zip(results, whole, strict=True)
                )
            )
        variants.append(variant)
    for name, call in floors(shape, tokens).items():
        variants.append(capture(name, call)[0])
    for number in range(args.samples + 1):
        for variant in variants:
            sample(variant, host)
            if number == 0:
                variant.samples.clear()
    row: dict[str, Any] = {"shape": shape.name, "tokens": tokens, "us": {}, "error": {}}
    for variant in variants:
        slower = torch.tensor(variant.samples)
        dist.all_reduce(slower, op=dist.ReduceOp.MAX, group=host)
        worst = torch.tensor([variant.error or 0.0])
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=host)
        row["us"][variant.name] = round(statistics.median(slower.tolist()), 2)
        row["error"][variant.name] = float(worst)
        assert float(worst) < ERROR, f"{variant.name} at {tokens} tokens: error {float(worst):.3f}"
    return row


SPREAD_OF: dict[str, ParallelConfig] = {}


def build_layers(shape: LayerShape, folder: Path, only: list[str]) -> dict[str, MoELayer]:
    """The layer on one GPU, and spread in every way."""
    weights = make_weights(shape, 1, torch.bfloat16, "cuda", 0)[0]
    runner = RunnerConfig(kernel="triton")
    layers = {"one GPU": layer_of(shape, weights, runner)}
    ways = dict(SPREAD)
    if shape.experts.num_experts >= 32:
        loads = [1 / (expert + 1) for expert in range(shape.experts.num_experts)]
        stats = folder / "loads.json"
        save_loads(stats, shape.name, {"layer": loads})
        eplb = EplbConfig(statistics=str(stats), dynamic=False)
        layers["one GPU, zipf"] = layers["one GPU"]
        direct = SPREAD["dp_allgather, direct"]
        ways["dp_direct, zipf"] = direct
        for extra in (0, 2, 8):
            ways[f"dp_direct, zipf, eplb {extra}"] = replace(
                direct, eplb=eplb, num_redundant_experts=extra
            )
    for name, config in ways.items():
        if only and name not in only:
            continue
        used = replace(runner, name="dual_batch", dual_batch_min_tokens=2)
        layer = layer_of(shape, weights, used if name == "dp_dual" else runner)
        groups = make_groups(config, "cuda")
        loads_or_none = None if config.eplb is None else loads
        shard_layer(layer, groups, loads=loads_or_none)
        layers[name] = layer
        SPREAD_OF[name] = config
    if "dp_alone" in layers:
        layers["dp_alone"].dispatcher = Silent(layers["dp_alone"].dispatcher)
    return layers


def show(rows: list[dict[str, Any]]) -> None:
    """Prints rows as a table."""
    for row in rows:
        one = row["us"]["one GPU"]
        print(f"\n{row['shape']}, {row['tokens']} tokens, microseconds (ratio to one GPU)")
        for name, us in row["us"].items():
            print(f"  {name:36s} {us:10.1f}  {one / us:5.2f}x")


def main() -> None:
    """Measures what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="qwen3-30b-a3b,mixtral-8x7b")
    parser.add_argument("--tokens", default="1,16,128,1024,4096,16384")
    parser.add_argument("--ways", default="", help="these alone, with semicolons between")
    parser.add_argument("--seconds", type=float, default=600, help="no new row after so long")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--json", default="parallel.json")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    start_process_group("cuda")
    host = dist.new_group(backend="gloo")
    result = {**describe_run("cuda", torch.get_num_threads()), "rows": []}
    result["command"] = "torchrun --nproc-per-node 2 benchmarks/gpu/parallel.py"
    start = time.monotonic()
    with torch.no_grad():
        for name in args.shapes.split(","):
            only = [way for way in args.ways.split(";") if way]
            layers = build_layers(SHAPES[name], Path(args.json).absolute().parent, only)
            for tokens in map(int, args.tokens.split(",")):
                spent = torch.tensor([time.monotonic() - start])
                dist.all_reduce(spent, op=dist.ReduceOp.MAX, group=host)
                if float(spent) > args.seconds:
                    break
                result["rows"].append(measure(SHAPES[name], layers, tokens, args, host))
                if dist.get_rank() == 0:
                    show(result["rows"][-1:])
                    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
            del layers
            torch.cuda.empty_cache()
    torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
