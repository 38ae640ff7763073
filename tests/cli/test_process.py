"""What only a real process shows: imports, pipes, signals, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MOETOR = (sys.executable, "-m", "moetor")


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [*MOETOR, *arguments] if code is None else [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "arguments",
    ["--help", "generate --help", "explain --help", "verify -h", "bench -h", "bench layer -h"],
)
def test_help_imports_neither_torch_nor_transformers(arguments: str) -> None:
    done = run(
        code="import sys; from moetor.cli.main import main; "
        f"status = main({arguments.split()!r}); "
        "heavy = {'torch', 'transformers', 'numpy', 'moetor.huggingface'} & set(sys.modules); "
        "sys.exit(status or (', '.join(heavy) if heavy else 0))"
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_importing_moetor_imports_neither_torch_nor_transformers() -> None:
    done = run(
        code="import sys, moetor; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert done.returncode == 0


def test_bad_usage() -> None:
    done = run("generate", "--prompt", "x", "--max-tokens", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "moetor: error: --max-tokens 0 must be at least 1\n"


def test_a_reader_that_has_gone_is_not_an_error_message() -> None:
    code = (
        "import sys; from moetor.cli import main, explain; "
        "explain.run = lambda options: print('line\\n' * 10000) or 0; "
        "sys.exit(main.main(['explain']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


def test_ctrl_c_is_one_line_and_status_130() -> None:
    done = run(
        # A shell's background jobs ignore the signal, and so do the processes that they start.
        code="import signal, sys; from moetor.cli import main, explain; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "explain.run = lambda options: signal.raise_signal(signal.SIGINT); "
        "sys.exit(main.main(['explain']))"
    )
    assert done.returncode == 130
    assert done.stderr == "moetor: error: interrupted\n"


def test_output_that_is_not_a_terminal_has_no_escape_codes() -> None:
    assert "\x1b" not in run("--help").stdout
