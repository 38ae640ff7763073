"""The layer with quantised weights, beside the one that it was quantised from.

Shape letters: T tokens, K top_k, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moetor.bench.floor import Work
from moetor.bench.shapes import LayerShape
from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery
from moetor.kernels.formats import QuantizedExpertWeights, canonical
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.select import select_kernel
from moetor.quant_config import find_quantization
from moetor.quantization.sink import quantize_experts, quantized_bytes


def quantized_kernel(
    shape: LayerShape, name: str, *, device: str, dtype: torch.dtype, kernel: str
) -> ExpertsKernel:
    """The kernel that runs a shape in a quantisation.

    Raises:
        ConfigError: no quantisation has this name.
        KernelRefusedError: the kernel that was named, or every one, does not read its format.
    """
    quant = find_quantization(name)
    query = KernelQuery(
        device=device,
        dtype=dtype,
        experts=canonical(shape.experts),
        top_k=shape.top_k,
        weight_format=quant.weight_format,
        activation_format=quant.activation_format,
    )
    return select_kernel(query, kernel).kernel


def share_of_bytes(shape: LayerShape, name: str, itemsize: int) -> float:
    """Bytes of a layer's quantised weights over those of the unquantised ones."""
    return quantized_bytes(shape.experts, find_quantization(name)) / (shape.parameters * itemsize)


class QuantizedSets:
    """Weight sets quantised, each once.

    Args:
        weights: the sets that are measured unquantised.
        names: quantisations, as `--quantization` takes them.

    Raises:
        KernelRefusedError: no kernel reads a format.
    """

    def __init__(
        self,
        shape: LayerShape,
        weights: Sequence[ExpertWeights],
        names: Sequence[str],
        *,
        device: str,
        kernel: str,
    ) -> None:
        self.shape = shape
        self.config: ExpertsConfig = canonical(shape.experts)
        self._shares: dict[str, float] = {}  # of the unquantised bytes
        self._kernels: dict[str, ExpertsKernel] = {}
        self._sets: dict[str, list[QuantizedExpertWeights]] = {}
        for name in names:
            dtype = weights[0].down.dtype
            chosen = quantized_kernel(shape, name, device=device, dtype=dtype, kernel=kernel)
            label = f"{chosen.name} {name}"
            quant = find_quantization(name)
            self._kernels[label] = chosen
            self._sets[label] = [quantize_experts(one, shape.experts, quant) for one in weights]
            self._shares[label] = share_of_bytes(shape, name, dtype.itemsize)

    @property
    def labels(self) -> tuple[str, ...]:
        """Kernel and quantisation, as rows of a table are called."""
        return tuple(self._sets)

    def rounds_inputs(self, label: str) -> bool:
        """Whether the inputs of its products become codes too."""
        return self._sets[label][0].activation_format != "unquantized"

    def run(
        self, label: str, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, weight_set: int
    ) -> Tensor:
        """The layer's output [T, H]."""
        weights = self._sets[label][weight_set]
        return self._kernels[label](hidden_TH, weights_TK, ids_TK, weights, self.config)

    def reference(
        self, label: str, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, weight_set: int
    ) -> Tensor:
        """The same in float32 arithmetic, on the same codes."""
        weights = self._sets[label][weight_set]
        return ReferenceKernel()(hidden_TH.float(), weights_TK, ids_TK, weights, self.config)

    def work(self, label: str, plain: Work) -> Work:
        """The work of a call whose unquantised twin has `plain`: the same arithmetic, fewer
        bytes."""
        return replace(plain, read_bytes=plain.read_bytes * self._shares[label])
