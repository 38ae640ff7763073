"""Times of generated text as a table for people and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moetor.bench.generation import LatencyRow, ThroughputRow

LATENCY_FORMAT = "moetor-bench-latency/1"
THROUGHPUT_FORMAT = "moetor-bench-throughput/1"


def latency_table(
    rows: Sequence[LatencyRow], floors: dict[int, float]
) -> tuple[list[str], list[list[str]]]:
    """Column names and rows.

    Args:
        floors: by batch size, the least seconds of a decoding step.
    """
    columns = ["backend", "batch", "in", "out", "TTFT ms", "TPOT ms", "of floor", "tok/s", "warm s"]
    table = []
    for row in rows:
        work, floor = row.workload, floors.get(row.workload.batch_size)
        share = "" if floor is None or row.per_token is None else f"{floor / row.per_token:.0%}"
        table.append(
            [
                row.backend,
                str(work.batch_size),
                str(work.input_length),
                str(work.output_length),
                f"{row.first * 1e3:.1f}",
                "" if row.per_token is None else f"{row.per_token * 1e3:.2f}",
                share,
                f"{row.output_rate:.1f}",
                f"{row.warm_up:.1f}",
            ]
        )
    return columns, table


def throughput_table(rows: Sequence[ThroughputRow]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows."""
    columns = ["backend", "prompts", "at once", "in", "out", "seconds", "out tok/s", "tok/s"]
    return columns, [
        [
            row.backend,
            str(row.workload.prompts),
            str(row.workload.batch_size),
            str(row.workload.input_length),
            str(row.workload.output_length),
            f"{row.total:.2f}",
            f"{row.output_rate:.1f}",
            f"{row.total_rate:.1f}",
        ]
        for row in rows
    ]


def latency_dict(rows: Sequence[LatencyRow], floors: dict[int, float]) -> dict[str, Any]:
    """Plain values; times in seconds."""
    return {
        "format": LATENCY_FORMAT,
        "rows": [
            asdict(row)
            | {
                "output_tokens_per_second": row.output_rate,
                "floor_per_token": floors.get(row.workload.batch_size),
            }
            for row in rows
        ],
    }


def throughput_dict(rows: Sequence[ThroughputRow]) -> dict[str, Any]:
    """Plain values; times in seconds."""
    return {
        "format": THROUGHPUT_FORMAT,
        "rows": [
            asdict(row)
            | {
                "output_tokens_per_second": row.output_rate,
                "tokens_per_second": row.total_rate,
            }
            for row in rows
        ],
    }
