"""The way of tokens to the host and back, beside whatever the GPU computes meanwhile.

The native kernel is a step of a CUDA stream there: the host waits for nothing, and a CUDA graph
can hold it. Shape letters: T tokens, R rows of a buffer, K top_k, H hidden.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import UnsupportedError
from moetor.kernels.base import Weights
from moetor.kernels.native.kernel import Prepared, native_experts, prepare

# Tokens that travel at once.
_ROWS = 2048


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Page-locked memory for [R, ...] rows."""

    hidden_RH: Tensor
    weights_RK: Tensor
    ids_RK: Tensor
    out_RH: Tensor

    @classmethod
    def new(cls, hidden_size: int, top_k: int, dtype: torch.dtype) -> _Buffers:
        def rows(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((_ROWS, width), dtype=dtype, pin_memory=True)

        return cls(
            rows(hidden_size, dtype),
            rows(top_k, torch.float32),
            rows(top_k, torch.int32),
            rows(hidden_size, dtype),
        )


Join = Callable[[], Tensor]
"""Makes the current stream wait for the host's result [T, H], and gives it."""


class HostLane:
    """Layers that share a lane take turns; their buffers are the same.

    Args:
        device: the accelerator; on a CPU everything happens at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[tuple[int, int, torch.dtype], _Buffers] = {}
        # Captured graphs hold their addresses: neither is ever let go.
        self._calls: dict[tuple[int, int, int, torch.dtype], Prepared] = {}
        self._workspaces: list[Tensor] = []

    def start(
        self,
        layer: int,
        weights: Weights,
        config: ExpertsConfig,
        hidden_TH: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
    ) -> Join:
        """Begins the native kernel's sum for tokens on the accelerator.

        Args:
            layer: a number of its own for each layer, whose `weights` never change their place.
        """
        if self._stream is None:
            made = native_experts(hidden_TH, weights_TK, ids_TK, weights, config)
            return lambda: made
        stream = self._stream
        main = torch.cuda.current_stream(self.device)
        out_TH = torch.empty_like(hidden_TH)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for start in range(0, hidden_TH.shape[0], _ROWS):
                rows = slice(start, min(start + _ROWS, hidden_TH.shape[0]))
                buffers, call = self._call(layer, weights, config, hidden_TH[rows], ids_TK.shape[1])
                count = rows.stop - rows.start
                buffers.hidden_RH[:count].copy_(hidden_TH[rows], non_blocking=True)
                buffers.weights_RK[:count].copy_(weights_TK[rows], non_blocking=True)
                buffers.ids_RK[:count].copy_(ids_TK[rows], non_blocking=True)
                _launch_on_host(call, stream.cuda_stream)
                out_TH[rows].copy_(buffers.out_RH[:count], non_blocking=True)

        def join() -> Tensor:
            torch.cuda.current_stream(self.device).wait_stream(stream)
            return out_TH

        return join

    def _call(
        self, layer: int, weights: Weights, config: ExpertsConfig, hidden_TH: Tensor, top_k: int
    ) -> tuple[_Buffers, Prepared]:
        rows, width = hidden_TH.shape
        size = (width, top_k, hidden_TH.dtype)
        if size not in self._buffers:
            self._buffers[size] = _Buffers.new(*size)
        buffers = self._buffers[size]
        key = (layer, rows, top_k, hidden_TH.dtype)
        if key not in self._calls:
            call = prepare(
                buffers.hidden_RH[:rows],
                buffers.weights_RK[:rows],
                buffers.ids_RK[:rows],
                weights,
                config,
                buffers.out_RH[:rows],
            )
            call.use_workspace(self._workspace(call.workspace_bytes))
            self._calls[key] = call
        return buffers, self._calls[key]

    def _workspace(self, size: int) -> Tensor:
        """Scratch memory, the same for all: the stream runs one call after the other."""
        if not self._workspaces or self._workspaces[-1].numel() < size:
            rounded = 1 << max(20, (size - 1).bit_length())
            self._workspaces.append(torch.empty(rounded, dtype=torch.uint8))
        return self._workspaces[-1]


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(
            f"experts in host memory need NVIDIA's driver library, libcuda.so.1: {error}"
        ) from error


def _launch_on_host(call: Prepared, stream: int) -> None:
    """Puts the call into the stream: a thread of the driver runs it, without Python."""
    status = _driver().cuLaunchHostFunc(
        ctypes.c_void_p(stream),
        ctypes.c_void_p(call.native.run_address),
        ctypes.c_void_p(ctypes.addressof(call.arguments)),
    )
    if status != 0:
        raise RuntimeError(f"cuLaunchHostFunc answered {status}")
