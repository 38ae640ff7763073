"""`moetor bench load`: what it runs, tells and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetor.bench import load
from moetor.bench.load import LoadRow, LoadRun, load_table, measure_load
from moetor.cli.main import main
from moetor.errors import CheckpointError
from moetor.huggingface import loading
from moetor.huggingface.sources import resolve


def run_of(ready: float, peak: int) -> LoadRun:
    return LoadRun(
        returned=ready / 2, ready=ready, nbytes=10**9, before=10**8, held=10**9, peak=peak
    )


def test_table() -> None:
    ours = LoadRow("fused", tuple(run_of(t, 12 * 10**8) for t in (1.0, 9.0, 2.0)))
    plain = LoadRow("transformers", (run_of(4.0, 31 * 10**8),))
    columns, rows = load_table([ours, plain])
    told = [dict(zip(columns, row, strict=True)) for row in rows]
    assert told[0]["ready s"] == "2.00"
    assert told[0]["returned s"] == "1.00"
    assert told[0]["GB/s"] == "0.50"
    assert told[0]["memory above model"] == "0.10 GB"
    assert told[0]["vs transformers"] == "0.50x"
    assert told[1]["memory above model"] == "2.00 GB"
    assert told[1]["vs transformers"] == "1.00x"


@pytest.mark.parametrize("way", ["fused", "transformers"])
def test_a_load_in_a_process_of_its_own(way: str) -> None:
    run = load._run(way, resolve("demo"), "auto", "cpu")
    assert run.nbytes == sum(p.nbytes for p in loading.load_model("demo").parameters())
    assert 0 < run.returned <= run.ready
    if run.before is not None:
        assert run.held is not None
        assert run.peak is not None
        assert 0 < run.before < run.held <= run.peak


def test_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns; the first round is not counted."""
    asked: list[str] = []

    def run(way: str, folder: str, dtype: str, device: str) -> LoadRun:
        asked.append(way)
        assert (folder, dtype, device) == (resolve("demo"), "auto", "cpu")
        return run_of(float(len(asked)), 2 * 10**9)

    monkeypatch.setattr(load, "_run", run)
    file = tmp_path / "load.json"
    assert main(["bench", "load", "--rounds", "2", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "demo: " in out
    for way in load.WAYS:
        assert f"\n{way} " in out
    assert f"wrote {file}" in err
    record = json.loads(file.read_text())
    assert record["command"].startswith("moetor")
    assert record["versions"]["transformers"]
    assert [row["way"] for row in record["rows"]] == list(load.WAYS)
    assert asked == list(load.WAYS) * 3
    assert [[run["ready"] for run in row["runs"]] for row in record["rows"]] == [
        [4.0, 7.0],
        [5.0, 8.0],
        [6.0, 9.0],
    ]


def test_a_load_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(streamed\) failed: .*config\.json"):
        measure_load(str(tmp_path), dtype="auto", device="cpu", rounds=1, ways=("streamed",))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layers", "2"], "--layers is for a built-in configuration: qwen3-30b-a3b"),
        (["--rounds", "0"], "at least 1"),
        (["nowhere"], "'nowhere'"),
        (["--json", "/nowhere/load.json"], "no folder"),
    ],
)
def test_refused(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "load", *arguments]) != 0
    assert text in capsys.readouterr().err
