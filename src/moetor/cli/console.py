"""What the commands print: tables and progress bars on a terminal, plain stable lines otherwise.

Results go to standard output; progress, figures and errors to standard error.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moetor.progress import Progress, drawn_bar


def fail(message: str) -> None:
    """One line on standard error."""
    note(f"moetor: error: {message}")


def note(line: str) -> None:
    """A line that is not part of the result."""
    sys.stdout.flush()  # what was streamed so far comes first
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """`value` as JSON on standard output."""
    print(json_text(value))


def json_text(value: Any) -> str:
    """`value` as JSON; numbers that JSON lacks (NaN, infinity) become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: drawn on a terminal, otherwise aligned columns two spaces apart and never folded."""
    if not sys.stdout.isatty():
        print(title)
        for line in plain_table(columns, rows):
            print(line)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of an aligned table; an empty cell is a dash."""
    cells = [list(columns), *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


@contextmanager
def progress(label: str, unit: str) -> Iterator[Progress]:
    """A callback `(done, total, item)`: a bar on a terminal, otherwise one line at the end."""
    if not sys.stderr.isatty():
        last = 0

        def count(done: int, total: int, item: str = "") -> None:
            nonlocal last
            last = total

        yield count
        if last:
            note(f"{label}: {last} {unit}")
        return
    with drawn_bar(label, unit) as draw:
        yield draw


def quiet_transformers() -> None:
    """Silence the bars and warnings of Transformers: a command prints its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
