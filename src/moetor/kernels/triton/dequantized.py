"""One product's quantised matrices as numbers in a workspace.

Shape letters: E experts, N outputs of a product, D its depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.kernels.formats import QuantizedMatrix
from moetor.kernels.triton.choose import next_power_of_2
from moetor.kernels.triton.quantized_operands import form_of, operand_tensors

_BYTES = 4096  # of codes that a program reads
_WIDEST = 1024


def dequantized(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """All experts' weights, [E, N, D] in `dtype`, each rounded once.

    Args:
        matrix: in a format that is multiplied by numbers.
        dtype: bfloat16, float16 or float32.
    """
    from moetor.kernels.triton import dequantize_kernels

    values, scales, zeros, row_scales = operand_tensors(matrix)
    experts, rows, width = values.shape
    out_END = torch.empty((experts, rows, matrix.depth), dtype=dtype, device=values.device)
    step = min(_WIDEST, max(16, next_power_of_2(width)))
    height = max(1, _BYTES // step)
    grid = (-(-experts * rows // height), -(-width // step))
    dequantize_kernels.dequantize_matrices[grid](
        values,
        scales,
        zeros,
        row_scales,
        out_END,
        experts * rows,
        N=rows,
        D=matrix.depth,
        FORM=form_of(matrix.format, "unquantized", dtype),
        ROWS=height,
        BW=step,
        num_warps=4,
    )
    return out_END
