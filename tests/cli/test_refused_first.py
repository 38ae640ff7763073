"""What cannot be done is refused in one line before a model is loaded or anything is measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetor.cli.main import main
from moetor.huggingface import dummy, loading
from moetor.huggingface.devices import find_device
from moetor.parallel.eplb.statistics import save_loads

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def _nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is read or drawn fails the test."""

    def weights(*_: Any, **__: Any) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(loading, "stream_weights", weights)
    monkeypatch.setattr(dummy, "_draw_apart", weights)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with a file `file`, a folder `full` that holds one, and `load.json`."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("text")
    save_loads(tmp_path / "load.json", "demo", {"a": [8, 1, 1, 6]})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(line: str, capsys: Captured) -> tuple[int, str]:
    """The status of a command and the one line that it says."""
    status = main(line.split())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moetor: error: ")
    assert err.count("\n") == 1
    assert "unexpected" not in err
    return status, err


@pytest.mark.usefixtures("_nothing_loads", "folder")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("experts --plot no/x.png", "--plot no/x.png: there is no folder no; make it first"),
        ("experts --plot full", "--plot full: that is a folder; name a file"),
        ("experts --plot x.txt", "--plot x.txt: what is written is a PNG; name it FILE.png"),
        ("experts --save-stats no/x.json", "--save-stats no/x.json: there is no folder no"),
        ("experts --save-stats file/x.json", "there is no folder file"),
        ("eplb plan load.json --plot no/x.png", "--plot no/x.png: there is no folder no"),
        ("eplb plan load.json --plot x.svg", "--plot x.svg: what is written is a PNG"),
        ("bench layer --json no/x.json", "--json no/x.json: there is no folder no"),
        ("bench load --json full", "--json full: that is a folder; name a file"),
        ("bench serve --json full", "--json full: that is a folder; name a file"),
        ("bench shared --json full", "--json full: that is a folder; name a file"),
        ("bench latency --json full", "--json full: that is a folder; name a file"),
        ("eval x --output full", "--output full: that is a folder; name a file"),
        ("quantize demo full", "full exists and is not an empty folder; name a new one"),
        ("quantize demo file", "file exists and is not an empty folder; name a new one"),
        ("quantize demo file/out", "file is a file; name another folder"),
        ("bench serve --url foo", "--url 'foo' is not the address of a server"),
        ("bench serve --url http://", "write it as http://HOST:PORT"),
        ("bench serve --url http://host:port", "write it as http://HOST:PORT"),
        ("bench serve --url ftp://host", "write it as http://HOST:PORT"),
        ("bench shared --layer foo", "--layer: unknown layer 'foo'; possible: qwen1.5-moe"),
        ("chat --temperature -1", "--temperature -1 must be 0 or a positive number"),
        ("chat --top-p 0", "--top-p 0 must be above 0 and at most 1"),
        ("chat --max-tokens 0", "--max-tokens 0 must be at least 1"),
        ("chat --seed -1", "--seed -1 must be at least 0"),
        ("generate --prompt x -tp 0", "error: --tensor-parallel-size 0 must be positive"),
        ("serve -dp -1", "error: --data-parallel-size -1 must be positive"),
        ("serve --parallel-timeout 0", "error: --parallel-timeout 0.0 must be positive"),
        (
            "generate --prompt x --expert-parallel-size 2",
            "error: --expert-parallel-size needs --enable-expert-parallel\n",
        ),
        (
            "generate --prompt x --eplb-stats load.json --num-redundant-experts 2",
            "error: --eplb-stats, --num-redundant-experts needs --enable-expert-parallel\n",
        ),
        (
            "bench latency -tp 3 --enable-expert-parallel --expert-parallel-size 2",
            "error: --expert-parallel-size 2 does not divide the 3 ranks",
        ),
        ("serve --max-num-seqs 0", "error: --max-num-seqs 0 must be at least 1\n"),
        (
            "bench latency --max-num-batched-tokens 2 --max-num-seqs 4",
            "error: --max-num-batched-tokens 2 is below --max-num-seqs 4: a step has one token of "
            "each sequence; lower --max-num-seqs\n",
        ),
        ("serve --seed -1", "error: --seed -1 must be at least 0"),
        ("serve --port 70000", "error: --port 70000 must be between 0 and 65535"),
        ("serve --drain-timeout -1", "error: --drain-timeout -1.0 must be at least 0"),
        ("explain --cpu-experts 1 --gpu-memory lots", "error: --gpu-memory lots is no size"),
        ("serve --sequence-parallel", "it needs --tensor-parallel-size of at least 2"),
        ("serve -tp 2 --dispatcher alltoall", "error: --dispatcher alltoall concerns tokens"),
    ],
)
def test_a_bad_flag_is_status_2(line: str, said: str, capsys: Captured) -> None:
    status, text = refused(line, capsys)
    assert said in text
    assert status == 2


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("experts --plot x.png", "--plot x.png: it cannot be written by this user"),
        ("experts --save-stats file", "--save-stats file: it cannot be written by this user"),
        ("quantize demo out", "out cannot be made: "),
    ],
)
def test_what_the_user_may_not_write(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)
    status, text = refused(line, capsys)
    assert said in text
    assert status == 2


@pytest.mark.skipif(sys.platform != "linux", reason="its /proc lets nobody make a folder")
def test_a_folder_that_the_system_does_not_make(capsys: Captured) -> None:
    status, text = refused("quantize demo /proc/none/out", capsys)
    assert "/proc/none/out cannot be made" in text
    assert status == 2


@pytest.mark.usefixtures("_nothing_loads")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("verify --device cuda:9", "device 'cuda:9' was asked for and "),
        ("bench load nofolder", "'nofolder' is neither a folder nor a hub id"),
    ],
)
def test_a_model_or_device_that_is_not_there_is_status_1(
    line: str, said: str, capsys: Captured
) -> None:
    status, text = refused(line, capsys)
    assert said in text
    assert status == 1


@pytest.mark.usefixtures("_nothing_loads")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "line",
    [
        "generate --prompt x --kernel triton",
        "generate --prompt x --kernel triton --level experts",
        "generate --prompt x --kernel triton --quantization int8",
        "chat --kernel triton",
        "experts --kernel triton",
        "verify --kernel triton",
        "verify --kernel triton --quantization int8",
        "bench latency --kernel triton",
        "bench latency --kernel triton --load-format dummy --quantization int8",
    ],
)
def test_a_kernel_is_refused_before_weights_are_read(line: str, capsys: Captured) -> None:
    status, text = refused(line, capsys)
    assert "kernel 'triton' was asked for and runs on NVIDIA GPUs, not on cpu" in text
    assert status == 1


def test_a_gpu_beyond_the_last_one(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")
    status, text = refused("verify --device cuda:9", capsys)
    assert "device 'cuda:9' was asked for and the last one here is cuda:1" in text
    assert status == 1


def test_the_help_of_what_is_required_and_may_be_several(capsys: Captured) -> None:
    assert main(["eval", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: moetor eval TASK [TASK ...] [flags]\n")


@pytest.mark.parametrize("line", ["--help", "bench --help", "eplb --help"])
def test_the_help_of_a_group_sets_its_last_line_apart(line: str, capsys: Captured) -> None:
    assert main(line.split()) == 0
    before, found, _ = capsys.readouterr().out.partition("COMMAND --help` explains a command")
    assert found
    assert "" in before.splitlines()[-3:]
