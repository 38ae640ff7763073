"""What this machine can do at best, measured: bytes read per second, and arithmetic per second."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moetor.bench.hardware import available_memory, last_level_cache
from moetor.errors import UnsupportedError
from moetor.kernels.native.build import BuildError, find_compiler

_SOURCE = Path(__file__).with_name("read_bandwidth.cpp")
_MIB = 2**20
# (bytes fetched ahead, streams per thread): which is best differs between processors.
_READ_PATTERNS = ((0, 1), (0, 4), (1024, 4), (2048, 2), (4096, 1))
_ROUNDS = 4
_CPU_GEMM_SIZE, _CUDA_GEMM_SIZE = 2048, 8192
_GEMM_SECONDS = 0.5
_CUDA_READ_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Measured rates.

    Attributes:
        read_bytes_per_s: the fastest read of a range much larger than the last-level cache.
        read_method: how it was read.
        gemm_flops_per_s: rate of torch's own square product, by dtype.
        gemm_size: rows and columns of that product.
    """

    read_bytes_per_s: float
    read_method: str
    gemm_flops_per_s: dict[str, float]
    gemm_size: int

    @property
    def flops_per_s(self) -> float:
        """The best of the GEMM rates."""
        return max(self.gemm_flops_per_s.values())

    @property
    def flops_dtype(self) -> str:
        """Whose rate that is."""
        return max(self.gemm_flops_per_s, key=lambda name: self.gemm_flops_per_s[name])

    def best_with(self, other: Ceilings) -> Ceilings:
        """The higher of each rate of two measurements of one machine."""
        read = max(self, other, key=lambda ceilings: ceilings.read_bytes_per_s)
        gemm = {
            name: max(rate, other.gemm_flops_per_s[name])
            for name, rate in self.gemm_flops_per_s.items()
        }
        return Ceilings(
            read_bytes_per_s=read.read_bytes_per_s,
            read_method=read.read_method,
            gemm_flops_per_s=gemm,
            gemm_size=self.gemm_size,
        )

    def describe(self) -> str:
        """One line for a person."""
        rates = ", ".join(
            f"{name} {rate / 1e12:.3g}" for name, rate in self.gemm_flops_per_s.items()
        )
        chosen = f" (used: {self.flops_dtype})" if len(self.gemm_flops_per_s) > 1 else ""
        return (
            f"read {self.read_bytes_per_s / 1e9:.4g} GB/s ({self.read_method}); "
            f"product of {self.gemm_size}^3 in TFLOP/s: {rates}{chosen}"
        )


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measures in a few seconds, with the threads that torch has now.

    The arithmetic ceiling of a CPU is the better of `dtype` and float32: a processor without units
    for a 16-bit type multiplies it no faster than float32, and a kernel may widen its operands.

    Raises:
        UnsupportedError: too little memory to read from.
    """
    if device == "cuda":
        read, method = _cuda_read()
    else:
        read, method = _cpu_read()
    size = _CUDA_GEMM_SIZE if device == "cuda" else _CPU_GEMM_SIZE
    kinds = (dtype,) if device == "cuda" else dict.fromkeys((dtype, torch.float32))
    rates = {str(kind).removeprefix("torch."): _gemm(device, kind, size) for kind in kinds}
    return Ceilings(
        read_bytes_per_s=read, read_method=method, gemm_flops_per_s=rates, gemm_size=size
    )


def _cpu_read() -> tuple[float, str]:
    cache = last_level_cache("cpu")
    size = max(1024 * _MIB, 4 * cache) // _MIB * _MIB
    if 2 * size > available_memory("cpu"):
        raise UnsupportedError(
            f"measuring the read bandwidth takes {size / 1e9:.1f} GB, and "
            f"{available_memory('cpu') / 1e9:.1f} GB of memory are available; free some first"
        )
    # Filled, since pages that were never written are one page of zeros.
    data = torch.ones(size // 4)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="moetor-bench-") as folder:
        try:
            read = _load_reader(Path(folder))
        except BuildError as error:
            seconds = min(_timed(data.sum) for _ in range(2 * _ROUNDS))
            return size / seconds, f"torch.sum, {threads} threads; no software prefetch: {error}"
        best = (math.inf, _READ_PATTERNS[0])
        for _ in range(_ROUNDS):
            for ahead, streams in _READ_PATTERNS:
                seconds = _timed(_reading(read, data, ahead, streams, threads))
                best = min(best, (seconds, (ahead, streams)))
    seconds, (ahead, streams) = best
    fetch = f"prefetch {ahead} bytes ahead" if ahead else "no software prefetch"
    return size / seconds, f"{threads} threads, {streams} streams each, {fetch}"


def _load_reader(folder: Path) -> Callable[..., int]:
    """`moetor_read`, compiled into `folder`; called without Python's lock."""
    library = folder / "read_bandwidth.so"
    command = [find_compiler().path, "-O3", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        line = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise BuildError(f"{_SOURCE.name} could not be compiled: {line}")
    read = ctypes.CDLL(str(library)).moetor_read
    read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    read.restype = ctypes.c_uint64
    function: Callable[..., int] = read
    return function


def _reading(
    read: Callable[..., int], data: torch.Tensor, ahead: int, streams: int, threads: int
) -> Callable[[], None]:
    part = data.nbytes // threads

    def run() -> None:
        workers = [
            threading.Thread(target=read, args=(data.data_ptr() + n * part, part, ahead, streams))
            for n in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return run


def _gemm(device: str, dtype: torch.dtype, size: int) -> float:
    """Best rate of x @ w.T, both `size` squared, in flop/s."""
    x = torch.randn(size, size, device=device).to(dtype)
    weight = torch.randn(size, size, device=device).to(dtype)

    def product() -> torch.Tensor:
        return x @ weight.T

    measure = _cuda_timed if device == "cuda" else _timed
    best = measure(product)
    until = time.perf_counter() + _GEMM_SECONDS
    while time.perf_counter() < until:
        best = min(best, measure(product))
    return 2 * size**3 / best


def _cuda_read() -> tuple[float, str]:
    size = min(_CUDA_READ_BYTES, available_memory("cuda") // 2) // (64 * _MIB) * (64 * _MIB)
    data = torch.ones(size // 2, device="cuda", dtype=torch.bfloat16)
    ways: dict[str, Callable[[], object]] = {
        "torch sum as float32": data.view(torch.float32).sum,
        "torch sum as int64": data.view(torch.int64).sum,
    }
    if importlib.util.find_spec("triton") is not None:
        from moetor.bench.gpu_read import PATTERNS, read_all

        for block, steps in PATTERNS:
            ways[f"Triton, {steps} x {block}"] = partial(read_all, data, block, steps)
    best = dict.fromkeys(ways, math.inf)
    for _ in range(3 * _ROUNDS):
        for way, run in ways.items():
            best[way] = min(best[way], _cuda_timed(run))
    fastest = min(best, key=lambda way: best[way])
    return size / best[fastest], f"{size / 2**30:.1f} GiB, {fastest}"


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_timed(run: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
