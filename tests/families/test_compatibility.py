"""The compatibility table: written, read and compared; and the committed file against today."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import transformers

import moetor
from moetor.errors import ConfigError, UnsupportedError
from moetor.tools import compatibility, sweep
from moetor.tools.compatibility import cells, differences, document, main, read_table
from moetor.tools.sweep import FamilyRow
from moetor.tools.tiny import FAMILIES, tiny_model

COMMITTED = Path(__file__).parents[2] / "COMPATIBILITY.md"

ROW = FamilyRow(
    family="mixtral",
    levels=(3, 0, 0),
    routing=("softmax top-3 of 8, renormalised",),
    float32_error=4e-7,
    bfloat16_error=1.2e-2,
    bfloat16_original=1.1e-2,
    compiled=True,
    greedy=True,
    note="a | in the middle",
)


def test_a_written_table_is_current() -> None:
    assert differences(document([ROW]), [ROW]) == []
    assert read_table(document([ROW]))["mixtral"] == cells(ROW)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"levels": (2, 1, 0)}, "blocks"),
        ({"routing": ("softmax top-2 of 8",)}, "routing"),
        ({"compiled": False}, "compiled"),
        ({"greedy": False}, "greedy"),
        ({"float32_error": 1e-3}, "float32"),
        ({"float32_error": None}, "float32"),
        ({"bfloat16_error": 0.5}, "bfloat16"),
    ],
)
def test_what_makes_a_table_stale(change: dict[str, object], column: str) -> None:
    (line,) = differences(document([ROW]), [replace(ROW, **change)])  # type: ignore[arg-type]
    assert line.startswith(f"mixtral: {column} ")


@pytest.mark.parametrize(
    "change", [{"float32_error": 1.1e-6}, {"float32_error": 0.0}, {"note": "other"}]
)
def test_what_does_not(change: dict[str, object]) -> None:
    assert differences(document([ROW]), [replace(ROW, **change)]) == []  # type: ignore[arg-type]


def test_a_family_that_is_not_in_the_file_is_named() -> None:
    assert differences(document([]), [ROW]) == ["mixtral: not in the file"]


def test_a_family_that_is_not_installed_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> FamilyRow:
        raise UnsupportedError(f"no {name}")

    monkeypatch.setattr(sweep, "check_family", missing)
    (row,) = sweep.sweep(["mixtral"])
    assert row.note == "skipped: no mixtral"
    assert differences(document([]), [row]) == []


def test_a_family_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> FamilyRow:
        raise RuntimeError(f"{name}\nis broken")

    monkeypatch.setattr(sweep, "check_family", broken)
    (row,) = sweep.sweep(["mixtral"])
    assert row.note == "RuntimeError: mixtral is broken"
    assert row.levels == (0, 0, 0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "sweep", lambda names: iter([ROW] * len(names)))
    monkeypatch.setattr(compatibility, "_be_quiet", lambda: None)
    file, figures = tmp_path / "table.md", tmp_path / "figures.json"
    assert main(["--families", "mixtral", "--write", str(file), "--json", str(figures)]) == 0
    assert '"family": "mixtral"' in figures.read_text()
    assert main(["--families", "mixtral", "--check", str(file)]) == 0
    file.write_text(file.read_text().replace("3 / 0 / 0", "0 / 3 / 0"))
    assert main(["--families", "mixtral", "--check", str(file)]) == 1


def test_the_command_refuses_an_unknown_family() -> None:
    with pytest.raises(ConfigError, match="'mixtrall'"):
        main(["--families", "mixtrall"])


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.skipif(
    f"Transformers {transformers.__version__} " not in COMMITTED.read_text(),
    reason="the file was written with another Transformers",
)
def test_the_committed_levels_and_routing_are_current(name: str) -> None:
    try:
        report = moetor.fuse(tiny_model(name))
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    now = cells(FamilyRow(family=name, **sweep._levels(report)))
    then = read_table(COMMITTED.read_text())[name]
    assert (now["blocks"], now["routing"]) == (then["blocks"], then["routing"])
