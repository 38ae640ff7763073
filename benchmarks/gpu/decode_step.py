"""One decoding step of Qwen3-30B-A3B with random weights, in a CUDA graph: where its time goes.

    python benchmarks/gpu/decode_step.py --out result.json [--batches 1 8 32] [--context 256]

The model is fused, first its experts alone, then its dense parts too; both run the engine's cache
and attention. The figure is the median of replays back to back; the table lists kernels by their
time in one layer (of those that run in each), from the profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

import moetor
from moetor.bench.hardware import describe_run
from moetor.engine.cache import Batch, EngineCache, LayerShape
from moetor.engine.model import ServedModel
from moetor.huggingface.dense_fusing import fuse_dense
from moetor.huggingface.dummy import CONFIGS, dummy_model

BLOCK = 16
_REPLAYS, _PROFILED = 40, 5


def tell(begin: float, text: str) -> None:
    """A line with the seconds since `begin`."""
    torch.cuda.synchronize()
    print(f"{time.perf_counter() - begin:6.1f} s  {text}", flush=True)


class DecodeStep:
    """A captured step of `sequences` sequences with `context` tokens each."""

    def __init__(self, model: Any, sequences: int, context: int) -> None:
        self.served = ServedModel(model)
        config = self.served.config
        columns = -(-context // BLOCK)
        shape = LayerShape(
            heads=config.num_key_value_heads,
            key_width=config.head_dim,
            value_width=config.head_dim,
            dtype=model.dtype,
        )
        self.cache = EngineCache(
            config,
            dict.fromkeys(range(config.num_hidden_layers), shape),
            num_blocks=sequences * columns,
            block_size=BLOCK,
            device=torch.device("cuda"),
        )
        generator = torch.Generator("cuda").manual_seed(1)
        for blocks in self.cache.blocks.values():
            for held in (blocks.keys, blocks.values):
                held.normal_(generator=generator)
        table = torch.arange(sequences * columns, device="cuda").view(sequences, columns)
        self.batch = Batch(
            slots_T=table[:, (context - 1) // BLOCK] * BLOCK + (context - 1) % BLOCK,
            block_table_SM=table.int(),
            seq_lens_S=torch.full((sequences,), context, device="cuda").int(),
            query_start_S1=torch.arange(sequences + 1, device="cuda").int(),
            num_decodes=sequences,
            max_query_len=1,
        )
        high = self.served.vocab_size
        self.ids = torch.randint(0, high, (1, sequences), device="cuda", generator=generator)
        self.positions = torch.full((1, sequences), context - 1, device="cuda")
        self.past = context - 1

    def run(self) -> Tensor:
        """Logits [S, V]."""
        with self.served.paged_attention(), self.cache.running(self.batch, self.past):
            return self.served(self.ids, self.positions, self.cache, None)[0]

    def capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph, and the logits that it fills."""
        self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run()
        return graph, logits


def time_of(graph: torch.cuda.CUDAGraph) -> float:
    """Median milliseconds of a replay."""
    times = []
    for _ in range(_REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def kernels_of(graph: torch.cuda.CUDAGraph, layers: int) -> list[tuple[str, float, float]]:
    """Name, launches of a layer and microseconds of a layer, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED):
            graph.replay()
        torch.cuda.synchronize()
    counts: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name] += 1
            spent[event.name] += event.time_range.elapsed_us()
    scale = _PROFILED * layers
    rows = [(name, counts[name] / scale, spent[name] / scale) for name in spent]
    return sorted(rows, key=lambda row: -row[2])


def main() -> None:
    """Both forms of the model, at every batch size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int, default=48)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    config = CONFIGS["qwen3-30b-a3b"]()
    config.num_hidden_layers = arguments.layers
    model: Any = dummy_model(
        config, Qwen3MoeForCausalLM, torch.bfloat16, torch.device("cuda"), seed=0
    )
    tell(begin, "model made")
    moetor.fuse(model, verify="sample")
    tell(begin, "experts fused")
    results: list[dict[str, Any]] = []
    logits: dict[int, Tensor] = {}
    with torch.inference_mode():
        for form in ("experts", "experts and dense"):
            if form != "experts":
                reports = fuse_dense(model)
                print("\n".join(moetor.FusionReport([], dense=reports).dense_lines()))
                tell(begin, "dense parts fused")
            for sequences in arguments.batches:
                graph, found = DecodeStep(model, sequences, arguments.context).capture()
                took = time_of(graph)
                rows = kernels_of(graph, arguments.layers)
                print(f"{form}, {sequences} x {arguments.context}: {took:.3f} ms a step, "
                      f"{1e3 * sequences / took:.0f} tokens/s; kernels' own time a layer "
                      f"{sum(row[2] for row in rows):.1f} us")  # fmt: skip
                results.append({"form": form, "sequences": sequences, "ms": took, "kernels": rows})
                if form == "experts":
                    logits[sequences] = found.clone()
                    rows = rows[:6]
                else:
                    same = (found.argmax(-1) == logits[sequences].argmax(-1)).float().mean()
                    off = (found - logits[sequences]).float().norm(dim=-1)
                    off = (off / logits[sequences].float().norm(dim=-1)).median()
                    print(f"  against experts alone: median deviation {off:.1e}, "
                          f"same token {same:.0%}")  # fmt: skip
                for name, count, spent in rows[:18]:
                    print(f"  {spent:8.2f} us {count:6.2f} x {name[:90]}")
                tell(begin, "")
                del graph, found
                arguments.out.write_text(
                    json.dumps(
                        {
                            "command": " ".join(sys.argv),
                            "run": describe_run("cuda", torch.get_num_threads()),
                            "context": arguments.context,
                            "results": results,
                        },
                        indent=1,
                    )
                )


if __name__ == "__main__":
    main()
