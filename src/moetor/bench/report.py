"""A run as a table for people and as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moetor.bench.case import QUIET, LayerTimes
from moetor.bench.ceilings import Ceilings
from moetor.bench.floor import Floor, layer_floor
from moetor.bench.layer import LayerReport
from moetor.bench.llama_cpp import LLAMA_CPP, label_of
from moetor.bench.peers import LIBRARIES
from moetor.bench.timing import Timing

FORMAT = "moetor-bench-layer/2"


def row_floor(times: LayerTimes, ceilings: Ceilings, name: str | None = None) -> Floor:
    """The least time of a row's call, for quantised weights of those that it reads."""
    work = times.work if name is None else times.work_of(name)
    return layer_floor(work, ceilings.read_bytes_per_s, ceilings.flops_per_s)


def share_of_floor(floor: Floor, timing: Timing) -> float:
    """Floor / median: 1 is as fast as the machine allows."""
    return floor.seconds / timing.median


def table(report: LayerReport) -> tuple[list[str], list[list[str]]]:
    """Column names and rows: one for our kernel and each other plan of it; each peer's column says
    how many times as long as that row's it takes."""
    peers = report.request.peers
    columns = ["shape", "T", "kernel", "us", "p10-p90", "rate", "bound", "floor us", "of floor"]
    if report.request.device == "cuda":
        columns += ["rested us", "of floor"]
    columns += [f"vs {peer}" for peer in peers]
    rows = [
        _table_row(report, times, name)
        for times in report.times
        for name in times.timings
        if name.split()[0] not in peers
    ]
    return columns, rows


def _table_row(report: LayerReport, times: LayerTimes, name: str) -> list[str]:
    timing, floor = times.timings[name], row_floor(times, report.ceilings, name)
    work = times.work_of(name)
    if floor.bound == "bytes":
        rate = f"{work.read_bytes / timing.median / 1e9:.3g} GB/s"
    else:
        rate = f"{work.flops / timing.median / 1e12:.3g} TFLOP/s"
    row = [
        times.shape.name,
        str(times.tokens),
        name,
        _micros(timing.median),
        f"{_micros(timing.p10)}-{_micros(timing.p90)}",
        rate,
        floor.bound,
        _micros(floor.seconds),
        f"{share_of_floor(floor, timing):.0%}",
    ]
    if timing.rested is not None:
        row += [_micros(timing.rested), f"{floor.seconds / timing.rested:.0%}"]
    for peer in report.request.peers:
        other = label_of(name, report.request.dtype) if peer == LLAMA_CPP else peer
        found = times.timings.get(other)
        row.append("" if found is None else f"{found.median / timing.median:.2f}x")
    return row


def notes(report: LayerReport) -> list[str]:
    """What a reader of the table must know besides: ceilings, warm caches, peers left out."""
    lines = [f"ceilings: {report.ceilings.describe()}"]
    drift = _drift(report.ceilings_before, report.ceilings_after)
    if drift > 0.05:
        lines.append(
            f"the machine was not steady: its ceilings differ by {drift:.0%} between the start "
            f"and the end"
        )
    for times in report.times:
        place = f"{times.shape.name}, T={times.tokens}"
        rotation = times.rotation
        if times.other_use is not None and times.other_use > QUIET:
            lines.append(
                f"{place}: disturbed: other processes took {times.other_use:.0%} of the cores"
            )
        if not rotation.cold:
            lines.append(
                f"{place}: partly from the cache: {rotation.num_sets} sets of weights leave "
                f"{rotation.reuse_bytes / 1e6:.3g} MB between two uses of an expert, and "
                f"{rotation.target_bytes / 1e6:.3g} MB are wanted; more sets did not fit or not "
                f"help"
            )
        launched = [name for name, timing in times.timings.items() if timing.cuda_graph is False]
        if launched:
            lines.append(f"{place}: launched without a CUDA graph: {', '.join(launched)}")
        lines += [f"{place}: {name} left out: {why}" for name, why in times.skipped.items()]
    if report.unmeasured:
        rows = ", ".join(f"{shape} T={tokens}" for shape, tokens in report.unmeasured)
        lines.append(f"not measured, --seconds {report.request.seconds:g} were over: {rows}")
    return lines


