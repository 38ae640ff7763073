"""A run as a table for people and as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moetor.bench.ceilings import Ceilings
from moetor.bench.floor import Floor, layer_floor
from moetor.bench.layer import QUIET, LayerReport, LayerTimes
from moetor.bench.timing import Timing

FORMAT = "moetor-bench-layer/1"


def row_floor(times: LayerTimes, ceilings: Ceilings) -> Floor:
    """The least time of a row's call."""
    return layer_floor(times.work, ceilings.read_bytes_per_s, ceilings.flops_per_s)


def share_of_floor(floor: Floor, timing: Timing) -> float:
    """Floor / median: 1 is as fast as the machine allows."""
    return floor.seconds / timing.median


def table(report: LayerReport) -> tuple[list[str], list[list[str]]]:
    """Column names and rows; each peer's column says how many times as long as ours it takes."""
    peers = report.request.peers
    columns = ["shape", "T", "kernel", "us", "p10-p90", "rate", "bound", "floor us", "of floor"]
    columns += [f"vs {peer}" for peer in peers]
    rows = []
    for times in report.times:
        ours, floor = times.timings[times.kernel], row_floor(times, report.ceilings)
        if floor.bound == "bytes":
            rate = f"{times.work.read_bytes / ours.median / 1e9:.3g} GB/s"
        else:
            rate = f"{times.work.flops / ours.median / 1e12:.3g} TFLOP/s"
        ratios = [
            f"{times.timings[peer].median / ours.median:.2f}x" if peer in times.timings else ""
            for peer in peers
        ]
        rows.append(
            [
                times.shape.name,
                str(times.tokens),
                times.kernel,
                _micros(ours.median),
                f"{_micros(ours.p10)}-{_micros(ours.p90)}",
                rate,
                floor.bound,
                _micros(floor.seconds),
                f"{share_of_floor(floor, ours):.0%}",
                *ratios,
            ]
        )
    return columns, rows


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
        lines += [f"{place}: {peer} left out: {why}" for peer, why in times.skipped.items()]
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
            {"shape": times.shape.name, "tokens": times.tokens, "peer": peer, "reason": reason}
            for times in report.times
            for peer, reason in times.skipped.items()
        ],
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
            _implementation(name, timing, times, floor) for name, timing in times.timings.items()
        ],
    }


def _implementation(name: str, timing: Timing, times: LayerTimes, floor: Floor) -> dict[str, Any]:
    return {
        "name": name,
        "library": "moetor" if name == times.kernel else "transformers",
        "median_us": timing.median * 1e6,
        "p10_us": timing.p10 * 1e6,
        "p90_us": timing.p90 * 1e6,
        "samples": timing.samples,
        "cuda_graph": timing.cuda_graph,
        "gb_per_s": times.work.read_bytes / timing.median / 1e9,
        "tflop_per_s": times.work.flops / timing.median / 1e12,
        "share_of_floor": share_of_floor(floor, timing),
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
