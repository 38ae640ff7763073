"""The engine over the GPUs of one machine against one GPU: tokens compared, then steps timed.

    torchrun --nproc-per-node 2 benchmarks/gpu/parallel_engine.py --out DIR [--layers 12]

Random weights of a built-in configuration, the same for every way; greedy. All ways are built first
and compared with one GPU's texts, then timed in turns; where they do not fit beside one another,
name fewer in --ways. On one GPU every rank runs the whole model by itself.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine import numbers, report
from moetor.bench.generation import EngineBackend
from moetor.bench.hardware import describe_run
from moetor.engine import EngineConfig, ModelSource, build_engine, replay
from moetor.huggingface.dummy import CONFIGS
from moetor.parallel.config import ParallelConfig
from moetor.parallel.groups import join_ranks

EP: dict[str, Any] = {"enable_expert_parallel": True}
TP: dict[str, Any] = {"tensor_parallel_size": 2}
NCCL: dict[str, Any] = {"collectives": "backend"}
DIRECT: dict[str, Any] = {"collectives": "direct"}
WAYS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "one": (None, "auto"),
    "tp_off": ({**TP, **NCCL}, "off"),
    "tp_nccl": ({**TP, **NCCL}, "auto"),
    "tp": (TP, "auto"),
    "tp_direct": ({**TP, **DIRECT}, "auto"),
    "ep": ({**TP, **EP}, "auto"),
    "ep_direct": ({**TP, **EP, **DIRECT}, "auto"),
    "dp_ep": ({"data_parallel_size": 2, **EP}, "auto"),
    "dp_ep_direct": ({"data_parallel_size": 2, **EP, **DIRECT}, "auto"),
}
CHECKED = 12


def build(way: str, given: argparse.Namespace, device: str) -> EngineBackend:
    """The engine of one way."""
    fields, fuse_dense = WAYS[way]
    parallel = None if fields is None else ParallelConfig(timeout=30, **fields)
    sizes = numbers(given.sizes)
    engine = build_engine(
        ModelSource(
            model="measured",
            dtype=given.dtype,
            device=device if parallel is None else device.partition(":")[0],
            parallel=parallel,
        ),
        EngineConfig(
            max_num_seqs=max(sizes),
            max_num_batched_tokens=max(given.step_tokens, max(sizes)),
            max_model_len=given.prompt + given.new,
            kv_cache_blocks=max(sizes) * (-(-(given.prompt + given.new) // 16) + 1) + 1,
            enable_prefix_caching=False,
            load_format="dummy",
            fuse_dense=fuse_dense,
        ),
    )
    if torch.cuda.is_available():
        assert not engine.without_graphs, engine.without_graphs
    return EngineBackend(way, engine)


def texts(backend: EngineBackend, prompts: torch.Tensor) -> torch.Tensor:
    """Greedy tokens [B, N]."""
    core = backend._engine.core
    requests = backend._add(prompts, CHECKED)
    while not core.idle:
        core.step()
    return torch.tensor([request.sequences[0].output_ids for request in requests])


def checked(backend: EngineBackend, expected: dict[int, torch.Tensor]) -> dict[str, Any]:
    """How many tokens of each text are the same as one GPU's."""
    rows = {}
    for size in (1, 8):
        generator = torch.Generator().manual_seed(size)
        prompts = torch.randint(
            0, backend._engine.served.vocab_size, (size, 40), generator=generator
        )
        found = texts(backend, prompts)
        expected.setdefault(size, found)
        rows[str(size)] = (found == expected[size]).cumprod(1).sum(1).tolist()
    return rows


def timed(backend: EngineBackend, size: int, given: argparse.Namespace) -> tuple[float, float]:
    """Seconds to the first tokens and of a later step."""
    generator = torch.Generator().manual_seed(size)
    vocabulary = backend._engine.served.vocab_size
    prompts = torch.randint(0, vocabulary, (size, given.prompt), generator=generator)
    times = backend.generate(prompts, given.new)
    return times.first, statistics.mean(times.later)


