"""A layer's routed experts as llama.cpp computes them: its graph of them, in its own formats.

The graph is that of `llm_graph_context::build_moe_ffn` (llama.cpp, src/llama-graph.cpp) from the
routing on: gate and up products (`ggml_mul_mat_id`), SwiGLU, down product, weights, sum over K.
Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, N rows, D depth of a product.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from moetor.bench.floor import Work
from moetor.bench.ggml import TYPES, Ggml, Pointer
from moetor.bench.request import LayerBenchRequest
from moetor.bench.shapes import LayerShape
from moetor.config import Activation
from moetor.errors import UnsupportedError
from moetor.kernels.base import ExpertWeights
from moetor.kernels.reference import ReferenceKernel
from moetor.quant_config import find_quantization

LLAMA_CPP = "llama.cpp"
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BLOCK = 32
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "MXFP4": 4.25}


def ggml_type(quantization: str, dtype: torch.dtype) -> str:
    """llama.cpp's type of as many bits: what a row of ours is compared with.

    Args:
        quantization: as `--quantization` takes it; empty for unquantised weights.
    """
    if not quantization:
        return _PLAIN[dtype]
    name = find_quantization(quantization).format
    if name == "mxfp4":
        return "MXFP4"
    return "Q4_0" if name in ("int4", "nvfp4") else "Q8_0"


def label_of(row: str, dtype: torch.dtype) -> str:
    """The peer's name beside a row of ours, which is called by its kernel and quantisation."""
    return f"{LLAMA_CPP} {ggml_type(row.partition(' ')[2], dtype)}"


