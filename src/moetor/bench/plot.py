"""The picture of a run: share of the floor against T, one panel per shape.

`python -m moetor.bench.plot RESULT.json PICTURE.png` draws that of an earlier run.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetor.bench.shapes import SHAPES
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
    "llama.cpp": ("#56B4E9", "P", "llama.cpp"),
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


def plot_record(record: dict[str, Any], path: Path) -> None:
    """Writes the picture as a PNG.

    Args:
        record: of a run, as `moetor.bench.report.to_dict` makes it and `--json` writes it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings, rows = record["settings"], record["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    across = min(_PANELS_PER_ROW, max(1, len(shapes)))
    down = max(1, -(-len(shapes) // across))
    figure = Figure(figsize=(4.2 * across + 0.4, 3.3 * down + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    shares = [found["share_of_floor"] for row in rows for found in _drawn(row)]
    lines: dict[str, Any] = {}
    for number, panel in enumerate(panels):
        if number >= len(shapes):
            panel.set_visible(False)
            continue
        lines |= _draw_panel(panel, [row for row in rows if row["shape"] == shapes[number]])
        panel.set_ylim(0, max([1.1, *(1.05 * share for share in shares)]))
        if number % across == 0:
            panel.set_ylabel("share of floor")
    columns = 2 * min(2, across)
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=columns)
    gpu = record.get("hardware", {}).get("gpu")
    where = settings["device"] if gpu is None else gpu["name"]
    figure.suptitle(f"One MoE layer, {settings['dtype']}, {where}: floor / time", fontsize=12)
    figure.savefig(path, format="png", dpi=120)


def _drawn(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Our kernel and the peers of its dtype, without other plans of ours, and without dense
    products where reading weights bounds the layer: they read one expert's."""
    return [
        found
        for found in row["implementations"]
        if (found["name"] == row["kernel"] or found["library"] != "moetor")
        and found["read_bytes"] == row["read_bytes"]
        and (found["name"] != "dense" or row["bound"] == "flops")
    ]


def _draw_panel(panel: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One shape's lines, by their names for the legend."""
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    rows = sorted(rows, key=lambda row: int(row["tokens"]))
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for found in _drawn(row):
            share = (row["tokens"], found["share_of_floor"])
            points.setdefault(found["name"], []).append(share)
    lines = {}
    for name, pairs in points.items():
        ours = name.split()[0] not in _PEERS or name == rows[0]["kernel"]
        color, marker, label = (*_OURS, f"moetor {name}") if ours else _PEERS[name.split()[0]]
        (lines[label],) = panel.plot(
            [tokens for tokens, _ in pairs],
            [share for _, share in pairs],
            color=color,
            marker=marker,
            linewidth=2.2 if ours else 1.4,
            label=label,
        )
    first = rows[0]
    sizes = f"E={first['num_experts']} K={first['top_k']} H={first['hidden_size']}"
    sizes += f" I={first['intermediate_size']}"
    name = first["shape"]
    panel.set_title(f"{name}\n{sizes}" if name in SHAPES else sizes, fontsize=10)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("tokens T")
    panel.xaxis.set_major_locator(FixedLocator([row["tokens"] for row in rows]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:g}")
    panel.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    panel.axhline(1, color="black", linewidth=1, linestyle=":")
    panel.grid(alpha=0.3)
    return lines


def main(arguments: Sequence[str]) -> None:
    """`python -m moetor.bench.plot RESULT.json PICTURE.png`: the picture of an earlier run."""
    record, picture = (Path(argument) for argument in arguments)
    plot_record(json.loads(record.read_text(encoding="utf-8")), picture)


if __name__ == "__main__":
    main(sys.argv[1:])
