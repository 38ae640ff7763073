"""The shared library by way of ctypes: its argument structure, and which instruction sets it may
use here.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch

from moetor.kernels.native.build import BuildError, build

IsaName = Literal["avx2", "avx512", "avx512_bf16"]
_ISA_CODES: dict[str, int] = {"avx2": 1, "avx512": 2, "avx512_bf16": 3}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
LIMIT_CODES = {"before": 1, "after": 2}
BAD_EXPERT_ID = 1

# Scratch memory up to this size is kept for a thread's next call: fresh pages would cost more than
# small products.
_KEPT_BYTES = 64 * 2**20
_kept = threading.local()


class Arguments(ctypes.Structure):
    """`MoetorExperts` of csrc/api.h, field by field."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("hidden", "topk_weights", "topk_ids", "gate_up", "down"),
                *("gate_up_bias", "down_bias", "gate_up_scales", "down_scales"),
                *("gate_up_zeros", "down_zeros", "out", "workspace"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("workspace_bytes", "tokens", "top_k", "num_experts"),
                *("hidden_size", "intermediate_size", "gate_up_expert_stride", "gate_up_stride"),
                *("down_expert_stride", "down_stride", "gate_up_bias_stride", "down_bias_stride"),
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("dtype", "isa", "threads", "gated", "interleaved", "gate_up_columns"),
                *("down_columns", "weight_on_input", "activation", "limit_place"),
                *("weights", "gate_up_scale_type", "down_scale_type", "group", "round_inputs"),
            )
        ),
        *(
            (name, ctypes.c_float)
            for name in ("alpha", "limit", "up_shift", "softcap", "up_softcap")
        ),
    ]


class Library:
    """A loaded shared library."""

    def __init__(self, path: Path) -> None:
        """Loads `path`; raises `OSError` when it or a symbol of torch's OpenMP runtime is
        missing."""
        self._handle = ctypes.CDLL(str(path))
        self._supports = self._handle.moetor_supports
        self._workspace_bytes = self._handle.moetor_workspace_bytes
        self._workspace_bytes.restype = ctypes.c_int64
        self._run = self._handle.moetor_experts
        self._calls = {
            name: getattr(self._handle, f"moetor_{name}")
            for name in ("linear", "norm", "rotate", "attention")
        }
        self.isas: tuple[str, ...] = tuple(
            name for name in get_args(IsaName) if self._supports(_ISA_CODES[name])
        )

    def isa_code(self, isa: str | None) -> int:
        """Number of `isa`, or of the best one for None. `isa` must be one of `isas`."""
        return _ISA_CODES[self.isas[-1] if isa is None else isa]

    def workspace_bytes(self, arguments: Arguments) -> int:
        """Bytes of scratch memory that a call needs."""
        return int(self._workspace_bytes(ctypes.byref(arguments)))

    @property
    def run_address(self) -> int:
        """Where `moetor_experts` is, for callers that are not Python."""
        return ctypes.cast(self._run, ctypes.c_void_p).value or 0

    def run(self, arguments: Arguments) -> int:
        """Runs the call without Python's lock; 0, or the number of what is wrong."""
        return int(self._run(ctypes.byref(arguments)))

    def call(self, name: str, arguments: ctypes.Structure) -> int:
        """Runs one of csrc/dense.h without Python's lock; its status."""
        return int(self._calls[name](ctypes.byref(arguments)))


def workspace(size: int) -> torch.Tensor:
    """At least `size` bytes of scratch memory, this thread's until its next call."""
    kept: torch.Tensor | None = getattr(_kept, "buffer", None)
    if kept is not None and kept.numel() >= size:
        return kept
    buffer = torch.empty(size, dtype=torch.uint8)
    if size <= _KEPT_BYTES:
        _kept.buffer = buffer
    return buffer


@cache
def _load() -> Library | str:
    try:
        library = Library(build())
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"was compiled and cannot be loaded: {error}"
    if not library.isas:
        return "needs a processor with AVX2, FMA and F16C"
    return library


def load() -> Library:
    """The library, built and loaded at the first call; success and failure are both remembered.

    Raises:
        BuildError: with the reason, as half a sentence.
    """
    library = _load()
    if isinstance(library, str):
        raise BuildError(library)
    return library
