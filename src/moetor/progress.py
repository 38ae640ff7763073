"""A bar on standard error for long work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a long piece of work calls after each of its steps."""

    def __call__(self, done: int, total: int, item: str = "") -> None:
        """`done` of `total` steps are over, the last of them on `item`."""


@contextmanager
def drawn_bar(label: str, unit: str) -> Iterator[Progress]:
    """Draws until the end of the block, then clears. Only for a terminal: the caller has looked."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    parts = (TextColumn(escape(label)), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    now = (TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*parts, *now, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def draw(done: int, total: int, item: str = "") -> None:
            bar.update(task, completed=done, total=total, description=escape(item))

        yield draw
