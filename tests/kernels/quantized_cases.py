"""Random quantised weights, and dequantisers written from the formats' definitions in plain Python
floats: they share no line with what they judge.

Shape letters: E experts, N outputs of a product, D its depth.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.formats import (
    ActivationFormat,
    QuantizedExpertWeights,
    QuantizedMatrix,
    find_format,
)
from oracle import Tensors

FORMATS = (
    *("int8", "int8_g16", "int8_g32", "int4_g32", "int4_g64", "int4_g128"),
    *("int4_g32_zp", "int4_g128_zp", "fp8", "fp8_block128x128", "fp8_block4x8"),
    *("mxfp8", "mxfp4", "nvfp4"),
)
ROUNDED: tuple[tuple[str, ActivationFormat], ...] = (
    ("fp8", "fp8_token"),
    ("fp8", "fp8_static"),
    ("fp8_block128x128", "fp8_group128"),
    ("int8", "int8_token"),
    ("mxfp8", "mxfp8"),
)
"""Weight formats with those of the inputs that usually go with them."""


def e4m3(code: int) -> float:
    """OFP8 E4M3: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = -1 if code & 128 else 1, (code >> 3) & 15, code & 7
    assert code & 127 != 127, "NaN"
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(code: int) -> float:
    """OCP FP4 E2M1: sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    sign, exponent, mantissa = -1 if code & 8 else 1, (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def random_matrix(
    name: str, experts: int, rows: int, depth: int, rng: torch.Generator
) -> QuantizedMatrix:
    """Random codes and scales of a format; weights of about depth ** -0.5."""
    kind = find_format(name)
    size = depth**-0.5

    def uniform(shape: tuple[int, ...]) -> Tensor:
        return torch.rand((experts, *shape), generator=rng) + 0.5

    shape = (experts, *kind.value_shape(rows, depth))
    codes = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    if kind.element == "int8":
        codes = codes.view(torch.int8)
    elif kind.element == "e4m3":
        # Up to 15, with all small exponents; NaN lies above.
        codes = (codes % 88 + 128 * (codes > 127)).to(torch.uint8).view(torch.float8_e4m3fn)
    magnitude = {"int8": 74.0, "int4": 4.6, "e4m3": 4.0, "e2m1": 2.9}[kind.element]
    scales = uniform(kind.scale_shape(rows, depth)) * size / magnitude
    row_scales = None
    if kind.scale == "e8m0":
        scales = (127 + scales.log2().round()).to(torch.uint8)
    elif kind.scale == "e4m3":
        row_scales = uniform((rows,)) * size / magnitude / 8
        scales = (uniform(kind.scale_shape(rows, depth)) * 8).to(torch.float8_e4m3fn)
    elif kind.by_group:
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        scales = scales.to(dtypes[int(torch.randint(3, (), generator=rng))])
    zeros = None
    if kind.zero_points:
        drawn = torch.rand((experts, *kind.scale_shape(rows, depth)), generator=rng)
        zeros = (15 * drawn).to(scales.dtype)
    return QuantizedMatrix(
        format=kind,
        depth=depth,
        values=codes,
        scales=scales,
        zero_points=zeros,
        row_scales=row_scales,
    )


def _code(matrix: QuantizedMatrix, expert: int, row: int, place: int) -> float:
    stored = matrix.values[expert, row]
    if matrix.format.element == "int8":
        return float(stored[place])
    if matrix.format.element == "e4m3":
        return e4m3(int(stored.view(torch.uint8)[place]))
    # 32 values in 16 bytes: the first sixteen in the low halves, the others in the high halves.
    block, within = divmod(place, 32)
    byte = int(stored[16 * block + within % 16])
    code = byte & 15 if within < 16 else byte >> 4
    return e2m1(code) if matrix.format.element == "e2m1" else float(code)


def weight(matrix: QuantizedMatrix, expert: int, row: int, place: int) -> float:
    """One weight from the table in `WeightFormat`."""
    kind, code = matrix.format, _code(matrix, expert, row, place)
    rows, depth = kind.group
    where = (row,) if depth == 0 else (row // rows, place // depth)
    scale_tensor = matrix.scales[expert][where]
    if kind.scale == "e8m0":
        return math.ldexp(code, int(scale_tensor) - 127)
    scale = float(scale_tensor)
    if kind.scale == "e4m3":
        assert matrix.row_scales is not None
        scale *= float(matrix.row_scales[expert, row])
    if kind.element == "int4":
        zeros = matrix.zero_points
        code -= 8.0 if zeros is None else float(zeros[expert][where])
    return code * scale


def dense(matrix: QuantizedMatrix) -> Tensor:
    """All weights [E, N, D] in float64."""
    experts, rows, depth = matrix.values.shape[0], matrix.rows, matrix.depth
    numbers = [
        [[weight(matrix, e, n, d) for d in range(depth)] for n in range(rows)]
        for e in range(experts)
    ]
    return torch.tensor(numbers, dtype=torch.float64)


def random_weights(
    config: ExpertsConfig,
    name: str,
    activations: ActivationFormat,
    rng: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
) -> QuantizedExpertWeights:
    """Random quantised experts in canonical form.

    Args:
        dtype: of biases and of the norm.
    """
    e, h, i, j = config.num_experts, config.hidden_size, config.intermediate_size, config.up_size
    gate_up = random_matrix(name, e, j, h, rng)
    down = random_matrix(name, e, h, i, rng)
    if activations == "fp8_static":
        steps = 0.01 + 0.01 * torch.rand(2, e, generator=rng)
        gate_up = replace(gate_up, input_scales=steps[0])
        down = replace(down, input_scales=steps[1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    return QuantizedExpertWeights(
        gate_up=gate_up,
        down=down,
        gate_up_bias=normal(e, j) if config.has_bias else None,
        down_bias=normal(e, h) if config.has_bias else None,
        post_norm=None if config.post_norm_eps is None else 1 + normal(h),
        activation_format=activations,
    )


def on_gpu(weights: QuantizedExpertWeights) -> QuantizedExpertWeights:
    """All tensors copied to the current GPU."""

    def moved(matrix: QuantizedMatrix) -> QuantizedMatrix:
        return replace(matrix, **{name: one.cuda() for name, one in matrix.tensors.items()})

    others = {
        name: None if (one := getattr(weights, name)) is None else one.cuda()
        for name in ("gate_up_bias", "down_bias", "post_norm")
    }
    up, down = moved(weights.gate_up), moved(weights.down)
    return replace(weights, gate_up=up, down=down, **others)


def draw_quantized(
    config: ExpertsConfig,
    name: str,
    rng: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    activations: ActivationFormat = "unquantized",
) -> tuple[QuantizedExpertWeights, Tensors]:
    """The same, and as numbers."""
    weights = random_weights(config, name, activations, rng, dtype=dtype)
    numbers = Tensors(
        gate_up=dense(weights.gate_up),
        down=dense(weights.down),
        gate_up_bias=weights.gate_up_bias,
        down_bias=weights.down_bias,
        post_norm=weights.post_norm,
    )
    return weights, numbers
