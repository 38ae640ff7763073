"""Compiles the native kernel once on the user's machine and keeps it in the user's cache folder.

`python -m moetor.kernels.native.build` builds ahead of the first use. The compiler is `$CXX`, or
the first of c++, g++ and clang++. Nothing of torch is compiled against, so a build takes some tens
of seconds on one core. The log says when it begins and how it ended: whatever computes on a CPU may
be the first use, not the experts alone.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from moetor.kernels.cache import cache_root

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
LIBRARY_NAME = "libmoetor_native.so"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-math-errno")
# One object per instruction set: only code that is entered after a look at the processor has its
# instructions.
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
_UNITS: dict[str, tuple[str, ...]] = {
    "api.cpp": (),
    "isa_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "isa_avx512.cpp": _AVX512,
    "isa_avx512_bf16.cpp": (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    "dense_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "dense_avx512.cpp": _AVX512,
    "dense_avx512_bf16.cpp": (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
}
_TIMEOUT_S = 600


class BuildError(Exception):
    """The native kernel cannot be had here; the text is half a sentence with the reason."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler and what it says its version is."""

    path: str
    version: str


def find_compiler(environment: dict[str, str] | None = None) -> Compiler:
    """`$CXX`, or the first compiler on the path that answers `--version`.

    Raises:
        BuildError: there is none, or `$CXX` names one that does not run.
    """
    env = dict(os.environ) if environment is None else environment
    named = env.get("CXX")
    for name in (named,) if named else _COMPILERS:
        path = shutil.which(name, path=env.get("PATH"))
        if path is None:
            continue
        try:
            answer = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return Compiler(path, answer.stdout)
    if named:
        raise BuildError(f"needs a C++ compiler, and $CXX={named!r} does not run")
    raise BuildError(f"needs a C++ compiler, and none of {', '.join(_COMPILERS)} was found")


def _fingerprint(compiler: Compiler) -> str:
    digest = hashlib.sha256()
    digest.update(repr((compiler, _FLAGS, _UNITS)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _writable_folder(folder: Path) -> Path:
    """`folder`, made if need be; a private temporary one, gone at exit, where it cannot be
    written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        private = Path(tempfile.mkdtemp(prefix="moetor-native-"))
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        logger.warning(
            "cannot write %s (%s); building in %s for this process", folder, error, private
        )
        return private


def _run_all(commands: list[list[str]]) -> None:
    """Runs the commands side by side; the first failure's last line becomes the error."""
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    failure: str | None = None
    for command, process in zip(commands, processes, strict=True):
        try:
            output, _ = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failure = failure or f"{command[0]} took more than {_TIMEOUT_S} s"
            continue
        if process.returncode != 0 and failure is None:
            lines = [line for line in output.splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower()]
            failure = (errors or lines or [f"exit status {process.returncode}"])[-1].strip()
    if failure is not None:
        raise BuildError(f"could not be compiled: {failure}")


def _compile(compiler: Compiler, library: Path) -> None:
    """Compiles into a folder beside `library` and moves the result into place in one step."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        objects = [Path(scratch) / f"{Path(unit).stem}.o" for unit in _UNITS]
        _run_all(
            [
                [compiler.path, *_FLAGS, *flags, "-c", str(SOURCES / unit), "-o", str(target)]
                for (unit, flags), target in zip(_UNITS.items(), objects, strict=True)
            ]
        )
        linked = Path(scratch) / LIBRARY_NAME
        # The OpenMP runtime stays undefined: it is the one that torch has loaded, so there is one
        # pool of threads.
        _run_all([[compiler.path, "-shared", "-o", str(linked), *map(str, objects)]])
        os.replace(linked, library)


def build(environment: dict[str, str] | None = None) -> Path:
    """Path of the shared library, compiled now unless the cache has it. Safe in several processes
    at once.

    Args:
        environment: in place of `os.environ` (CXX, PATH, XDG_CACHE_HOME).

    Raises:
        BuildError: wrong platform, no compiler, or the compiler's last error.
    """
    env = dict(os.environ) if environment is None else environment
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"runs on x86-64 Linux, not on {platform.machine()} {sys.platform}")
    compiler = find_compiler(env)
    folder = cache_root(env) / f"native-{_fingerprint(compiler)}"
    if (folder / LIBRARY_NAME).is_file():
        return folder / LIBRARY_NAME
    library = _writable_folder(folder) / LIBRARY_NAME
    logger.warning(
        "building the native CPU kernel once, with %s; it takes up to a minute", compiler.path
    )
    start = time.perf_counter()
    try:
        _compile(compiler, library)
    except (OSError, BuildError) as error:
        told = error if isinstance(error, BuildError) else f"could not be compiled: {error}"
        # Whoever only asks whether it can be had does not tell the reason.
        logger.warning("the native CPU kernel %s", told)
        raise BuildError(str(told)) from error
    logger.warning("built %s in %.1f s", library, time.perf_counter() - start)
    return library


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"kernel 'native' {error}")
