"""The engine on a GPU: phases of the start, steps by batch size, prompts, and where a step goes.

    python benchmarks/gpu/engine.py --out DIR [--model qwen3-30b-a3b] [--sizes 1,8,32,128,256]

Random weights of a built-in configuration; greedy; every text has the same length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moetor.bench.generation import EngineBackend, decode_bytes
from moetor.engine import EngineConfig, ModelSource, SamplingParams, build_engine
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


def busy_share(events: Any) -> tuple[float, float]:
    """Microseconds from the first kernel's start to the last one's end, and how many of them some
    kernel was running: launches that overlap count once.
    """
    device = torch.autograd.DeviceType.CUDA
    times = sorted(
        (e.time_range.start, e.time_range.end) for e in events if e.device_type == device
    )
    busy, end = 0.0, times[0][0]
    for start, stop in times:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return end - times[0][0], busy


def gaps(events: Any, shown: int = 4) -> list[str]:
    """The longest times without a kernel, and between which kernels they were."""
    device = torch.autograd.DeviceType.CUDA
    kernels = sorted(
        (e.time_range.start, e.time_range.end, e.name) for e in events if e.device_type == device
    )
    found: list[tuple[float, str, str]] = []
    end, last = kernels[0][1], kernels[0][2]
    for start, stop, name in kernels[1:]:
        if start > end:
            found.append((start - end, last, name))
        if stop > end:
            end, last = stop, name
    total = sum(gap for gap, _, _ in found)
    lines = [f"{len(found)} gaps, {total:.0f} us in all; the longest:"]
    for gap, before, after in sorted(found, reverse=True)[:shown]:
        lines.append(f"{gap:9.1f} us  {before[:50]} -> {after[:50]}")
    return lines


def report(found: Any, steps: int, title: str, path: Path, shown: int) -> dict[str, Any]:
    """Writes the kernels of a profile and prints the longest."""
    table = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    span, busy = busy_share(found.events())
    total = sum(row.device_time_total for row in table)
    lines = [
        f"{title}: {span / steps:.0f} us a step, a kernel running in {busy / span:.1%} of it; "
        f"{total / steps:.0f} us of kernels"
    ]
    for row in table[:60]:
        each = row.device_time_total / steps
        lines.append(f"{each:9.1f} us  {row.count / steps:7.1f} x  {row.key[:110]}")
    lines[1:1] = gaps(found.events())
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:shown]), flush=True)
    return {"span_us": span / steps, "busy": busy / span, "kernels_us": total / steps}


def profile(backend: EngineBackend, batch: int, prompt: int, out: Path) -> dict[str, Any]:
    """Kernel times of some decoding steps."""
    engine = backend._engine
    ids = torch.randint(0, engine.served.vocab_size, (batch, prompt))
    requests = backend._add(ids, 64)
    while min(r.sequences[0].known for r in requests) < prompt + 8:
        engine.core.step()
    steps = 16
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            engine.core.step()
        synchronize()
    while not engine.core.idle:
        engine.core.step()
    return report(found, steps, f"batch {batch}", out / f"profile-{batch}.txt", 20)


def profile_prompts(backend: EngineBackend, prompts: torch.Tensor, out: Path) -> dict[str, Any]:
    """Kernel times of the steps that compute prompts."""
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        backend.generate(prompts, 1)
        synchronize()
    return report(found, 1, "prompts", out / "profile-prompts.txt", 24)


def drawn(backend: EngineBackend, batch: int, prompt: int, new: int) -> float:
    """Seconds of a decoding step whose tokens are drawn among the likeliest."""
    engine = backend._engine
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=4, max_tokens=new, ignore_eos=True)
    for number, ids in enumerate(torch.randint(0, engine.served.vocab_size, (batch, prompt))):
        request = engine.intake.request(ids.tolist(), params, f"drawn-{number}")
        engine.core.add(request)
    while engine.core.scheduler.waiting:
        engine.core.step()
    times = []
    while not engine.core.idle:
        begin = time.perf_counter()
        engine.core.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def prompt_phases(backend: EngineBackend, prompts: torch.Tensor) -> dict[str, Any]:
    """Where the time of some prompts goes on the host: taking them in, and each call of `step`."""
    core = backend._engine.core
    synchronize()
    begin = time.perf_counter()
    backend._add(prompts, 1)
    added, calls = time.perf_counter() - begin, []
    while not core.idle:
        start = time.perf_counter()
        core.step()
        calls.append(time.perf_counter() - start)
    return {"added": added, "steps": calls, "total": time.perf_counter() - begin}


def prompt_rates(
    backend: EngineBackend, prompts: torch.Tensor, budgets: list[int]
) -> dict[str, float]:
    """Tokens of prompts a second, by the tokens of a step; also without graphs where they have
    some.
    """
    core, rates = backend._engine.core, {}
    graphs, most = core.runner.graphs, core.scheduler.budget
    captured = graphs.prompts
    for budget in budgets or [most]:
        core.scheduler.budget = budget
        ways = {"": captured}
        if captured is not None and captured.holds(budget, 1):
            ways[" without graphs"] = None
        for name, graphs.prompts in ways.items():
            backend.generate(prompts, 1)
            seconds = statistics.median(backend.generate(prompts, 1).total for _ in range(3))
            rates[f"{budget} a step{name}"] = prompts.numel() / seconds
            print(
                f"prompts, {budget} a step{name}: {prompts.numel() / seconds:.0f} tok/s", flush=True
            )
    core.scheduler.budget, graphs.prompts = most, captured
    return rates


def check(backend: EngineBackend, tokens: int = 12) -> list[dict[str, Any]]:
    """The same texts without graphs, with those of decoding steps, and with those of prompts too.
    Where a token differs, the logits up to then say whether two tokens were as good as tied: their
    difference beside that of the two ways.
    """
    runner = backend._engine.core.runner
    graphs, prompt_graphs = runner.graphs.decode, runner.graphs.prompts
    if graphs is None:
        return []
    logits: list[torch.Tensor] = []

    def kept(function: Callable[..., Any], rows: Callable[[Any], torch.Tensor]) -> Any:
        def call(*args: Any) -> Any:
            answer = function(*args)
            logits.append(rows(answer).float().clone())
            return answer

        return call

    rows, forward = [], runner.forward
    runner.forward = kept(forward, lambda answer: answer.merged())
    graphs.run = kept(graphs.run, lambda answer: answer[0])
    if prompt_graphs is not None:
        prompt_graphs.run = kept(prompt_graphs.run, lambda answer: answer[0])
    for size in (1, 5):
        prompts = torch.randint(0, backend._engine.served.vocab_size, (size, 40))
        found = []
        for ways in ((None, None), (graphs, None), (graphs, prompt_graphs)):
            logits.clear()
            runner.graphs.decode, runner.graphs.prompts = ways
            requests = backend._add(prompts, tokens)
            while not backend._engine.core.idle:
                backend._engine.core.step()
            synchronize()
            backend._check(requests, tokens)
            ids = torch.tensor([request.sequences[0].output_ids for request in requests])
            found.append((ids, torch.stack(logits[-tokens:])))
        for name, other in zip(("graphs", "graphs of prompts too"), found[1:], strict=True):
            rows.append({"batch": size, "with": name} | compare(found[0], other))
            print(rows[-1], flush=True)
    runner.forward = forward
    del graphs.run
    if prompt_graphs is not None:
        del prompt_graphs.run
    return rows


Texts = tuple[torch.Tensor, torch.Tensor]
"""Tokens [B, N], and the logits [N, B, V] that they were taken from."""


def compare(eager: Texts, replayed: Texts) -> dict[str, Any]:
    """Where two ways differ, and how much."""
    (ids, ours), (other_ids, theirs) = eager, replayed
    same = (ids == other_ids).cumprod(1).sum(1)
    differences = []
    for sequence, first in enumerate(same.tolist()):
        if first < ids.shape[1]:
            a, b = ours[first, sequence], theirs[first, sequence]
            top = a.topk(2).values
            deviation = float((a - b).abs().max())
            differences.append({"margin": float(top[0] - top[1]), "deviation": deviation})
    both = int(same.min())
    apart = (ours[:both] - theirs[:both]).abs()
    return {
        "equal tokens": same.tolist(),
        "first differences": differences,
        "largest deviation of equal texts": float(apart.max()) if both else None,
        "standard deviation of logits": float(ours.std()),
    }


def numbers(text: str) -> list[int]:
    """Of a list with commas."""
    return [int(one) for one in text.split(",") if one]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="1,8,32,128,256")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--profile", default="1,8,32,128,256")
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--fuse-dense", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--prefill", default="16x2048")
    parser.add_argument("--record-load", action="store_true", help="count experts, as serve does")
    parser.add_argument("--budgets", default="", help="tokens of a step to compute prompts with")
    parser.add_argument("--draw", default="", help="batch sizes whose tokens are drawn, too")
    parser.add_argument("--no-check", action="store_true")
    given = parser.parse_args()
    sizes = numbers(given.sizes)
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
                max_num_batched_tokens=max(given.step_tokens, max(sizes)),
                max_model_len=max(given.prompt + given.new, length + 1),
                gpu_memory_utilization=0.95,
                enable_prefix_caching=False,
                load_format="dummy",
                fuse_dense=given.fuse_dense,
                record_expert_load=given.record_load,
            ),
        )
    print(
        f"strategy {engine.strategy}; graphs: {engine.without_graphs or 'yes'}; "
        f"{engine.core.scheduler.blocks.total} blocks",
        flush=True,
    )
    backend = EngineBackend("moetor", engine)
    checked = [] if given.no_check else check(backend)
    record: dict[str, Any] = {"phases": PHASES, "check": checked}
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
    drawing = {size: drawn(backend, size, given.prompt, 48) for size in numbers(given.draw)}
    for size, seconds in drawing.items():
        print(f"drawn {size}: {seconds * 1e3:.2f} ms a step", flush=True)
    prompts = torch.randint(0, vocabulary, (count, length))
    rates = prompt_rates(backend, prompts, numbers(given.budgets))
    phases = prompt_phases(backend, prompts)
    print("prompts on the host:", json.dumps(phases), flush=True)
    stats = engine.core.stats()
    print(f"steps {stats.steps}, by graph {stats.graph_steps}")
    record |= {"rows": rows, "prefill": rates, "drawn": drawing, "prompt phases": phases}
    if torch.cuda.is_available():
        sizes = numbers(given.profile)
        found = {size: profile(backend, size, given.prompt, given.out) for size in sizes}
        record["profiles"] = found | {"prompts": profile_prompts(backend, prompts, given.out)}
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    (given.out / "engine.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