def profile(backend: EngineBackend, size: int, given: argparse.Namespace) -> dict[str, Any]:
    """Kernels of some decoding steps; every rank steps alike."""
    core = backend._engine.core
    ids = torch.randint(
        0, backend._engine.served.vocab_size, (size, 40), generator=torch.Generator()
    )
    requests = backend._add(ids, 40)
    while min(r.sequences[0].known for r in requests) < 48:
        core.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(12):
            core.step()
        torch.cuda.synchronize()
    while not core.idle:
        core.step()
    path = given.out / f"profile-{backend.name}-{size}-rank{dist.get_rank()}.txt"
    return report(found, 12, f"{backend.name}, {size} streams", path, 14)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the model has")
    parser.add_argument("--ways", default="one,tp,tp_nccl,ep,tp_off")
    parser.add_argument("--sizes", default="1,32,256")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-tokens", type=int, default=4096)
    parser.add_argument("--profile", default="", help="way:size, with commas between")
    parser.add_argument("--apart", action="store_true", help="one way after another, then freed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    begin = time.monotonic()
    device = join_ranks(given.device)
    rank = dist.get_rank()
    settings = CONFIGS[given.model]() if given.model in CONFIGS else None
    assert settings is not None, f"possible models: {', '.join(CONFIGS)}"
    settings.num_hidden_layers = given.layers or settings.num_hidden_layers
    CONFIGS["measured"] = lambda: copy.deepcopy(settings)
    wanted = sorted({*numbers(given.sizes), 8})
    # Graphs of these sizes alone, and none of prompts: the start takes most of the time.
    replay.graph_sizes = lambda most: [size for size in wanted if size <= most]  # type: ignore
    replay.StepGraphs.capture_prompts = lambda *given: None  # type: ignore
    record: dict[str, Any] = {
        **describe_run(given.device, torch.get_num_threads()),
        "command": "torchrun --nproc-per-node 2 benchmarks/gpu/parallel_engine.py --out DIR",
        "layers": settings.num_hidden_layers,
        "prompt_tokens": given.prompt,
        "generated_tokens": given.new,
        "ways": {},
    }
    expected: dict[int, torch.Tensor] = {}
    backends: dict[str, EngineBackend] = {}
    rows: dict[str, Any] = record["ways"]

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.monotonic() - begin:6.1f} s  {text}", flush=True)
            (given.out / "parallel_engine.json").write_text(json.dumps(record, indent=1) + "\n")

    def measure(names: list[str], rounds: int) -> None:
        for size in numbers(given.sizes):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for number in range(rounds + 1):
                for name in names:
                    dist.barrier(
                        device_ids=None if device == "cpu" else [torch.cuda.current_device()]
                    )
                    one = timed(backends[name], size, given)
                    if number:
                        found[name].append(one)
            for name in names:
                first, later = (statistics.median(row) for row in zip(*found[name], strict=True))
                rows[name].setdefault("steps", {})[size] = {
                    "first_s": first,
                    "later_s": later,
                    "decode_tokens_per_s": size / later,
                }
                say(
                    f"{name:8s} {size:4d} streams: first {first * 1e3:8.1f} ms, later "
                    f"{later * 1e3:7.3f} ms, {size / later:8.0f} tok/s"
                )

    for way in given.ways.split(","):
        rows[way] = {"parallel": WAYS[way][0], "fuse_dense": WAYS[way][1]}
        try:
            start = time.monotonic()
            backends[way] = build(way, given, device)
            rows[way]["start_s"] = time.monotonic() - start
            rows[way]["equal_tokens"] = checked(backends[way], expected)
            groups = getattr(backends[way]._engine.core, "groups", None)
            sums = "" if groups is None else f"; collectives: {groups.not_direct or 'direct'}"
            say(
                f"{way}: built in {rows[way]['start_s']:.1f} s, tokens equal to one GPU's "
                f"{rows[way]['equal_tokens']}{sums}"
            )
        except Exception:
            rows[way]["failed"] = traceback.format_exc()
            backends.pop(way, None)
            say(f"{way} failed: {rows[way]['failed'][-1500:]}")
            continue
        if given.apart:
            measure([way], given.rounds)
            for pair in filter(None, given.profile.split(",")):
                if pair.partition(":")[0] == way:
                    rows[way].setdefault("profiles", {})[pair] = profile(
                        backends[way], int(pair.partition(":")[2]), given
                    )
            del backends[way]
            gc.collect()
            torch.cuda.empty_cache()
    if not given.apart:
        measure(list(backends), given.rounds)
        for pair in filter(None, given.profile.split(",")):
            way, _, size = pair.partition(":")
            if way in backends:
                found = profile(backends[way], int(size), given)
                rows[way].setdefault("profiles", {})[size] = found
    say("done")
    backends.clear()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
