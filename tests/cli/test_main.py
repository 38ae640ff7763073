"""Errors are one line on standard error, with the exit status that fits."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from moetor import __version__
from moetor.cli import main as entry
from moetor.cli.main import main
from moetor.errors import CheckpointError

Captured = pytest.CaptureFixture[str]


def one_line(captured: Captured) -> str:
    """The only line on standard error; nothing is on standard output."""
    out, err = captured.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith("moetor: error: ")
    return err.removeprefix("moetor: error: ").rstrip("\n")


@pytest.fixture
def explain_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `moetor explain` raise what it is given."""
    module = importlib.import_module("moetor.cli.explain")

    def install(error: BaseException) -> None:
        def run(_options: object) -> int:
            raise error

        monkeypatch.setattr(module, "run", run)

    return install


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "name a command: "),
        ("bench", "name a command: layer, "),
        ("sing", "there is no command 'sing'; the commands are generate, "),
        ("--sing", "unrecognized arguments: --sing"),
        ("--sing generate", "unrecognized arguments: --sing"),
        ("generate", "the following arguments are required: --prompt"),
        ("generate --prompt", "argument --prompt: expected one argument"),
        ("generate --prompt x --max-tokens 0", "--max-tokens 0 must be at least 1"),
        ("generate --prompt x --max-tokens -3", "--max-tokens -3 must be at least 1"),
        ("generate --prompt x --max-tokens many", "--max-tokens: invalid int value: 'many'"),
        ("generate --prompt x --temperature -1", "--temperature -1 must be 0 or a positive"),
        ("generate --prompt x --temperature nan", "--temperature nan must be 0 or a positive"),
        ("generate --prompt x --temperature inf", "--temperature inf must be 0 or a positive"),
        ("generate --prompt x --temperature 1 --top-p 0", "--top-p 0 must be above 0 and at most"),
        ("generate --prompt x --temperature 1 --top-p 1.5", "--top-p 1.5 must be above 0"),
        ("generate --prompt x --top-p 0.9", "it needs --temperature above 0"),
        ("generate --prompt x --seed -1", "--seed -1 must be at least 0"),
        ("generate --prompt x --level none --kernel native", "leave out one of the two"),
        ("generate --prompt x --kernel fast", "invalid choice: 'fast'"),
        ("generate --prompt=", "--prompt is empty"),
        ("explain one two", "unrecognized arguments: two (see `moetor explain --help`)"),
        ("explain --level none", "invalid choice: 'none'"),
        ("verify --dtype int8", "invalid choice: 'int8'"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(line: str, said: str, capsys: Captured) -> None:
    assert main(line.split()) == 2
    assert said in one_line(capsys)


def test_an_error_raised_on_purpose_is_its_text_and_status_1(
    explain_raises: Callable[[BaseException], None], capsys: Captured
) -> None:
    explain_raises(CheckpointError("no folder\n'here'; give a folder"))
    assert main(["explain"]) == 1
    assert one_line(capsys) == "no folder 'here'; give a folder"


def test_an_error_of_a_command_names_flags(
    explain_raises: Callable[[BaseException], None], capsys: Captured
) -> None:
    explain_raises(CheckpointError("add trust_remote_code=True, or lower gpu_memory"))
    assert main(["explain"]) == 1
    assert one_line(capsys) == "add --trust-remote-code, or lower --gpu-memory"


def test_any_other_error_is_one_line_that_says_how_to_see_more(
    explain_raises: Callable[[BaseException], None], capsys: Captured
) -> None:
    explain_raises(RuntimeError("broken\nin two"))
    assert main(["explain"]) == 1
    said = "unexpected RuntimeError: broken in two (run again with --debug to see where)"
    assert one_line(capsys) == said


@pytest.mark.parametrize("line", ["--debug explain", "explain --debug"])
def test_debug_shows_the_traceback(
    line: str, explain_raises: Callable[[BaseException], None], capsys: Captured
) -> None:
    explain_raises(CheckpointError("no folder"))
    assert main(line.split()) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.rstrip().endswith("CheckpointError: no folder")


def test_interruption_is_status_130(
    explain_raises: Callable[[BaseException], None], capsys: Captured
) -> None:
    explain_raises(KeyboardInterrupt())
    assert main(["explain"]) == 130
    assert one_line(capsys) == "interrupted"


def test_a_command_s_own_status_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("moetor.cli.verify"), "run", lambda _options: 1)
    assert main(["verify"]) == 1


@pytest.mark.parametrize("line", ["--help", "-h", "generate --help", "bench --help", "explain -h"])
def test_help_is_status_0_on_standard_output(line: str, capsys: Captured) -> None:
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: moetor")
    assert err == ""


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moetor {__version__}\n"


def test_a_command_whose_module_is_missing_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    missing = entry.Command(
        words=("bench", "layer"),
        module="moetor.cli.nowhere",
        options="X",
        summary="",
        examples=("",),
    )
    monkeypatch.setattr(entry, "COMMANDS", (*entry.COMMANDS[:3], missing))
    assert main(["--help"]) == 0
    assert main(["generate", "--help"]) == 0
    capsys.readouterr()
    assert main(["bench", "layer"]) == 1
    assert "No module named 'moetor.cli.nowhere'" in one_line(capsys)


def test_an_unsupported_transformers_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from moetor.errors import VersionError

    class Refusing(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise VersionError("transformers 4.0 is installed; Moetor needs >=5.17,<6")

    monkeypatch.setitem(sys.modules, "moetor.huggingface", Refusing("moetor.huggingface"))
    assert main(["explain"]) == 1
    assert one_line(capsys) == "transformers 4.0 is installed; Moetor needs >=5.17,<6"
