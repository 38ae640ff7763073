"""Plain output when nobody watches, drawn output on a terminal, JSON that parses."""

from __future__ import annotations

import io
import json
import sys

import pytest

from moetor.cli import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plain_table_is_aligned_and_never_folded(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    console.print_table("title", ("name", "n"), [("a[b]", "1"), (long, "")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert lines[1] == "name" + " " * 298 + "n"
    assert lines[2] == "a[b]" + " " * 298 + "1"
    assert lines[3] == long + "  -"


def test_a_terminal_gets_a_drawn_table(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    console.print_table("title", ("name",), [("a[b]",)])
    assert "━" in screen.getvalue()
    assert "a[b]" in screen.getvalue()


def test_progress_is_one_line_when_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("loading", "weights") as step:
        for done in range(1, 4):
            step(done, 3)
    captured = capsys.readouterr()
    assert captured.err == "loading: 3 weights\n"
    assert captured.out == ""


def test_progress_of_nothing_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("loading", "weights"):
        pass
    assert capsys.readouterr().err == ""


def test_progress_that_fails_does_not_claim_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    def fail_half_way() -> None:
        with console.progress("loading", "weights") as step:
            step(1, 2)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail_half_way()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress("loading", "weights") as step:
        step(1, 2)
        step(2, 2, "layers[0]")
    assert "layers[0]" in screen.getvalue()
    assert "loading" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": [float("nan"), 1.5], "b": (float("inf"), "é"), "c": {"d": None}})
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": [None, 1.5], "b": [None, "é"], "c": {"d": None}}
    assert "é" in text
