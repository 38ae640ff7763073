"""The engine on a GPU: phases of the start, steps by batch size, prompts, and where a step goes.

    python benchmarks/gpu/engine.py --out DIR [--model qwen3-30b-a3b] [--sizes 1,8,32,128,256]

Random weights of a built-in configuration; greedy; every text has the same length.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moetor.bench.generation import EngineBackend, decode_bytes
from moetor.engine import EngineConfig, ModelSource, build_engine
from moetor.engine import build as building

PHASES: dict[str, float] = {}


def synchronize() -> None:
    """Waits for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Tells how long something took."""
    synchronize()
    begin = time.perf_counter()
    yield
    synchronize()
    PHASES[name] = time.perf_counter() - begin
    print(f"{name}: {PHASES[name]:.1f} s", flush=True)


def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function as a phase."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with phase(name):
            return function(*args, **kwargs)

    return call


def profile(backend: EngineBackend, batch: int, prompt: int, vocabulary: int, out: Path) -> None:
    """Kernel times of some decoding steps."""
    engine = backend._engine
    ids = torch.randint(0, vocabulary, (batch, prompt))
    requests = backend._add(ids, 64)
    while min(r.sequences[0].known for r in requests) < prompt + 8:
        engine.core.step()
    steps = 16
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            engine.core.step()
        synchronize()
    table = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in table)
    lines = [f"batch {batch}: {total / steps:.0f} us of kernels a step"]
    for row in table[:40]:
        each = row.device_time_total / steps
        lines.append(f"{each:9.1f} us  {row.count / steps:7.1f} x  {row.key[:110]}")
    (out / f"profile-{batch}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:16]), flush=True)
    while not engine.core.idle:
        engine.core.step()


def check(backend: EngineBackend) -> None:
    """The same texts without graphs and with them, batches of several sizes."""
    runner = backend._engine.core.runner
    vocabulary = backend._engine.served.vocab_size
    for size in (1, 5):
        prompts = torch.randint(0, vocabulary, (size, 40))
        graphs, runner.graphs = runner.graphs, None
        found = []
        for way in (None, graphs):
            runner.graphs = way
            requests = backend._add(prompts, 12)
            while not backend._engine.core.idle:
                backend._engine.core.step()
            synchronize()
            backend._check(requests, 12)
            found.append([request.sequences[0].output_ids for request in requests])
            print(f"batch {size} {'with' if way else 'without'} graphs: done", flush=True)
        print(f"batch {size}: equal {found[0] == found[1]}", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="1,8,32,128,256")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--profile", default="1,32")
    parser.add_argument("--fuse-dense", action="store_true")
    parser.add_argument("--prefill", default="16x2048")
    given = parser.parse_args()
    sizes = [int(size) for size in given.sizes.split(",")]
    building.fuse = timed(building.fuse, "fuse")  # type: ignore[attr-defined]
    building.fuse_dense = timed(building.fuse_dense, "fuse dense parts")  # type: ignore[attr-defined]
    building.dummy_model = timed(building.dummy_model, "weights")  # type: ignore[attr-defined]
    building.choose_strategy = timed(building.choose_strategy, "trial")  # type: ignore[attr-defined]
    building.free_memory = timed(building.free_memory, "full step")  # type: ignore[attr-defined]
    building._capture = timed(building._capture, "graphs")
    count, length = map(int, given.prefill.split("x"))
    with phase("start"):
        engine = build_engine(
            ModelSource(model=given.model, device=given.device),
            EngineConfig(
                max_num_seqs=max(sizes),
                max_num_batched_tokens=max(8192, max(sizes)),
                max_model_len=max(given.prompt + given.new, length + 1),
                gpu_memory_utilization=0.95,
                enable_prefix_caching=False,
                load_format="dummy",
                fuse_dense=given.fuse_dense,
            ),
        )
    print(
        f"strategy {engine.strategy}; graphs: {engine.without_graphs or 'yes'}; "
        f"{engine.core.scheduler.blocks.total} blocks",
        flush=True,
    )
    backend = EngineBackend("moetor", engine)
    check(backend)
    vocabulary = engine.served.vocab_size
    rows = []
    print("batch   TTFT ms  TPOT ms   tok/s  decode tok/s   floor ms at 4.25 TB/s")
    for size in sizes:
        prompts = torch.randint(0, vocabulary, (size, given.prompt))
        backend.generate(prompts, 8)
        times = backend.generate(prompts, given.new)
        later = sum(times.later) / len(times.later)
        floor = decode_bytes(engine.served.model, size) / 4.25e12
        rate = size * given.new / times.total
        rows.append({"batch": size, "first": times.first, "later": later, "rate": rate})
        print(
            f"{size:5d} {times.first * 1e3:9.1f} {later * 1e3:8.2f} {rate:7.0f} "
            f"{size / later:13.0f} {floor * 1e3:10.2f}",
            flush=True,
        )
    prompts = torch.randint(0, vocabulary, (count, length))
    backend.generate(prompts, 1)
    seconds = backend.generate(prompts, 1).total
    print(f"prefill {given.prefill}: {count * length / seconds:.0f} tok/s", flush=True)
    stats = engine.core.stats()
    print(f"steps {stats.steps}, by graph {stats.graph_steps}")
    for size in map(int, given.profile.split(",")):
        profile(backend, size, given.prompt, vocabulary, given.out)
    record = {"phases": PHASES, "rows": rows, "prefill": count * length / seconds}
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    (given.out / "engine.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
