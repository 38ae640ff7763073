"""`moetor bench load`: how long a checkpoint takes to load, and how much memory on the way."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from moetor.cli.console import note, print_table, progress, quiet_transformers
from moetor.cli.options import MODEL, DtypeName
from moetor.errors import InputError
from moetor.output_paths import check_output_file

OUTPUT = "output"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadBenchOptions:
    """Load a checkpoint in turns: streamed and fused, streamed alone, and by Transformers.

    Each load runs in a process of its own, after one round that only brings the files into the
    system's cache. A load is ready when every weight has been read once, which a mapped file puts
    off. Medians are told, and the most memory above the weights themselves.
    """

    model: str = field(
        default="demo",
        metadata={
            "positional": True,
            "help": "folder of a Transformers model, demo, or a built-in configuration whose "
            "random weights are written to a temporary folder first: qwen3-30b-a3b",
        },
    )
    layers: int | None = field(
        default=None,
        metadata={
            "group": MODEL,
            "metavar": "N",
            "help": "layers of a built-in configuration; none: all of them",
        },
    )
    dtype: DtypeName = field(
        default="auto",
        metadata={"group": MODEL, "help": "of the loaded weights; auto: the checkpoint's own"},
    )
    device: str = field(
        default="cpu", metadata={"group": MODEL, "metavar": "DEVICE", "help": "cpu or cuda"}
    )
    rounds: int = field(
        default=3, metadata={"group": MODEL, "metavar": "N", "help": "timed loads of each way"}
    )
    json: Path | None = field(
        default=None,
        metadata={"group": OUTPUT, "metavar": "FILE", "help": "write all figures there, as JSON"},
    )

    def __post_init__(self) -> None:
        if self.rounds < 1 or (self.layers is not None and self.layers < 1):
            raise InputError("--rounds and --layers take numbers of at least 1")
        check_output_file("--json", self.json)


def run(options: LoadBenchOptions) -> int:
    """Measure, print, write the file, and return the exit status."""
    import torch

    from moetor.bench.hardware import describe_run
    from moetor.bench.load import checkpoint_of, load_record, load_table, measure_load
    from moetor.huggingface import loading
    from moetor.huggingface.devices import find_device, find_dtype
    from moetor.huggingface.dummy import CONFIGS
    from moetor.huggingface.sources import resolve

    if options.layers is not None and options.model not in CONFIGS:
        raise InputError(f"--layers is for a built-in configuration: {', '.join(CONFIGS)}")
    quiet_transformers()
    if options.model not in CONFIGS:
        loading.load_config(options.model)  # refuses a name that means nothing
    device = find_device(options.device).type
    dtype = find_dtype(options.dtype) or torch.bfloat16
    with (
        checkpoint_of(options.model, options.layers, dtype) as folder,
        progress(f"loading {options.model}", "loads") as shown,
    ):
        rows = measure_load(
            resolve(folder),
            dtype=options.dtype,
            device=options.device,
            rounds=options.rounds,
            progress=shown,
        )
    size = rows[0].runs[0].nbytes
    print_table(f"{options.model}: {size / 1e9:.2f} GB of weights", *load_table(rows))
    if options.json is not None:
        record = describe_run(device, torch.get_num_threads()) | load_record(rows)
        record |= {"model": options.model, "layers": options.layers, "cpus": os.cpu_count()}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
        note(f"wrote {options.json}")
    return 0
