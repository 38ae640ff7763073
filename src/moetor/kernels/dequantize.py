"""From codes back to numbers: the exact dequantiser of every weight format, the rounding of
activations, and the packing of 4-bit codes.

Shape letters: E experts, N outputs of a product, D its depth, P depth padded to whole groups, S
rows of input, G group size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.kernels.formats import (
    E4M3_MAX,
    NIBBLE_BLOCK,
    ActivationFormat,
    QuantizedMatrix,
    WeightFormat,
)

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by the low three bits of a code; bit 3 is the sign."""
_HALF = NIBBLE_BLOCK // 2


def pack_nibbles(codes_XP: Tensor) -> Tensor:
    """uint8 codes below 16, [..., P], to bytes [..., P / 2] in the order of `WeightFormat`. P is a
    multiple of 32.
    """
    blocks: Tensor = codes_XP.unflatten(-1, (-1, 2, _HALF))
    return (blocks[..., 0, :] | (blocks[..., 1, :] << 4)).flatten(-2)


def unpack_nibbles(bytes_XB: Tensor) -> Tensor:
    """The reverse of `pack_nibbles`."""
    blocks = bytes_XB.unflatten(-1, (-1, _HALF))
    return torch.stack((blocks & 15, blocks >> 4), dim=-2).flatten(-3)


def e8m0(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(s - 127) of uint8 exponents, exactly."""
    ones = torch.ones(exponents.shape, dtype=dtype, device=exponents.device)
    return torch.ldexp(ones, exponents.to(torch.int32) - 127)


def e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of 4-bit e2m1 codes."""
    table = torch.tensor(E2M1_VALUES, dtype=dtype, device=codes.device)
    return torch.cat((table, -table))[codes.int()]


def _values(values_NX: Tensor, kind: WeightFormat, dtype: torch.dtype) -> Tensor:
    if kind.element == "e2m1":
        return e2m1(unpack_nibbles(values_NX), dtype)
    if kind.element == "int4":
        return unpack_nibbles(values_NX).to(dtype)
    return values_NX.to(dtype)


def dequantize_expert(
    matrix: QuantizedMatrix, expert: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One expert's weights [N, D], as the format defines them.

    Args:
        dtype: float32 or float64, in which scale and value are multiplied.
    """
    kind, depth = matrix.format, matrix.depth
    weight_NP = _values(matrix.values[expert], kind, dtype)
    stored = matrix.scales[expert]
    scales = e8m0(stored, dtype) if kind.scale == "e8m0" else stored.to(dtype)
    if matrix.row_scales is not None:
        scales = scales * matrix.row_scales[expert].to(dtype).unsqueeze(-1)
    rows, length = kind.group
    if length == 0:
        return weight_NP * scales.unsqueeze(-1)
    if rows > 1:
        spread = scales.repeat_interleave(rows, 0)[: matrix.rows]
        return weight_NP * spread.repeat_interleave(length, 1)[:, :depth]
    grouped: Tensor = weight_NP.unflatten(-1, (-1, length))
    if matrix.zero_points is not None:
        grouped = grouped - matrix.zero_points[expert].to(dtype).unsqueeze(-1)
    elif kind.element == "int4":
        grouped = grouped - 8
    return (grouped * scales.unsqueeze(-1)).flatten(-2)[:, :depth]


def shared_exponent(largest: Tensor, exponent_max: int, value_max: float) -> Tensor:
    """k of the scale 2^k of a microscaling group: floor(log2(largest)) - exponent_max (OCP MX 1.0,
    6.3), one more where the largest value would saturate.

    Args:
        largest: positive magnitudes, float32.
        exponent_max, value_max: of the element format (e4m3: 8 and 448, e2m1: 2 and 6).
    """
    k = torch.frexp(largest).exponent - 1 - exponent_max
    k = k + (largest > torch.ldexp(torch.full_like(largest, value_max), k)).int()
    return k.clamp(-127, 127)


def _scaled(x: Tensor, scale: Tensor, activations: ActivationFormat) -> Tensor:
    """x rounded to s * q."""
    quotient = x / scale
    if activations == "int8_token":
        return quotient.round().clamp(-127, 127) * scale
    q = quotient.clamp(-E4M3_MAX, E4M3_MAX).float().to(torch.float8_e4m3fn)
    return q.to(x.dtype) * scale


def round_activations(
    x_SD: Tensor, activations: ActivationFormat, input_scale: Tensor | None = None
) -> Tensor:
    """The rows as `ActivationFormat` rounds them, in the dtype of `x_SD` (float32 or float64).

    Args:
        input_scale: a scalar, for `fp8_static`.
    """
    if activations == "unquantized" or x_SD.numel() == 0:
        return x_SD
    if activations == "fp8_static":
        assert input_scale is not None, "a static format comes with its scale"
        return _scaled(x_SD, input_scale.to(x_SD.dtype), activations)
    run = {"fp8_group128": 128, "mxfp8": 32}.get(activations, x_SD.shape[1])
    x_SGR = F.pad(x_SD, (0, -x_SD.shape[1] % run)).unflatten(-1, (-1, run))
    largest = x_SGR.abs().amax(dim=-1, keepdim=True).float()
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    if activations == "mxfp8":
        scale = torch.ldexp(torch.ones_like(largest), shared_exponent(largest, 8, E4M3_MAX))
    else:
        top = 127.0 if activations == "int8_token" else E4M3_MAX
        scale = largest / top
    return _scaled(x_SGR, scale.to(x_SD.dtype), activations).flatten(-2)[:, : x_SD.shape[1]]
