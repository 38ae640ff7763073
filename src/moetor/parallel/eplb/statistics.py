"""Recorded loads as a file, from which experts are placed before a model runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetor.errors import ConfigError

FORMAT = "moetor expert load 1"

LayerLoads = Mapping[str, Sequence[float]]
"""Choices of every expert, by path of the layer."""


def save_loads(path: Path, model: str, loads: LayerLoads) -> None:
    """Writes how often each layer of `model` chose each expert."""
    layers = {name: list(counts) for name, counts in loads.items()}
    path.write_text(json.dumps({"format": FORMAT, "model": model, "layers": layers}) + "\n")


def read_loads(path: Path) -> dict[str, list[float]]:
    """The loads of a file that `save_loads` wrote.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        told: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the statistics {path} cannot be read: {error}") from error
    layers = told.get("layers") if isinstance(told, dict) else None
    if not isinstance(layers, dict) or told.get("format") != FORMAT or not layers:
        raise ConfigError(
            f"{path} holds no expert statistics; moetor experts MODEL --save-stats FILE makes them"
        )
    loads: dict[str, list[float]] = {}
    for name, counts in layers.items():
        fine = isinstance(counts, list) and counts
        if not fine or not all(isinstance(n, int | float) and n >= 0 for n in counts):
            raise ConfigError(f"{path}: the counts of layer {name!r} are not numbers from 0 on")
        loads[name] = [float(count) for count in counts]
    return loads
