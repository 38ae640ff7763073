"""The picture of a run: share of the floor against T, one panel per shape."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from moetor.bench.case import LayerTimes
from moetor.bench.layer import LayerReport
from moetor.bench.report import row_floor, share_of_floor
from moetor.bench.shapes import SHAPES, LayerShape
from moetor.errors import UnsupportedError

_PANELS_PER_ROW = 3
# Colour-blind safe (Okabe and Ito); a name keeps its colour in every picture.
_OURS = ("#D55E00", "o")
_PEERS = {
    "eager": ("#0072B2", "s", "Transformers eager"),
    "grouped_mm": ("#009E73", "^", "Transformers grouped_mm"),
    "batched_mm": ("#8C6BB1", "D", "Transformers batched_mm"),
    "vllm": ("#E69F00", "v", "vLLM fused_experts"),
    "dense": ("#999999", "x", "dense products of the same size (torch)"),
}


def check_plotting() -> None:
    """Refuses early when pictures cannot be drawn.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "--plot needs matplotlib, which is not installed; pip install 'moetor[plot]'"
        )


def plot_report(report: LayerReport, path: Path) -> None:
    """Writes the picture as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = report.request.shapes
    across = min(_PANELS_PER_ROW, len(shapes))
    down = -(-len(shapes) // across)
    figure = Figure(figsize=(4.2 * across + 0.4, 3.3 * down + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    shares = [
        _point(report, times, name)[1] for times in report.times for name in _drawn(report, times)
    ]
    lines: dict[str, Any] = {}
    for number, panel in enumerate(panels):
        if number >= len(shapes):
            panel.set_visible(False)
            continue
        lines |= _draw_panel(panel, report, shapes[number])
        panel.set_ylim(0, max([1.1, *(1.05 * share for share in shares)]))
        if number % across == 0:
            panel.set_ylabel("share of floor")
    columns = 2 * min(2, across)
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=columns)
    dtype = str(report.request.dtype).removeprefix("torch.")
    figure.suptitle(f"One MoE layer, {dtype}, {report.request.device}: floor / time", fontsize=12)
    figure.savefig(path, format="png", dpi=120)


def _draw_panel(panel: Any, report: LayerReport, shape: LayerShape) -> dict[str, Any]:
    """One shape's lines, by their names for the legend."""
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    rows = [times for times in report.times if times.shape.name == shape.name]
    rows.sort(key=lambda times: times.tokens)
    lines = {}
    for name in dict.fromkeys(name for times in rows for name in _drawn(report, times)):
        points = [_point(report, times, name) for times in rows if name in times.timings]
        ours = name not in report.request.peers
        color, marker, label = (*_OURS, f"moetor {name}") if ours else _PEERS[name]
        (lines[label],) = panel.plot(
            [tokens for tokens, _ in points],
            [share for _, share in points],
            color=color,
            marker=marker,
            linewidth=2.2 if ours else 1.4,
            label=label,
        )
    experts = shape.experts
    sizes = f"E={experts.num_experts} K={shape.top_k} H={experts.hidden_size}"
    sizes += f" I={experts.intermediate_size}"
    panel.set_title(f"{shape.name}\n{sizes}" if shape.name in SHAPES else sizes, fontsize=10)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("tokens T")
    panel.xaxis.set_major_locator(FixedLocator(list(report.request.tokens)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:g}")
    panel.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    panel.axhline(1, color="black", linewidth=1, linestyle=":")
    panel.grid(alpha=0.3)
    return lines


def _drawn(report: LayerReport, times: LayerTimes) -> list[str]:
    """Our kernel and the peers, without other plans of ours."""
    return [name for name in times.timings if name in (times.kernel, *report.request.peers)]


def _point(report: LayerReport, times: LayerTimes, name: str) -> tuple[int, float]:
    floor = row_floor(times, report.ceilings)
    return times.tokens, share_of_floor(floor, times.timings[name])
