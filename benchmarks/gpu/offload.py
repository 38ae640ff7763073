"""Experts in host memory: tokens a second by how many layers' experts are there, and by the cache.

    python benchmarks/gpu/offload.py --out FILE.json [--layers 0,12,24,48] [--caches 0,64]

Random weights of a built-in configuration, so that routing is nearly uniform: real texts choose
some experts more often, and the cache serves more of them. One process; the layers that are not in
host memory are copied to the GPU before each measurement.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetor.bench.ceilings import measure_ceilings
from moetor.bench.generation import EngineBackend
from moetor.bench.hardware import describe_run
from moetor.engine import EngineConfig, ModelSource, build_engine
from moetor.huggingface import fuse, loading
from moetor.huggingface.dummy import CONFIGS, dummy_model
from moetor.huggingface.modules import fused_modules
from moetor.layer.experts import Experts
from moetor.layer.offload import ExpertOffload
from moetor.offload_config import OffloadConfig

GROUP = "_moetor_offload"


def place(
    model: Any, layers: list[Experts], hosts: list[list[nn.Parameter]], count: int, cache: int
) -> ExpertOffload | None:
    """Puts the experts of the last `count` layers into host memory and all others on the GPU."""
    model.__dict__.pop(GROUP, None)
    first = len(layers) - count
    for number, (experts, host) in enumerate(zip(layers, hosts, strict=True)):
        experts.offload = None
        names = [name for name, held in experts._parameters.items() if held is not None]
        for name, parameter in zip(names, host, strict=True):
            stays = number >= first
            moved = parameter if stays else nn.Parameter(parameter.cuda(), requires_grad=False)
            experts._parameters[name] = moved
    gc.collect()
    torch.cuda.empty_cache()
    if not count:
        return None
    device = torch.device("cuda", 0)
    group = ExpertOffload(layers[first:], device, OffloadConfig(cpu_experts=count), cache)
    model.__dict__[GROUP] = group
    return group


def measure(model: Any, group: ExpertOffload | None, given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of one text and of several, and what a prompt takes."""
    longest = max(map(int, given.prompts.split(",")))
    engine = build_engine(
        ModelSource(model=model, level="none"),
        EngineConfig(
            max_num_seqs=max(given.sizes),
            max_num_batched_tokens=longest,
            max_model_len=longest + 64,
            gpu_memory_utilization=0.95,
            kv_cache_blocks=(longest + 64) * max(given.sizes) // 16 + 16,
            enable_prefix_caching=False,
        ),
    )
    backend = EngineBackend("moetor", engine)
    vocabulary = engine.served.vocab_size
    row: dict[str, Any] = {"graphs": engine.without_graphs or "yes"}
    for size in given.sizes:
        prompts = torch.randint(0, vocabulary, (size, 16))
        new = given.new if size == 1 else max(8, given.new // size)
        backend.generate(prompts, 4)
        found = []
        for _ in range(2):
            times = backend.generate(prompts, new)
            found.append(statistics.fmean(times.later))
        row[f"step {size} ms"] = min(found) * 1e3
        row[f"tok/s {size}"] = size / min(found)
    for length in map(int, given.prompts.split(",")):
        prompts = torch.randint(0, vocabulary, (1, length))
        taken = [backend.generate(prompts, 1).first for _ in range(2)]
        row[f"prompt {length} tok/s"] = length / min(taken)
    if group is not None:
        row["hits"] = group.hot.hits / max(1, group.hot.choices)
        row["balance"] = [group.balance.min_tokens, group.balance.copy_seconds]
        row["balance"].append(list(group.balance.host))
    return row


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", default="48,24,12,0")
    parser.add_argument("--caches", default="0,64")
    parser.add_argument("--sizes", default="1,8")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompts", default="64,512,2048")
    given = parser.parse_args()
    given.sizes = [int(size) for size in given.sizes.split(",")]
    device = torch.device("cuda", 0)
    begin = time.perf_counter()
    config = CONFIGS[given.model]()
    made = loading.model_class(config)
    model = dummy_model(config, made, torch.bfloat16, device, 0)
    counts = [int(count) for count in given.layers.split(",")]
    asked = OffloadConfig(cpu_experts=config.num_hidden_layers, cache_experts=0)
    fuse(model, cpu_experts=asked, verify="sample")
    locked = model.__dict__[GROUP]  # keeps host memory page-locked
    layers = [module.routed_experts for _, module in fused_modules(model)]
    hosts = [[p for p in one._parameters.values() if p is not None] for one in layers]
    print(f"model made and moved in {time.perf_counter() - begin:.1f} s", flush=True)
    print(f"balance {locked.balance}", flush=True)
    rows = []
    for count in counts:
        for cache in [int(text) for text in given.caches.split(",")] if count else [0]:
            begin = time.perf_counter()
            group = place(model, layers, hosts, count, cache)
            row = {"layers": count, "cache": cache} | measure(model, group, given)
            rows.append(row)
            del group
            shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
            shown.pop("balance", None)
            print(f"{time.perf_counter() - begin:5.1f} s {shown}", flush=True)
    ceilings = measure_ceilings("cpu", torch.bfloat16)
    record = describe_run("cuda", torch.get_num_threads()) | {
        "model": given.model,
        "threads": torch.get_num_threads(),
        "host_read_bytes_per_s": ceilings.read_bytes_per_s,
        "rows": rows,
    }
    print(f"host reads {ceilings.read_bytes_per_s / 1e9:.0f} GB/s", flush=True)
    given.out.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
