"""Quantised weights as the native kernel reads them.

Shape letters: E experts, H hidden, I intermediate, J rows of the first product (2 I when gated).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import InputError
from moetor.kernels.base import KernelQuery
from moetor.kernels.formats import (
    QuantizedExpertWeights,
    QuantizedMatrix,
    WeightFormat,
    find_format,
    format_refusal,
)

# `Weights` and `ScaleType` of csrc/api.h.
_KINDS = {
    ("int8", True, False): 1,
    ("int4", True, False): 2,
    ("int4", True, True): 3,
    ("e2m1", True, False): 4,
    ("int8", False, False): 5,
}
"""By element, whether scales are by group, and zero points."""
_SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_STEP = 32  # codes that are widened together; a group is a multiple of it
_ACTIVATIONS = ("unquantized", "int8_token")


@cache
def _format_refusal(kind: WeightFormat) -> str | None:
    if kind.element not in ("int8", "int4", "e2m1") or kind.name == "nvfp4":
        return f"reads int8, int4 and mxfp4 weights, not {kind.name}"
    if kind.group[1] % _STEP:
        return f"reads groups of a multiple of {_STEP} values, not {kind.name}"
    return None


def codes_refusal(query: KernelQuery) -> str | None:
    """Why the native kernel does not read the query's quantised format, as half a sentence."""
    unknown = format_refusal(query.weight_format)
    if unknown is not None:
        return unknown
    if "+" in query.weight_format:
        return f"reads one format in both products, not {query.weight_format}"
    refused = _format_refusal(find_format(query.weight_format))
    if refused is None and query.activation_format not in _ACTIVATIONS:
        return f"rounds no activations to {query.activation_format}"
    return refused


def check_tensor(tensor: Tensor, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Refuses a tensor on another device, of another dtype or of another shape.

    Raises:
        InputError: with its name, what it is and what it must be.
    """
    if not tensor.is_cpu:
        raise InputError(f"{name} is on {tensor.device}; the native kernel reads CPU tensors")
    if tensor.dtype not in dtypes:
        raise InputError(f"{name} is {tensor.dtype}, it must be {' or '.join(map(str, dtypes))}")
    if tensor.shape != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}, it must be {list(shape)}")


def _check_codes(tensor: Tensor, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    check_tensor(tensor, name, shape, *dtypes)
    if not tensor.is_contiguous():
        raise InputError(f"{name} has strides {list(tensor.stride())}, it must be contiguous")


class _Stored(NamedTuple):
    """How a format stores matrices of one size."""

    values: tuple[int, ...]
    value_dtype: torch.dtype
    scales: tuple[int, ...]
    scale_dtypes: tuple[torch.dtype, ...]


@cache
def _stored(kind: WeightFormat, experts: int, rows: int, depth: int) -> _Stored:
    # Kept from call to call, which is safe because no tensor has a part in it.
    values, scales = kind.value_shape(rows, depth), kind.scale_shape(rows, depth)
    return _Stored((experts, *values), kind.value_dtype, (experts, *scales), kind.scale_dtypes)


def _check_matrix(matrix: QuantizedMatrix, name: str, experts: int, rows: int, depth: int) -> None:
    kind = matrix.format
    stored = _stored(kind, experts, rows, depth)
    if matrix.depth != depth:
        raise InputError(f"{name} has a depth of {matrix.depth}, it must be {depth}")
    _check_codes(matrix.values, f"{name}.values", stored.values, stored.value_dtype)
    _check_codes(matrix.scales, f"{name}.scales", stored.scales, *stored.scale_dtypes)
    if kind.zero_points:
        if matrix.zero_points is None:
            raise InputError(f"{name} is {kind.name} and has no zero points")
        zero_points = matrix.zero_points
        _check_codes(zero_points, f"{name}.zero_points", stored.scales, matrix.scales.dtype)


def code_fields(weights: QuantizedExpertWeights, config: ExpertsConfig) -> dict[str, Any]:
    """The fields of `library.Arguments` that describe quantised weights; they point into
    `weights`, which must outlive the call.

    Raises:
        InputError: tensors that are not as the format says, or two formats.
    """
    up, down = weights.gate_up, weights.down
    kind = up.format
    experts, hidden, size = config.num_experts, config.hidden_size, config.intermediate_size
    _check_matrix(up, "gate_up", experts, config.up_size, hidden)
    _check_matrix(down, "down", experts, hidden, size)
    if down.format != kind:
        raise InputError(
            f"the native kernel reads one format: gate_up is {kind.name}, down {down.format.name}"
        )
    reason = _format_refusal(kind)
    if weights.activation_format not in _ACTIVATIONS:
        reason = f"rounds no activations to {weights.activation_format}"
    if reason is not None:
        raise InputError(f"the native kernel {reason}; use kernel 'torch'")
    zeros = (up.zero_points, down.zero_points)
    return {
        "gate_up": up.values.data_ptr(),
        "down": down.values.data_ptr(),
        "gate_up_scales": up.scales.data_ptr(),
        "down_scales": down.scales.data_ptr(),
        "gate_up_zeros": None if zeros[0] is None else zeros[0].data_ptr(),
        "down_zeros": None if zeros[1] is None else zeros[1].data_ptr(),
        "gate_up_expert_stride": up.values.stride(0),
        "gate_up_stride": up.values.stride(1),
        "down_expert_stride": down.values.stride(0),
        "down_stride": down.values.stride(1),
        "gate_up_columns": False,
        "down_columns": False,
        "weights": _KINDS[kind.element, kind.by_group, kind.zero_points],
        "gate_up_scale_type": _SCALE_TYPES[up.scales.dtype],
        "down_scale_type": _SCALE_TYPES[down.scales.dtype],
        "group": kind.group[1],
        "round_inputs": weights.activation_format == "int8_token",
    }
