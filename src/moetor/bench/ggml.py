"""llama.cpp's tensor library, ggml, as llama-cpp-python ships it: what a layer's graph needs of its
C API, by ctypes.

llama-cpp-python binds whole models alone; the shared libraries beside it export the rest.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from moetor.errors import UnsupportedError

Pointer = int
"""An address in ggml's memory."""

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "I32": 26, "BF16": 30, "MXFP4": 39}
"""`enum ggml_type`: numbers that GGUF files hold too."""
_CPU_DEVICE, _WEIGHTS, _SUCCESS, _WARNING = 0, 1, 0, 3
_NAMES = ("libggml.so", "libggml.dylib", "ggml.dll")


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_P, _I, _L, _Z = c_void_p, c_int, c_int64, c_size_t
_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # name: result, arguments
    "ggml_log_set": (None, _LogCallback, _P),
    "ggml_init": (_P, _InitParams),
    "ggml_free": (None, _P),
    "ggml_nbytes": (_Z, _P),
    "ggml_get_data": (_P, _P),
    "ggml_row_size": (_Z, _I, _L),
    "ggml_quantize_chunk": (_Z, _I, _P, _P, _L, _L, _L, _P),
    "ggml_new_tensor_3d": (_P, _P, _I, _L, _L, _L),
    "ggml_new_tensor_2d": (_P, _P, _I, _L, _L),
    "ggml_view_2d": (_P, _P, _P, _L, _L, _Z, _Z),
    "ggml_mul_mat_id": (_P, _P, _P, _P, _P),
    "ggml_swiglu_split": (_P, _P, _P, _P),
    "ggml_mul": (_P, _P, _P, _P),
    "ggml_add": (_P, _P, _P, _P),
    "ggml_set_input": (None, _P),
    "ggml_set_output": (None, _P),
    "ggml_new_graph": (_P, _P),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_gallocr_new": (_P, _P),
    "ggml_gallocr_alloc_graph": (c_bool, _P, _P),
    "ggml_gallocr_free": (None, _P),
    "ggml_backend_dev_by_type": (_P, _I),
    "ggml_backend_dev_init": (_P, _P, c_char_p),
    "ggml_backend_dev_backend_reg": (_P, _P),
    "ggml_backend_dev_buffer_type": (_P, _P),
    "ggml_backend_dev_supports_op": (c_bool, _P, _P),
    "ggml_backend_reg_get_proc_address": (_P, _P, c_char_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_buffer_set_usage": (None, _P, _I),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_tensor_set": (None, _P, _P, _Z, _Z),
    "ggml_backend_graph_compute": (_I, _P, _P),
}


def version() -> str | None:
    """llama-cpp-python's, or None where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    return importlib.metadata.version("llama_cpp_python")


class Ggml:
    """The library and its CPU device. Functions are called by their C names without `ggml_`.

    Args:
        threads: of a graph's computation.

    Raises:
        UnsupportedError: llama-cpp-python is not installed, or its ggml lacks a function.
    """

    def __init__(self, threads: int) -> None:
        self._library = _load()
        self._functions: dict[str, Any] = {}
        for name, (result, *arguments) in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise UnsupportedError(
                    f"llama.cpp: the ggml of llama-cpp-python {version()} has no {name}; install a "
                    f"later release"
                ) from None
            function.restype, function.argtypes = result, arguments
            self._functions[name.removeprefix("ggml_")] = function
        self.log_set(_log, None)
        self.device: Pointer | None = self.backend_dev_by_type(_CPU_DEVICE)
        if not self.device:
            raise UnsupportedError("llama.cpp: its ggml was built without a CPU backend")
        self._backend = self.backend_dev_init(self.device, None)
        set_threads = self._optional("ggml_backend_set_n_threads", None, _P, _I)
        if set_threads is None:
            raise UnsupportedError("llama.cpp: its CPU backend does not let threads be set")
        set_threads(self._backend, threads)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_functions"][name]
        except KeyError:
            raise AttributeError(name) from None

    def _optional(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function of the CPU backend that the library does not export, or None."""
        registry = self.backend_dev_backend_reg(self.device)
        address = self.backend_reg_get_proc_address(registry, name.encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None

    def context(self, tensors: int) -> Pointer:
        """A context that describes up to `tensors` tensors and one graph, and holds no data."""
        size = 2**20 + tensors * 2**10
        made: Pointer = self.init(_InitParams(size, None, True))
        return made

    def weight_buffer_types(self) -> Iterator[Pointer]:
        """Where weights may lie, as llama.cpp tries it: layouts of the CPU backend's own, into
        which it rearranges weights (`CPU_REPACK`, AMX), then plain memory."""
        extra = self._optional("ggml_backend_dev_get_extra_bufts", ctypes.POINTER(_P), _P)
        if extra is not None:
            number, found = 0, extra(self.device)
            while found and found[number]:
                yield found[number]
                number += 1
        yield self.backend_dev_buffer_type(self.device)

    def allocate_weights(self, context: Pointer, buffer_type: Pointer) -> Pointer:
        """A buffer that holds all tensors of a context.

        Raises:
            MemoryError: there is no memory for them.
        """
        buffer: Pointer | None = self.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise MemoryError("ggml has no memory for the weights")
        self.backend_buffer_set_usage(buffer, _WEIGHTS)
        return buffer

    def compute(self, graph: Pointer) -> None:
        """Runs a graph.

        Raises:
            RuntimeError: it failed.
        """
        status = self.backend_graph_compute(self._backend, graph)
        if status != _SUCCESS:
            raise RuntimeError(f"ggml_backend_graph_compute answered {status}")


def _tell(level: int, text: bytes, _: None) -> None:
    """Its warnings; it would tell of every tensor that it rearranges."""
    if level >= _WARNING and (line := text.decode(errors="replace").strip()):
        print(line, file=sys.stderr)


_log = _LogCallback(_tell)  # the library keeps its address


def _load() -> ctypes.CDLL:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise UnsupportedError("llama.cpp: llama-cpp-python is not installed")
    folder = Path(found.origin).parent / "lib"
    for name in _NAMES:
        if (folder / name).is_file():
            return ctypes.CDLL(str(folder / name))
    raise UnsupportedError(f"llama.cpp: {folder} has none of {', '.join(_NAMES)}")
