"""The picture of `moetor experts`: layers against experts, coloured by load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moetor.huggingface.expert_load import ExpertLoad

# Loads above this multiple of an even share have the last colour.
_LARGEST = 4.0
_TICKS = 32


def draw_expert_map(load: ExpertLoad, title: str, path: Path) -> None:
    """Writes the heat-map as a PNG: rows are layers, columns experts, colour is the load over an
    even share, and a bar at the right gives each layer's balancedness.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    layers = load.layers
    experts = max(len(layer.counts) for layer in layers)
    relative = np.full((len(layers), experts), np.nan)
    for row, layer in enumerate(layers):
        even = max(layer.slots, 1) / len(layer.counts)
        relative[row, : len(layer.counts)] = np.array(layer.counts) / even
    width = min(16.0, max(7.0, 3.5 + 0.06 * experts))
    height = min(14.0, max(3.2, 1.8 + 0.16 * len(layers)))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    chart, side = figure.subplots(1, 2, width_ratios=(width - 2.0, 1.2), sharey=True)
    image = chart.imshow(
        np.minimum(relative, _LARGEST),
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        norm=TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=_LARGEST),
    )
    chart.set_xlabel("expert")
    chart.set_ylabel("MoE layer")
    chart.set_title(title, fontsize=11, loc="left")
    chart.set_xticks(range(0, experts, max(1, -(-experts // _TICKS))))
    chart.set_yticks(range(0, len(layers), max(1, -(-len(layers) // _TICKS))))
    chart.tick_params(labelsize=8)
    if experts > _TICKS // 2:
        chart.tick_params(axis="x", rotation=90)
    colours = figure.colorbar(image, ax=side, ticks=[0, 0.5, 1, 2, 3, 4], fraction=0.5)
    colours.set_label("load / even share (1 = even)")
    colours.ax.set_yticklabels(["0", "0.5", "1", "2", "3", "4+"])
    side.barh(range(len(layers)), [layer.balancedness for layer in layers], color="#555555")
    side.set_xlim(0, 1)
    side.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    side.set_title("balanced", fontsize=9)
    side.tick_params(labelsize=8)
    figure.savefig(path, format="png", dpi=130)
