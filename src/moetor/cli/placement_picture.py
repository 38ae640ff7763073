"""The picture of `moetor eplb plan`: what every rank has to do, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moetor.cli.eplb import PlannedLayer

# Loads above this multiple of an even share have the last colour.
_LARGEST = 2.0
_TICKS = 32


def draw_placements(planned: Sequence[PlannedLayer], path: Path) -> None:
    """Writes two heat-maps as a PNG: rows are layers, columns ranks, colour is the load over an
    even share.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    from moetor.parallel.eplb.balance import balancedness, part_loads

    ranks = len(planned[0].before.parts)
    width = min(16.0, max(6.5, 3.0 + 0.3 * ranks))
    figure = Figure(figsize=(width, min(14.0, 2.2 + 0.16 * len(planned))), layout="constrained")
    FigureCanvasAgg(figure)
    charts = figure.subplots(1, 2, sharey=True)
    image = None
    for chart, when in zip(charts, ("before", "after"), strict=True):
        rows, even = [], []
        for layer in planned:
            placement = layer.before if when == "before" else layer.after
            loads = np.array(part_loads(placement, layer.loads))
            rows.append(loads / (loads.mean() or 1.0))
            even.append(balancedness(placement, layer.loads))
        image = chart.imshow(
            np.minimum(np.stack(rows), _LARGEST),
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            norm=TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=_LARGEST),
        )
        chart.set_title(f"{when}: balanced {np.mean(even):.2f}", fontsize=11, loc="left")
        chart.set_xlabel("rank")
        chart.set_xticks(range(0, ranks, max(1, -(-ranks // _TICKS))))
        chart.set_yticks(range(0, len(planned), max(1, -(-len(planned) // _TICKS))))
        chart.tick_params(labelsize=8)
    charts[0].set_ylabel("MoE layer")
    assert image is not None, "there are two charts"
    colours = figure.colorbar(image, ax=charts, ticks=[0, 0.5, 1, 1.5, 2], fraction=0.05)
    colours.set_label("load / even share")
    colours.ax.set_yticklabels(["0", "0.5", "1", "1.5", "2+"])
    figure.savefig(path, format="png", dpi=130)
