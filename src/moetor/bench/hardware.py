"""What a result was measured on and with, for the record and for sizing the measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import moetor

_SYS_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# Vector and matrix units that decide which path a kernel takes.
_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "bf16", "i8mm"),
    *("sve", "sve2"),
)


# Beside torch and Transformers, what may take part where it is installed.
_OPTIONAL = {"cuda": ("triton", "vllm"), "cpu": ("llama_cpp_python",)}


def describe_run(device: str, threads: int) -> dict[str, Any]:
    """The head of a result's JSON: command, date, commit, versions, hardware."""
    return {
        "command": shlex.join(("moetor", *sys.argv[1:])),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": describe_versions(device),
        "hardware": describe_hardware(device, threads),
    }


def describe_hardware(device: str, threads: int) -> dict[str, Any]:
    """Processor, memory and GPU, as plain values for JSON; sizes in bytes."""
    info = _cpu_info()
    found: dict[str, Any] = {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": [flag for flag in _FLAGS if flag in info.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": _meminfo().get("MemTotal"),
        "caches": cpu_caches(),
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def describe_versions(device: str) -> dict[str, str]:
    """Versions of what takes part in a measurement."""
    from transformers import __version__ as transformers_version

    optional = {}
    for name in _OPTIONAL.get(device, ()):
        try:
            optional[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return optional | {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers_version,
        "moetor": moetor.__version__,
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether it has changes; None where it
    runs from no checkout."""
    package = Path(moetor.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", "__init__.py")
    commit = git("rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(git("status", "--porcelain", "."))}


class OtherUse:
    """Watches how much of the processors everything but this process takes, from its making on."""

    def __init__(self) -> None:
        self._start = self._clocks()

    def share(self) -> float | None:
        """Fraction of all cores' time that went elsewhere, other virtual machines included; None
        where the system does not say, or over fewer than ten of its clock's ticks."""
        now = self._clocks()
        if self._start is None or now is None:
            return None
        wall, busy, own = (after - before for before, after in zip(self._start, now, strict=True))
        if wall < 10 / os.sysconf("SC_CLK_TCK"):
            return None
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _clocks() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all cores at work, and of this process and its children."""
        path = Path("/proc/stat")
        if not path.is_file():
            return None
        user, nice, system, _, _, irq, softirq, steal = (
            int(ticks) for ticks in path.read_text().split()[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])


def cpu_caches() -> dict[str, int]:
    """Bytes of each level of the first core's caches (`L1d`, `L2`, `L3`); empty where the system
    does not say."""
    caches = {}
    for entry in sorted(_SYS_CPU.glob("index*")):
        kind = (entry / "type").read_text().strip()
        if kind == "Instruction":
            continue
        level = (entry / "level").read_text().strip()
        size = (entry / "size").read_text().strip()
        name = f"L{level}d" if kind == "Data" else f"L{level}"
        caches[name] = int(size[:-1]) * _UNITS[size[-1]]
    return caches


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache between the compute units and memory; 0 where unknown."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return max(cpu_caches().values(), default=0)


def available_memory(device: str) -> int:
    """Bytes that can be taken without pushing anything out; respects the
    limit of a control group (version 2)."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    host = _meminfo().get("MemAvailable")
    if host is None:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(host, _container_memory() or host)


def process_memory(name: str) -> int | None:
    """A figure of this process's memory by Linux's record, such as VmRSS or VmHWM, in bytes; None
    elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _container_memory() -> int | None:
    """What a control group leaves, its reclaimable file cache counted as free; None: no limit."""
    folder = Path("/sys/fs/cgroup")
    files = [folder / name for name in ("memory.max", "memory.current", "memory.stat")]
    if not all(path.is_file() for path in files):
        return None
    limit, used, stat = (path.read_text() for path in files)
    if limit.strip() == "max":
        return None
    cached = dict(line.split() for line in stat.splitlines()).get("inactive_file", "0")
    return int(limit) - int(used) + int(cached)


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    pairs = (line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines())
    info = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    if "Features" in info:  # what Arm calls them
        info["flags"] = info["Features"]
    return info


def _meminfo() -> dict[str, int]:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return {}
    pairs = (line.split(":", 1) for line in path.read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}
