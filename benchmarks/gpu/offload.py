"""Experts in host memory: tokens a second by how many layers' experts are there, and by the cache.

    python benchmarks/gpu/offload.py --out FILE.json [--cases 48:0,24:64,...]

A case is LAYERS:CACHE: layers whose experts are in host memory, and experts of each of them that
the GPU caches. Random weights of a built-in configuration, so that routing is nearly uniform: real
texts choose some experts more often, and a cache serves more of them. One process and one engine;
layers in host memory take turns with the memory of a few (`--distinct`), which is far more than the
processor caches.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetor.bench.ceilings import measure_ceilings
from moetor.bench.generation import EngineBackend
from moetor.bench.hardware import describe_run
from moetor.engine import Engine, EngineConfig, ModelSource, build_engine
from moetor.huggingface import fuse, loading
from moetor.huggingface.dummy import CONFIGS, dummy_model
from moetor.huggingface.modules import fused_modules
from moetor.layer.experts import Experts
from moetor.layer.offload import ExpertOffload
from moetor.offload_config import OffloadConfig

DEVICE = torch.device("cuda", 0)
CASES = "48:0,48:64,24:0,24:64,12:0,12:64,0:0"
STEP_SIZES = (1, 8)


@dataclass(slots=True)
class Bench:
    """A model whose layers' experts can be put here and there.

    Attributes:
        hosts: parameters in host memory, with which layers take turns.
        locked: keeps these page-locked.
    """

    model: Any
    layers: list[Experts]
    hosts: list[list[nn.Parameter]]
    locked: ExpertOffload
    engine: Engine | None = None

    @classmethod
    def prepare(cls, name: str, distinct: int) -> Bench:
        """The model on the GPU, and some of its experts on the host."""
        config = CONFIGS[name]()
        model = dummy_model(config, loading.model_class(config), torch.bfloat16, DEVICE, 0)
        fuse(model, verify=False)
        layers = [module.routed_experts for _, module in fused_modules(model)]
        for _, module in fused_modules(model):
            module.let_go_of_weights()
        away = layers[-distinct:]
        for experts in away:
            set_parameters(experts, [nn.Parameter(p.cpu(), False) for p in parameters(experts)])
        hosts = [parameters(experts) for experts in away]
        locked = ExpertOffload(away, DEVICE, OffloadConfig(stream_min_tokens=0), 0)
        return cls(model, layers, hosts, locked)

    def place(self, count: int, cache: int) -> ExpertOffload | None:
        """Experts of the last `count` layers go into host memory, all others on the GPU."""
        first = len(self.layers) - count
        for number, experts in enumerate(self.layers):
            experts.offload = None
            host = self.hosts[number % len(self.hosts)]
            if number >= first:
                set_parameters(experts, host)
            elif not parameters(experts)[0].is_cuda:
                set_parameters(experts, [nn.Parameter(p.to(DEVICE), False) for p in host])
        gc.collect()
        torch.cuda.empty_cache()
        if not count:
            return None
        config = OffloadConfig(cpu_experts=count)
        return ExpertOffload(self.layers[first:], DEVICE, config, cache)

    def backend(self, group: ExpertOffload | None, longest: int) -> EngineBackend:
        """The engine with graphs of the present places; it is built once."""
        if self.engine is None:
            settings = EngineConfig(
                max_num_seqs=max(STEP_SIZES),
                max_num_batched_tokens=longest,
                max_model_len=longest + 64,
                kv_cache_blocks=(longest + 64) * max(STEP_SIZES) // 16 + 16,
                gpu_memory_utilization=0.98,
                enable_prefix_caching=False,
                enforce_eager=True,
            )
            self.engine = build_engine(ModelSource(model=self.model, level="none"), settings)
        runner = self.engine.core.runner
        runner.graphs.decode, runner.graphs.offload = None, group
        runner.graphs.capture()
        return EngineBackend("moetor", self.engine)


def parameters(experts: Experts) -> list[nn.Parameter]:
    """Of the experts, in the order of their names."""
    return [held for held in experts._parameters.values() if held is not None]


def set_parameters(experts: Experts, given: list[nn.Parameter]) -> None:
    """Gives experts others, in the order of `parameters`."""
    names = [name for name, held in experts._parameters.items() if held is not None]
    experts._parameters.update(zip(names, given, strict=True))


def measure(
    bench: Bench, group: ExpertOffload | None, prompts: list[int], new: int
) -> dict[str, Any]:
    """Tokens a second of one text and of several, and of prompts."""
    backend = bench.backend(group, max(prompts))
    vocabulary = backend._engine.served.vocab_size
    row: dict[str, Any] = {}
    for size in STEP_SIZES:
        ids = torch.randint(0, vocabulary, (size, 16))
        backend.generate(ids, 4)
        later = backend.generate(ids, 1 + (new if size == 1 else new // 3)).later
        step = statistics.median(later)
        row |= {f"step of {size} ms": step * 1e3, f"tok/s of {size}": size / step}
    for length in prompts:
        ids = torch.randint(0, vocabulary, (1, length))
        taken = min(backend.generate(ids, 1).first for _ in range(2))
        row[f"prompt {length} tok/s"] = length / taken
    if group is not None:
        row["hits"] = group.hot.hits / max(1, group.hot.choices)
        row["balance"] = str(group.balance)
    return row


def sweep(bench: Bench, given: argparse.Namespace) -> None:
    """Measures the cases, and writes what has been measured after each of them."""
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    prompts = [int(length) for length in given.prompts.split(",")]
    for case in given.cases.split(","):
        if given.seconds and time.perf_counter() - start > given.seconds:
            print(f"{case}: no time left", flush=True)
            continue
        count, cache = (int(number) for number in case.split(":"))
        group = bench.place(count, cache)
        row = {"layers": count, "cache": cache}
        rows.append(row | measure(bench, group, prompts, given.new))
        del group
        shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}
        print(f"{time.perf_counter() - start:5.1f} s {shown}", flush=True)
        record = describe_run(DEVICE.type, torch.get_num_threads()) | {
            "model": given.model,
            "distinct layers": len(bench.hosts),
            "rows": rows,
        }
        given.out.write_text(json.dumps(record, indent=1, default=str) + "\n")
    host = measure_ceilings("cpu", torch.bfloat16)
    print(f"the host reads {host.read_bytes_per_s / 1e9:.0f} GB/s", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--distinct", type=int, default=8)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--prompts", default="64,512,2048")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no case after these")
    return parser.parse_args()


def main() -> None:
    """See the module."""
    given = arguments()
    bench = Bench.prepare(given.model, given.distinct)
    with torch.inference_mode():
        sweep(bench, given)


if __name__ == "__main__":
    main()
