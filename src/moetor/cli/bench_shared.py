"""`moetor bench shared`: what a second stream for the shared experts gains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moetor.bench.shapes import check_tokens
from moetor.cli.console import note, print_table, progress
from moetor.cli.flags import UsageError
from moetor.errors import InputError
from moetor.output_paths import check_output_file

if TYPE_CHECKING:
    from moetor.bench.shared import SharedRow

FORMAT = "moetor-bench-shared/1"
COLUMNS = ("layer", "T", "one stream us", "two streams us", "gain")


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBenchOptions:
    """Time whole layers with shared experts on a GPU, with and without a second stream.

    Gate, routing, routed and shared experts, with random weights that come from memory, in CUDA
    graphs. The last line tells up to how many tokens two streams were never slower, which is what
    overlap_max_tokens of a SharedExpertsConfig is for.
    """

    layer: tuple[str, ...] = field(
        default=("all",),
        metadata={
            "metavar": "NAME,...",
            "help": "qwen1.5-moe-a2.7b, qwen2-57b-a14b, deepseek-v3-ep8, qwen3-next-80b-a3b, all",
        },
    )
    tokens: tuple[int, ...] = field(
        default=(1, 4, 16, 64, 128, 256, 512, 1024),
        metadata={"metavar": "T,...", "help": "tokens in a call"},
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "of weights and hidden states"}
    )
    seed: int = field(default=0, metadata={"help": "of weights and hidden states"})
    json: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write all figures there, as JSON"}
    )

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        check_output_file("--json", self.json)


def run(options: SharedBenchOptions) -> int:
    """Measure, print, write the file, and return the exit status."""
    import torch

    from moetor.bench.shared import bench_shared, find_layers, threshold

    try:
        layers = find_layers(options.layer)
    except InputError as refusal:
        raise UsageError(f"--layer: {refusal}") from refusal
    tokens = tuple(sorted(set(options.tokens)))
    dtype = getattr(torch, options.dtype)
    with progress("measuring", "rows") as measured:
        rows = list(bench_shared(layers, tokens, dtype, options.seed, measured))
    table = [
        (
            row.layer,
            str(row.tokens),
            f"{row.one_stream.median * 1e6:.1f}",
            f"{row.two_streams.median * 1e6:.1f}",
            f"{row.gain:.2f}x",
        )
        for row in rows
    ]
    print_table("one layer with shared experts", COLUMNS, table)
    print(f"two streams are never slower up to {threshold(rows)} tokens")
    if options.json is not None:
        _write(options, rows)
    return 0


def _write(options: SharedBenchOptions, rows: list[SharedRow]) -> None:
    import json

    import torch

    from moetor.bench.hardware import describe_run
    from moetor.bench.shared import threshold

    assert options.json is not None, "asked by the caller"
    record = describe_run("cuda", torch.get_num_threads()) | {
        "format": FORMAT,
        "dtype": options.dtype,
        "threshold": threshold(rows),
        "rows": [asdict(row) | {"gain": row.gain} for row in rows],
    }
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    note(f"wrote {options.json}")
