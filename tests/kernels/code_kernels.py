"""Kernels that show what `quantized_code` makes of codes, and what it must make of them."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantized_cases import e2m1, e4m3
from moetor.kernels.triton.quantized_code import (
    halves,
    low_places,
    numbers,
    scale_numbers,
    scaled,
)


@triton.jit
def write_numbers(codes, low, ELEMENT: tl.constexpr, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(low + at, numbers(tl.load(codes + at), ELEMENT, DTYPE))


@triton.jit
def write_halves(
    codes, low, high, ELEMENT: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SIZE)
    first, second = halves(tl.load(codes + at), ELEMENT, OFFSET, DTYPE)
    tl.store(low + at, first)
    tl.store(high + at, second)


@triton.jit
def write_scales(stored, made, SCALE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(made + at, scale_numbers(tl.load(stored + at), SCALE))


@triton.jit
def write_places(made, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(made + at, low_places(at))


@triton.jit
def write_scaled(
    number, scale, made, R: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr
):
    at = tl.arange(0, R)[:, None] * D + tl.arange(0, D)[None, :]
    group = tl.arange(0, R)[:, None] * (D // GROUP) + tl.arange(0, D // GROUP)[None, :]
    tile = scaled(tl.load(number + at).to(DTYPE), tl.load(scale + group), GROUP)
    tl.store(made + at, tile)


def expected_codes(element: str, offset: int) -> Tensor:
    """The numbers of all codes in float64; a NaN's code in e4m3 counts as 480."""
    if element == "int4":
        numbers = [float(code - offset) for code in range(16)]
    elif element == "e2m1":
        numbers = [e2m1(code) for code in range(16)]
    elif element == "int8":
        numbers = [float(code - 256 * (code > 127)) for code in range(256)]
    else:
        numbers = [e4m3(code) if code & 127 != 127 else 480.0 for code in range(256)]
        numbers[255] = -480.0
    return torch.tensor(numbers, dtype=torch.float64)
