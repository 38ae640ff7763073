"""Building the native kernel: compilers that fail or are missing, unwritable caches, races."""

from __future__ import annotations

import os
import platform as host
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moetor.config import ExpertsConfig
from moetor.errors import KernelRefusedError
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.native import build as native_build
from moetor.kernels.native import library
from moetor.kernels.native.build import BuildError
from moetor.kernels.native.kernel import NativeKernel, native_experts

x86_linux = pytest.mark.skipif(
    sys.platform != "linux" or host.machine() != "x86_64", reason="x86-64 Linux"
)
pytestmark = x86_linux
CONFIG = ExpertsConfig(num_experts=2, hidden_size=8, intermediate_size=8)
QUERY = KernelQuery(device="cpu", dtype=torch.float32, experts=CONFIG, top_k=1)


@pytest.fixture
def fresh() -> Iterator[None]:
    """The remembered library is forgotten before and after."""
    library._load.cache_clear()
    yield
    library._load.cache_clear()


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# Answers --version, and makes every file that it is asked for with -o.
OBEDIENT = """[ "$1" = --version ] && { echo fake 1.0; exit 0; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done"""
FAILING = """[ "$1" = --version ] && { echo fake 1.0; exit 0; }
echo "x.cpp:1: error: no such instruction" >&2; echo "compilation terminated." >&2; exit 1"""


def environment(folder: Path, compiler: str) -> dict[str, str]:
    return {"CXX": compiler, "XDG_CACHE_HOME": str(folder / "cache"), "PATH": os.environ["PATH"]}


def test_failing_compiler_is_a_remembered_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    count = tmp_path / "count"
    compiler = fake_compiler(tmp_path, f'[ "$1" = --version ] || echo run >> {count}\n{FAILING}')
    for name, value in environment(tmp_path, compiler).items():
        monkeypatch.setenv(name, value)
    reason = NativeKernel().refusal(QUERY)
    assert reason == "could not be compiled: x.cpp:1: error: no such instruction"
    runs = count.read_text()
    assert NativeKernel().refusal(QUERY) == reason
    assert count.read_text() == runs, "a failed build was tried again"
    x, one, ids = torch.zeros(1, 8), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    weights = ExpertWeights(torch.zeros(2, 16, 8), torch.zeros(2, 8, 8))
    with pytest.raises(KernelRefusedError, match="no such instruction"):
        native_experts(x, one, ids, weights, CONFIG)


def test_library_that_cannot_be_loaded_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    for name, value in environment(tmp_path, fake_compiler(tmp_path, OBEDIENT)).items():
        monkeypatch.setenv(name, value)
    reason = NativeKernel().refusal(QUERY)
    assert reason is not None
    assert "cannot be loaded" in reason


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"CXX": "no-such-compiler"}, "$CXX='no-such-compiler' does not run"),
        ({"CXX": "false"}, "$CXX='false' does not run"),
        ({"CXX": "", "PATH": "/nonexistent"}, "none of c++, g++, clang++ was found"),
    ],
)
def test_no_compiler(tmp_path: Path, changes: dict[str, str], text: str) -> None:
    with pytest.raises(BuildError) as caught:
        native_build.build({**environment(tmp_path, "c++"), **changes})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("platform", "machine"), [("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")]
)
def test_other_platforms_are_refused_before_a_compiler_runs(
    monkeypatch: pytest.MonkeyPatch, platform: str, machine: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(host, "machine", lambda: machine)
    with pytest.raises(BuildError, match=f"not on {machine} {platform}"):
        native_build.build({})


@pytest.mark.parametrize(
    "code",
    [
        "import moetor; [getattr(moetor, name) for name in moetor.__all__]",
        "import moetor.kernels.dense, moetor.kernels.select, moetor.engine, moetor.huggingface",
        "from moetor.cli.main import main; main(['--help'])",
        "from moetor.cli.main import main; main(['generate', '--help'])",
    ],
)
def test_imports_and_help_build_nothing(tmp_path: Path, code: str) -> None:
    done = run_with_a_failing_compiler(tmp_path, code)
    assert "native" not in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "code",
    [
        "from moetor.kernels.dense import Norm, rms_norm; rms_norm(torch.ones(2, 8), "
        "Norm(torch.ones(8), 1e-6))",
        "from moetor.kernels.dense import linear; linear(torch.ones(1, 8), torch.ones(8, 8))",
    ],
)
def test_a_build_that_dense_functions_begin_is_seen(tmp_path: Path, code: str) -> None:
    """Without any logging set up, before it begins and where it fails; torch computes then."""
    lines = run_with_a_failing_compiler(tmp_path, f"import torch; {code}").stderr.splitlines()
    begun, failed = [line for line in lines if "the native CPU kernel" in line]
    assert "building" in begun
    assert begun.endswith("fake-c++; it takes up to a minute")
    assert failed.endswith("could not be compiled: x.cpp:1: error: no such instruction")


def run_with_a_failing_compiler(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment(folder, fake_compiler(folder, FAILING))},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


def test_builds_once_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    env = environment(tmp_path, fake_compiler(tmp_path, OBEDIENT))
    first = native_build.build(env)
    assert first.read_text() == "built\n"
    assert first.is_relative_to(tmp_path / "cache" / "moetor")
    assert [p.name for p in first.parent.iterdir()] == [first.name], "scratch files are left"
    assert "building the native CPU kernel" in caplog.text
    assert " s" in caplog.messages[-1]
    caplog.clear()
    assert native_build.build(env) == first
    assert not caplog.messages


def test_another_compiler_version_is_another_library(tmp_path: Path) -> None:
    one = native_build.build(environment(tmp_path, fake_compiler(tmp_path, OBEDIENT)))
    other = native_build.build(
        environment(tmp_path, fake_compiler(tmp_path, OBEDIENT.replace("1.0", "2.0")))
    )
    assert one.parent != other.parent


def test_unwritable_cache_falls_back_to_a_private_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    path = native_build.build(environment(tmp_path, fake_compiler(tmp_path, OBEDIENT)))
    assert path.is_file()
    assert not path.is_relative_to(tmp_path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "cannot write" in caplog.text


def test_many_processes_at_once(tmp_path: Path) -> None:
    env = {**os.environ, **environment(tmp_path, fake_compiler(tmp_path, f"sleep 0.1\n{OBEDIENT}"))}
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('b', {native_build.__file__!r})\n"
        "b = importlib.util.module_from_spec(spec); sys.modules['b'] = b\n"
        "spec.loader.exec_module(b)\n"
        "print(b.build().read_text())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.strip() == "built"
