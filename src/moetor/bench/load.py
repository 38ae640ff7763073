"""How long a checkpoint takes to load, and how much memory on the way, beside Transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moetor.errors import CheckpointError
from moetor.huggingface.dummy import CONFIGS, dummy_model

FORMAT = "moetor-bench-load/1"
WAYS = ("fused", "streamed", "transformers")
"""Streamed and fused, one block of each form proved; streamed alone; `from_pretrained`."""


@dataclass(frozen=True, slots=True)
class LoadRun:
    """One load in a process of its own; sizes in bytes, times in seconds.

    Attributes:
        returned: until there was a model.
        ready: until every page of every weight had been read, which a mapped file puts off.
        nbytes: of the parameters.
        before, held, peak: memory of the process before, with the model, and at its highest; None
            where the system keeps no record.
    """

    returned: float
    ready: float
    nbytes: int
    before: int | None
    held: int | None
    peak: int | None


@dataclass(frozen=True, slots=True)
class LoadRow:
    """Runs of one way to load."""

    way: str
    runs: tuple[LoadRun, ...]

    @property
    def ready(self) -> float:
        """Median seconds."""
        return median(run.ready for run in self.runs)

    @property
    def returned(self) -> float:
        """Median seconds."""
        return median(run.returned for run in self.runs)

    @property
    def above(self) -> int | None:
        """Largest memory above the process before and the parameters, in bytes."""
        found = [
            run.peak - run.before - run.nbytes
            for run in self.runs
            if run.peak is not None and run.before is not None
        ]
        return max(found, default=None)


@contextmanager
def checkpoint_of(model: str, layers: int | None, dtype: torch.dtype) -> Iterator[str]:
    """The folder itself, or one with random weights of a built-in configuration, for as long as it
    is needed.

    Args:
        layers: of the built-in configuration, fewer than it has.
    """
    if model not in CONFIGS:
        yield model
        return
    from transformers import AutoModelForCausalLM

    config = CONFIGS[model]()
    if layers is not None:
        config.num_hidden_layers = layers
    with TemporaryDirectory(prefix="moetor-bench-load-") as folder:
        made = dummy_model(config, AutoModelForCausalLM, dtype, torch.device("cpu"), 0)
        made.save_pretrained(folder)
        del made
        yield folder


def measure_load(
    folder: str,
    *,
    dtype: str,
    device: str,
    rounds: int,
    ways: Sequence[str] = WAYS,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[LoadRow]:
    """Loads in turns, each time in a new process, after one round that nobody counts: it brings
    the files into the system's cache.

    Raises:
        CheckpointError: a load failed; with the last line that it said.
    """
    runs: dict[str, list[LoadRun]] = {way: [] for way in ways}
    total = (rounds + 1) * len(ways)
    for number in range(rounds + 1):
        for place, way in enumerate(ways):
            run = _run(way, folder, dtype, device)
            if number > 0:
                runs[way].append(run)
            if progress is not None:
                progress(number * len(ways) + place + 1, total, way)
    return [LoadRow(way, tuple(some)) for way, some in runs.items()]


def _run(way: str, folder: str, dtype: str, device: str) -> LoadRun:
    command = [sys.executable, "-m", "moetor.bench.load_run", way, folder, dtype, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason was given"]
        raise CheckpointError(f"loading {Path(folder)} ({way}) failed: {lines[-1]}")
    return LoadRun(**json.loads(done.stdout.splitlines()[-1]))


def load_table(rows: Sequence[LoadRow]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows."""
    peer = next((row.ready for row in rows if row.way == "transformers"), None)
    columns = ["way", "returned s", "ready s", "GB/s", "memory above model", "vs transformers"]
    table = []
    for row in rows:
        above = "" if row.above is None else f"{row.above / 1e9:.2f} GB"
        table.append(
            [
                row.way,
                f"{row.returned:.2f}",
                f"{row.ready:.2f}",
                f"{row.runs[0].nbytes / row.ready / 1e9:.2f}",
                above,
                "" if peer is None else f"{row.ready / peer:.2f}x",
            ]
        )
    return columns, table


def load_record(rows: Sequence[LoadRow]) -> dict[str, Any]:
    """The rows as plain data."""
    return {"format": FORMAT, "rows": [asdict(row) | {"ready": row.ready} for row in rows]}
