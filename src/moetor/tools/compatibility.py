"""`COMPATIBILITY.md`: what fusing does to every MoE family of Transformers, measured on tiny
models.

    python -m moetor.tools.compatibility --write COMPATIBILITY.md
    python -m moetor.tools.compatibility --check COMPATIBILITY.md
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from moetor.tools.sweep import FamilyRow, sweep
from moetor.tools.tiny import FAMILIES, family_of

COLUMNS = (
    "family",
    "blocks",
    "routing",
    "float32",
    "bfloat16",
    "compiled",
    "greedy",
    "images",
    "note",
)
# Columns that the check compares word by word; of the errors only the order of magnitude.
_EXACT = ("blocks", "routing", "compiled", "greedy")
_ERRORS = ("float32", "bfloat16", "images")

INTRODUCTION = """\
# Compatibility

Every Mixture-of-Experts family of Hugging Face Transformers, fused by `moetor.fuse(model)` and
compared with itself. The models are tiny and random: few layers, 8 experts, every bias, clamp and
group limit of the family at work. Written by `python -m moetor.tools.compatibility --write
COMPATIBILITY.md`; a check in the tests fails when it is out of date.

- **blocks**: number of MoE blocks at level *block* (the whole block is one fused layer), *experts*
  (the experts alone are fused, the family's own code routes) and *none* (left as it is); in
  float32, and where bfloat16 reaches another level the note says so.
- **routing**: as recognised; *callable*: the family's own router is called, the rest is fused.
- **float32**: largest deviation of the logits from those of the model before fusing, over the
  largest logit.
- **bfloat16**: error of the median token's logits against the same bfloat16 weights computed in
  float32; in brackets the error of the model that is not fused.
- **compiled**: whether `torch.compile(fullgraph=True)` captures the fused blocks.
- **greedy**: whether greedy generation gives the same tokens; -: the family does not generate.
- **images**: as float32, with a picture in each sequence (pixel tensors, no processor); -: not
  tried.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    names = options.families.split(",") if options.families else list(FAMILIES)
    for name in names:
        family_of(name)
    _be_quiet()
    rows = []
    start = time.perf_counter()
    for number, row in enumerate(sweep(names), 1):
        rows.append(row)
        print(f"[{number}/{len(names)}] {progress_line(row)}", file=sys.stderr, flush=True)
    print(f"{len(rows)} families in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.write:
        options.write.write_text(document(rows))
    if options.check:
        stale = differences(options.check.read_text(), rows)
        for line in stale:
            print(line)
        if stale:
            print(f"{options.check} is out of date: write it again with --write {options.check}")
            return 1
    elif not options.write:
        print(table(rows))
    return 0


def document(rows: Sequence[FamilyRow]) -> str:
    """The whole file."""
    blocks = [sum(row.levels[level] for row in rows) for level in range(3)]
    whole = sum(1 for row in rows if row.levels[0] and not any(row.levels[1:]))
    summary = (
        f"{whole} of {len(rows)} families are fused whole: of their {sum(blocks)} blocks "
        f"{blocks[0]} are at level block, {blocks[1]} at level experts, {blocks[2]} at none. "
        f"Measured with Transformers {transformers.__version__} and PyTorch "
        f"{torch.__version__.split('+')[0]} on CPU."
    )
    return "\n".join([INTRODUCTION, summary, "", table(rows), ""])


def table(rows: Sequence[FamilyRow]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        texts = cells(row)
        lines.append("| " + " | ".join(texts[column] for column in COLUMNS) + " |")
    return "\n".join(lines)


def cells(row: FamilyRow) -> dict[str, str]:
    """A row's texts by column."""
    bfloat16 = "-"
    if row.bfloat16_error is not None:
        bfloat16 = f"{_error(row.bfloat16_error)} ({_error(row.bfloat16_original)})"
    texts = {
        "family": row.family,
        "blocks": " / ".join(map(str, row.levels)),
        "routing": "; ".join(row.routing) or "-",
        "float32": _error(row.float32_error),
        "bfloat16": bfloat16,
        "compiled": _yes(row.compiled),
        "greedy": _yes(row.greedy),
        "images": _error(row.images_error),
        "note": row.note,
    }
    return {column: text.replace("|", "\\|") for column, text in texts.items()}


def progress_line(row: FamilyRow) -> str:
    """A row in one line, for a person who waits."""
    texts = cells(row)
    parts = [f"{row.seconds:5.1f} s  {row.family:<22} {texts['blocks']:<10}"]
    parts += [f"float32 {texts['float32']:<8} bfloat16 {texts['bfloat16']:<18}"]
    parts += [f"compiled {texts['compiled']:<4} greedy {texts['greedy']:<4}"]
    return " ".join([*parts, texts["note"][:100]])


def differences(document_text: str, rows: Sequence[FamilyRow]) -> list[str]:
    """Where a file disagrees with a sweep, as lines for a person; empty when it is current.

    Families that the installed Transformers does not have are not compared.
    """
    committed = read_table(document_text)
    lines = []
    for row in rows:
        if row.note.startswith("skipped: "):
            continue
        now, then = cells(row), committed.get(row.family)
        if then is None:
            lines.append(f"{row.family}: not in the file")
            continue
        for column in _EXACT:
            if now[column] != then[column]:
                lines.append(f"{row.family}: {column} {then[column]!r} is now {now[column]!r}")
        for column in _ERRORS:
            if not _same_magnitude(now[column], then[column]):
                lines.append(f"{row.family}: {column} {then[column]} is now {now[column]}")
    return lines


def read_table(text: str) -> dict[str, dict[str, str]]:
    """The rows of a written file: cells by column, by family."""
    rows = {}
    for line in text.splitlines():
        texts = [part.strip() for part in line.replace("\\|", "\0").split("|")[1:-1]]
        if len(texts) == len(COLUMNS) and texts[0] in FAMILIES:
            texts = [part.replace("\0", "\\|") for part in texts]
            rows[texts[0]] = dict(zip(COLUMNS, texts, strict=True))
    return rows


def _same_magnitude(now: str, then: str) -> bool:
    """Whether two errors are within a factor of ten; rounding differs between processors."""
    numbers = []
    for text in (now, then):
        try:
            numbers.append(float(text.split()[0]))
        except ValueError:
            return now == then
    low, high = sorted(numbers)
    if high < 1e-6 or not math.isfinite(high):  # all of it rounding, 0 included
        return math.isfinite(high) or low == high
    return high <= 10 * max(low, 1e-7)


def _error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def _be_quiet() -> None:
    """Warnings of configurations and of generation would drown the progress lines."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moetor.tools.compatibility", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to a file")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="exit with 1 when a written file is out of date"
    )
    parser.add_argument("--families", metavar="A,B", help="only these families")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