def check_llama_cpp(device: str) -> None:
    """Refuses early what was asked for by name and cannot be measured.

    Raises:
        UnsupportedError: llama-cpp-python or gguf is not installed, or not on a CPU.
    """
    if device != "cpu":
        raise UnsupportedError(
            f"--peers llama.cpp is measured on the CPU, not on {device}; leave it out"
        )
    missing = [
        name
        for name, module in (("llama-cpp-python", "llama_cpp"), ("gguf", "gguf"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise UnsupportedError(
            f"--peers llama.cpp needs {' and '.join(missing)}, which is not installed; "
            f"pip install {' '.join(missing)}, or leave it out"
        )


def llama_cpp_refusal(shape: LayerShape) -> str | None:
    """Why a shape is not measured, or None."""
    experts = shape.experts
    form = (experts.gated, experts.interleaved, experts.transposed, experts.has_bias)
    if form != (True, False, False, False) or experts.activation != Activation():
        return "only plain gated experts (SwiGLU without biases) are put together here"
    if experts.hidden_size % _BLOCK or experts.intermediate_size % _BLOCK:
        return f"its blocks of {_BLOCK} weights do not divide H and I"
    return None


class LlamaCppSets:
    """Weight sets in llama.cpp's types, each converted once.

    Args:
        weights: the sets that our kernels read.
        quantizations: those of the rows to be compared with; unquantised weights always are.

    Raises:
        UnsupportedError: llama-cpp-python's ggml cannot run the layer.
    """

    def __init__(
        self, shape: LayerShape, weights: Sequence[ExpertWeights], quantizations: Sequence[str]
    ) -> None:
        self.shape, self._weights = shape, weights
        dtype = weights[0].down.dtype
        self._itemsize = dtype.itemsize
        self._ggml = Ggml(torch.get_num_threads())
        self._sets = {
            f"{LLAMA_CPP} {name}": [_Layer(self._ggml, shape, one, name) for one in weights]
            for name in _types(quantizations, dtype)
        }

    @property
    def labels(self) -> tuple[str, ...]:
        """As the peers are called, one for each type."""
        return tuple(self._sets)

    def rounds_inputs(self, label: str) -> bool:
        """Whether the inputs of its products become codes too: Q8_0 blocks, beside any code."""
        return self._sets[label][0].type_name not in _PLAIN.values()

    def run(
        self, label: str, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, weight_set: int
    ) -> Tensor:
        """The layer's output, float32 [T, H]; the next call of the same set overwrites it."""
        return self._sets[label][weight_set](hidden_TH, weights_TK, ids_TK)

    def reference(
        self, label: str, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, weight_set: int
    ) -> Tensor:
        """The same in float32 arithmetic, on the same codes as the gguf library reads them."""
        layer = self._sets[label][weight_set]
        used = ids_TK.unique()
        plain = self._weights[weight_set]
        config = replace(self.shape.experts, num_experts=len(used))
        weights = ExpertWeights(
            gate_up=torch.stack([layer.read_back(plain.gate_up[one]) for one in used.tolist()]),
            down=torch.stack([layer.read_back(plain.down[one]) for one in used.tolist()]),
        )
        ids = torch.searchsorted(used, ids_TK).int()
        return ReferenceKernel()(hidden_TH.float(), weights_TK, ids, weights, config)

    def work(self, label: str, plain: Work) -> Work:
        """The work of a call whose twin in our dtype has `plain`."""
        bits = _BITS[self._sets[label][0].type_name]
        return replace(plain, read_bytes=plain.read_bytes * bits / (8 * self._itemsize))


def bytes_of_types(request: LayerBenchRequest) -> list[float]:
    """Bytes of a weight in each type that is measured."""
    return [_BITS[name] / 8 for name in _types(request.quantizations, request.dtype)]


def _types(quantizations: Sequence[str], dtype: torch.dtype) -> list[str]:
    return list(dict.fromkeys(ggml_type(name, dtype) for name in ("", *quantizations)))


class _Layer:
    """One set of weights in ggml's memory, and the graph for one T.

    Gate, up and down matrices are tensors of their own, as GGUF files have them.
    """

    def __init__(
        self, ggml: Ggml, shape: LayerShape, weights: ExpertWeights, type_name: str
    ) -> None:
        self._ggml, self._shape, self.type_name = ggml, shape, type_name
        self._type = TYPES[type_name]
        experts = shape.experts
        wide, long, count = experts.hidden_size, experts.intermediate_size, experts.num_experts
        self._sizes = ((wide, long, count), (wide, long, count), (long, wide, count))
        self._context, self._buffer, self._matrices = self._place()
        parts = (weights.gate_up[:, :long], weights.gate_up[:, long:], weights.down)
        for tensor, part_END in zip(self._matrices, parts, strict=True):
            codes = self._codes(part_END)
            # As a whole: what a layout of its own rearranges, it takes in one piece.
            ggml.backend_tensor_set(tensor, ctypes.addressof(codes), 0, len(codes))
        self._graph: _Graph | None = None

    def __del__(self) -> None:
        self._graph = None
        self._ggml.backend_buffer_free(self._buffer)
        self._ggml.free(self._context)

    def __call__(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        tokens = hidden_TH.shape[0]
        if self._graph is None or self._graph.tokens != tokens:
            self._graph = _Graph(self._ggml, self._shape, self._matrices, tokens)
        return self._graph(hidden_TH, weights_TK, ids_TK)

    def _place(self) -> tuple[Pointer, Pointer, list[Pointer]]:
        """Room for the matrices in the first kind of memory whose layout has the product."""
        ggml = self._ggml
        for buffer_type in ggml.weight_buffer_types():
            context = ggml.context(16)
            tensors = [ggml.new_tensor_3d(context, self._type, *size) for size in self._sizes]
            buffer = ggml.allocate_weights(context, buffer_type)
            width, _, _ = self._sizes[0]
            hidden = ggml.new_tensor_3d(context, TYPES["F32"], width, 1, 1)
            ids = ggml.new_tensor_2d(context, TYPES["I32"], self._shape.top_k, 1)
            product = ggml.mul_mat_id(context, tensors[0], hidden, ids)
            if ggml.backend_dev_supports_op(ggml.device, product):
                return context, buffer, tensors
            ggml.backend_buffer_free(buffer)
            ggml.free(context)
        raise UnsupportedError(f"llama.cpp: no product of experts in {self.type_name}")

    def _codes(self, matrices_END: Tensor) -> ctypes.Array[ctypes.c_char]:
        """The matrices in llama.cpp's type, by its own quantiser."""
        count, rows, depth = matrices_END.shape
        size = rows * self._ggml.row_size(self._type, depth)
        codes = ctypes.create_string_buffer(count * size)
        start = ctypes.addressof(codes)

        def convert(expert: int) -> None:
            numbers_ND = matrices_END[expert].float().contiguous()
            target = start + expert * size
            self._ggml.quantize_chunk(
                self._type, numbers_ND.data_ptr(), target, 0, rows, depth, None
            )

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(convert, range(count)))
        return codes

    def read_back(self, matrix_ND: Tensor) -> Tensor:
        """A matrix's values after its rounding, float32."""
        import numpy
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        codes = numpy.frombuffer(memoryview(self._codes(matrix_ND[None])), dtype=numpy.uint8)
        kind = GGMLQuantizationType(self._type)
        if self.type_name in ("F16", "F32"):
            codes = codes.view(numpy.float16 if self.type_name == "F16" else numpy.float32)
        rows = codes.reshape(matrix_ND.shape[0], -1)
        return torch.from_numpy(dequantize(rows, kind).astype(numpy.float32))


class _Graph:
    """The layer for T tokens: inputs, graph, output. Activations are float32, as in llama.cpp."""

    def __init__(
        self, ggml: Ggml, shape: LayerShape, matrices: Sequence[Pointer], tokens: int
    ) -> None:
        self.tokens, self._ggml = tokens, ggml
        wide, top_k, number = shape.experts.hidden_size, shape.top_k, TYPES["F32"]
        gate, up, down = matrices
        self._context = context = ggml.context(64 + 4 * top_k)
        hidden = ggml.new_tensor_3d(context, number, wide, 1, tokens)
        weights = ggml.new_tensor_3d(context, number, 1, top_k, tokens)
        ids = ggml.new_tensor_2d(context, TYPES["I32"], top_k, tokens)
        for tensor in (hidden, weights, ids):
            ggml.set_input(tensor)
        up_out = ggml.mul_mat_id(context, up, hidden, ids)
        gate_out = ggml.mul_mat_id(context, gate, hidden, ids)
        activated = ggml.swiglu_split(context, gate_out, up_out)
        products = ggml.mul(context, ggml.mul_mat_id(context, down, activated, ids), weights)
        graph = ggml.new_graph(context)
        parts = [
            ggml.view_2d(context, products, wide, tokens, 4 * wide * top_k, 4 * wide * slot)
            for slot in range(top_k)
        ]
        out = parts[0]
        for part in parts:
            ggml.build_forward_expand(graph, part)
        for part in parts[1:]:
            out = ggml.add(context, out, part)
        ggml.set_output(out)
        ggml.build_forward_expand(graph, out)
        self._graph = graph
        self._memory = ggml.gallocr_new(ggml.backend_dev_buffer_type(ggml.device))
        if not ggml.gallocr_alloc_graph(self._memory, graph):
            raise MemoryError("ggml has no memory for the layer's activations")
        self._hidden_TH = _view(ggml, hidden, (tokens, wide), torch.float32)
        self._weights_TK = _view(ggml, weights, (tokens, top_k), torch.float32)
        self._ids_TK = _view(ggml, ids, (tokens, top_k), torch.int32)
        self._out_TH = _view(ggml, out, (tokens, wide), torch.float32)

    def __del__(self) -> None:
        self._ggml.gallocr_free(self._memory)
        self._ggml.free(self._context)

    def __call__(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        self._hidden_TH.copy_(hidden_TH)
        self._weights_TK.copy_(weights_TK)
        self._ids_TK.copy_(ids_TK)
        self._ggml.compute(self._graph)
        return self._out_TH


def _view(ggml: Ggml, tensor: Pointer, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A ggml tensor's memory as a torch tensor."""
    start = ggml.get_data(tensor)
    memory = (ctypes.c_char * ggml.nbytes(tensor)).from_address(start)
    return torch.frombuffer(memory, dtype=dtype).view(size)
