"""`moetor experts --save-stats` and `moetor eplb plan`: from a text to a placement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetor.cli.main import main
from moetor.parallel.eplb.statistics import save_loads


def test_from_a_text_to_a_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats, picture = tmp_path / "load.json", tmp_path / "plan.png"
    assert main(["experts", "--max-tokens", "200", "--json", "--save-stats", str(stats)]) == 0
    counted = json.loads(capsys.readouterr().out)["layers"]
    line = ["eplb", "plan", str(stats), "--ranks", "4", "--num-redundant-experts", "4"]
    assert main([*line, "--json", "--plot", str(picture)]) == 0
    planned = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["layer"] for layer in planned] == [layer["layer"] for layer in counted]
    for layer in planned:
        assert layer["balancedness_before"] < layer["balancedness_after"] <= 1
        assert sorted({expert for part in layer["placement"] for expert in part}) == [*range(16)]
        assert [len(part) for part in layer["placement"]] == [5] * 4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = tmp_path / "load.json"
    save_loads(stats, "demo", {"a": [8, 1, 1, 6], "none": [0, 0, 0, 0]})
    assert main(["eplb", "plan", str(stats)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "0.889", "0.889", "1.12x", "1.12x", "0", "of", "4"] in lines
    assert ["none", "1.000", "1.000", "0.00x", "0.00x", "0", "of", "4"] in lines


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (["--ranks", "0"], 2, "--ranks 0 must be at least 1"),
        (["--ranks", "5"], 1, "at least 1 redundant experts"),
        (["--policy", "hierarchical"], 1, "use 'global'"),
        (["--num-redundant-experts", "99"], 1, "exceeds 4"),
    ],
)
def test_bad_input(
    flags: list[str], status: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "load.json"
    save_loads(stats, "demo", {"a": [8, 1, 1, 6]})
    assert main(["eplb", "plan", str(stats), *flags]) == status
    assert text in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eplb", "plan", "/no/such/file"]) == 1
    assert "cannot be read" in capsys.readouterr().err
