"""Quantised matrices as the kernels take them.

Shape letters: E experts, N outputs of a product, D its depth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetor.kernels.formats import ActivationFormat, QuantizedMatrix, WeightFormat
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import tma_allowed
from moetor.kernels.triton.choose_quantized import QuantizedTile
from moetor.kernels.triton.quantized_support import arithmetic

Form = tuple[str, str, str, int, int, bool, str]
"""A product's formats as the kernels read them; `quantized_product_kernels.py` explains it."""

_BYTES = (torch.float8_e4m3fn, torch.int8)
_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def form_of(kind: WeightFormat, activations: ActivationFormat, dtype: torch.dtype) -> Form:
    """FORM of a product with input values of `dtype`."""
    found = arithmetic(kind, activations)
    assert found is not None, "refused before"
    rows, depth = kind.group
    numbers = _NUMBERS.get(dtype, "bf16")
    return found, kind.element, kind.scale, rows, depth, kind.zero_points, numbers


def _bits(tensor: Tensor) -> Tensor:
    """What the kernels read of codes that become numbers: float8 as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype in _BYTES else tensor


class Operands(NamedTuple):
    """A matrix as the kernels take it: values (or their descriptor), scales, zero points, row
    scales."""

    tensors: tuple[Any, Tensor, Tensor, Tensor]
    tma: bool


def operand_tensors(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, scales, zero points and row scales; 8-bit ones as bytes, and any tensor in the place
    of one that the format has not."""
    values, scales = _bits(matrix.values), _bits(matrix.scales)
    zeros = scales if matrix.zero_points is None else matrix.zero_points
    row_scales = scales if matrix.row_scales is None else matrix.row_scales
    return values, scales, zeros, row_scales


def read_as(matrix: QuantizedMatrix, plan: QuantizedTile, form: Form) -> Operands:
    """Read through a descriptor where the plan says so and alignment allows it."""
    values, scales, zeros, row_scales = operand_tensors(matrix)
    if form[0] != "numbers":
        values = matrix.values
    tile, width = plan.tile, values.shape[2]
    depth = tile.depth // 2 if matrix.format.packed else tile.depth
    allowed = tile.tma and tma_allowed(
        tile,
        contiguous=values.is_contiguous(),
        address=values.data_ptr(),
        inner=width,
        depth=width,
        transposed=False,
        itemsize=values.element_size(),
    )
    tma = allowed and width >= depth >= 16
    described: Any = values
    if tma:
        described = support.described(values.view(-1, width), [tile.columns, depth])
    return Operands((described, scales, zeros, row_scales), tma)