def to_dict(report: LayerReport) -> dict[str, Any]:
    """The settings, ceilings and rows of a run as plain values; times in microseconds."""
    request = report.request
    return {
        "format": FORMAT,
        "settings": {
            "shapes": [shape.name for shape in request.shapes],
            "tokens": list(request.tokens),
            "dtype": str(request.dtype).removeprefix("torch."),
            "device": request.device,
            "threads": request.threads,
            "kernel": request.kernel,
            "peers": list(request.peers),
            "variants": list(request.variants),
            "quantizations": list(request.quantizations),
            "seconds": request.seconds,
            "routing": request.routing,
            "seed": request.seed,
        },
        "ceilings": {
            "used": asdict(report.ceilings) | {"flops_dtype": report.ceilings.flops_dtype},
            "before": asdict(report.ceilings_before),
            "after": asdict(report.ceilings_after),
        },
        "rows": [_row(times, report.ceilings) for times in report.times],
        "skipped": [
            {"shape": times.shape.name, "tokens": times.tokens, "name": name, "reason": reason}
            for times in report.times
            for name, reason in times.skipped.items()
        ],
        "failures": list(report.failures),
        "unmeasured": [{"shape": shape, "tokens": tokens} for shape, tokens in report.unmeasured],
    }


def _row(times: LayerTimes, ceilings: Ceilings) -> dict[str, Any]:
    floor, experts, rotation = row_floor(times, ceilings), times.shape.experts, times.rotation
    return {
        "shape": times.shape.name,
        "num_experts": experts.num_experts,
        "top_k": times.shape.top_k,
        "hidden_size": experts.hidden_size,
        "intermediate_size": experts.intermediate_size,
        "tokens": times.tokens,
        "kernel": times.kernel,
        "max_error": times.max_error,
        "active_experts": rotation.active_experts,
        "read_bytes": times.work.read_bytes,
        "flops": times.work.flops,
        "floor_us": floor.seconds * 1e6,
        "bound": floor.bound,
        "rotation": {
            "weight_sets": rotation.num_sets,
            "steps": len(rotation.steps),
            "reuse_bytes": rotation.reuse_bytes,
            "target_bytes": rotation.target_bytes,
            "cold": rotation.cold,
        },
        "other_use": times.other_use,
        "implementations": [
            _implementation(name, timing, times, row_floor(times, ceilings, name))
            for name, timing in times.timings.items()
        ],
    }


def _implementation(name: str, timing: Timing, times: LayerTimes, floor: Floor) -> dict[str, Any]:
    return {
        "name": name,
        "library": LIBRARIES.get(name.split()[0], "moetor"),
        "median_us": timing.median * 1e6,
        "p10_us": timing.p10 * 1e6,
        "p90_us": timing.p90 * 1e6,
        "samples": timing.samples,
        "cuda_graph": timing.cuda_graph,
        "read_bytes": times.work_of(name).read_bytes,
        "floor_us": floor.seconds * 1e6,
        "gb_per_s": times.work_of(name).read_bytes / timing.median / 1e9,
        "tflop_per_s": times.work.flops / timing.median / 1e12,
        "share_of_floor": share_of_floor(floor, timing),
        "rested_us": None if timing.rested is None else timing.rested * 1e6,
        "rested_share_of_floor": None if timing.rested is None else floor.seconds / timing.rested,
        "times_ours": timing.median / times.timings[times.kernel].median,
    }


def _micros(seconds: float) -> str:
    micros = seconds * 1e6
    return f"{micros:.0f}" if micros >= 100 else f"{micros:.1f}"


def _drift(before: Ceilings, after: Ceilings) -> float:
    pairs = [(before.read_bytes_per_s, after.read_bytes_per_s)]
    pairs += [
        (rate, after.gemm_flops_per_s[name]) for name, rate in before.gemm_flops_per_s.items()
    ]
    return max(abs(first - second) / max(first, second) for first, second in pairs)
