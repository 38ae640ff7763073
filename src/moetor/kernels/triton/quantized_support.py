"""Which quantised formats the Triton kernels multiply, and what they refuse before a launch.

Shape letters: E experts, H hidden, I intermediate, N outputs of a product, D its depth.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.base import KernelQuery
from moetor.kernels.formats import (
    ActivationFormat,
    QuantizedExpertWeights,
    QuantizedMatrix,
    WeightFormat,
    find_format,
    format_refusal,
)
from moetor.kernels.triton import support

Arithmetic = Literal["channel", "block", "numbers"]
"""How a product is computed.

- `channel`: 8-bit codes of weight and input; a row's and a column's scale follow at the end.
- `block`: the same over 128 of the depth at a time, scaled and added in float32.
- `numbers`: codes of the weight become numbers on the way.
"""
_FP8_CAPABILITY = (8, 9)


def arithmetic(kind: WeightFormat, activations: str) -> Arithmetic | None:
    """How these formats are multiplied, or None where they are not."""
    if kind.name == "fp8" and activations in ("fp8_token", "fp8_static"):
        return "channel"
    if kind.name == "int8" and activations == "int8_token":
        return "channel"
    if kind.name == "fp8_block128x128" and activations == "fp8_group128":
        return "block"
    depth = kind.group[1]
    # Groups are arranged in tiles whose sides are powers of two.
    if activations == "unquantized" and depth & (depth - 1) == 0:
        return "numbers"
    # Both sides' numbers are exact in bfloat16: three bits of mantissa, and a power of two.
    if activations == "mxfp8" and kind.name == "mxfp8":
        return "numbers"
    return None


def quantized_refusal(query: KernelQuery) -> str | None:
    """Why no Triton kernel runs a `query` with quantised weights, as half a sentence, or None."""
    if query.device != "cuda":
        return support.device_refusal(query.device)
    reason = format_refusal(query.weight_format)
    if reason is not None:
        return reason
    found = []
    for name in query.weight_format.split("+"):
        found.append(arithmetic(find_format(name), query.activation_format))
        if found[-1] is None:
            return f"does not multiply {name} weights with {query.activation_format} activations"
    form = query.experts
    if form.transposed or form.interleaved:
        return "reads quantised weights in canonical storage, not transposed or interleaved"
    reason = support.call_refusal(query)
    if reason is None:
        capability = support.gpu(torch.cuda.current_device()).capability
        return _fp8_refusal(query.activation_format, capability)
    return reason


def _fp8_refusal(activations: str, capability: tuple[int, int]) -> str | None:
    """GPUs before Ada neither multiply fp8 nor round to it."""
    if "fp8" not in activations or capability >= _FP8_CAPABILITY:
        return None
    return (
        f"rounds activations to fp8 from compute capability 8.9 on, this GPU has "
        f"{capability[0]}.{capability[1]}; with unquantised activations (fp8_w8a16) it runs"
    )


def _check_codes(
    tensor: Tensor, name: str, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype
) -> None:
    if tensor.dtype not in dtypes:
        raise InputError(f"{name} is {tensor.dtype}, it must be {' or '.join(map(str, dtypes))}")
    support.check_tensor(tensor, name, shape, tensor.dtype, device)
    if not tensor.is_contiguous():
        raise InputError(f"{name} has strides {list(tensor.stride())}, it must be contiguous")


def _check_matrix(
    matrix: QuantizedMatrix,
    name: str,
    size: tuple[int, int, int],
    activations: ActivationFormat,
    device: torch.device,
) -> None:
    experts, rows, depth = size
    kind = matrix.format
    if matrix.depth != depth:
        raise InputError(f"{name} has a depth of {matrix.depth}, it must be {depth}")
    values = (experts, *kind.value_shape(rows, depth))
    scales = (experts, *kind.scale_shape(rows, depth))
    _check_codes(matrix.values, f"{name}.values", values, device, kind.value_dtype)
    _check_codes(matrix.scales, f"{name}.scales", scales, device, *kind.scale_dtypes)
    single = torch.float32
    needed = [
        ("zero_points", matrix.zero_points, scales, matrix.scales.dtype, kind.zero_points),
        ("row_scales", matrix.row_scales, (experts, rows), single, kind.scale == "e4m3"),
        ("input_scales", matrix.input_scales, (experts,), single, activations == "fp8_static"),
    ]
    for field, tensor, shape, dtype, wanted in needed:
        if not wanted:
            continue
        if tensor is None:
            raise InputError(
                f"{name} is {kind.name} with {activations} activations, and its {field} are missing"
            )
        _check_codes(tensor, f"{name}.{field}", shape, device, dtype)


def check_quantized_inputs(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
) -> None:
    """Refuses wrong shapes, dtypes, strides and devices.

    Raises:
        InputError: naming the tensor, what it is and what it must be.
    """
    support.check_rows(hidden_TH, topk_weights_TK, topk_ids_TK, config)
    device, activations = hidden_TH.device, weights.activation_format
    experts, hidden, size = config.num_experts, config.hidden_size, config.intermediate_size
    _check_matrix(
        weights.gate_up, "gate_up", (experts, config.up_size, hidden), activations, device
    )
    _check_matrix(weights.down, "down", (experts, hidden, size), activations, device)
    others = (weights.gate_up_bias, weights.down_bias, weights.post_norm)
    support.check_others(*others, config, device, support.DTYPES)


def check_quantized_call(
    kernel: str,
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
) -> None:
    """What a call of `kernel` with quantised weights refuses before any launch.

    Raises:
        InputError: a tensor of the wrong shape, dtype, strides or device.
        KernelRefusedError: formats or a form that the kernel does not have, or no Triton.
    """
    support.check_on_gpu(kernel, hidden_TH)
    check_quantized_inputs(hidden_TH, topk_weights_TK, topk_ids_TK, weights, config)
    query = KernelQuery(
        device="cuda",
        dtype=hidden_TH.dtype,
        experts=config,
        top_k=topk_ids_TK.shape[1],
        weight_format=weights.weight_format,
        activation_format=weights.activation_format,
    )
    # The query's answer is that for the current GPU; the tensors may be on an older one.
    capability = support.device_of(hidden_TH).capability
    reason = (
        quantized_refusal(query)
        or support.capability_refusal(capability)
        or _fp8_refusal(query.activation_format, capability)
    )
    if reason is not None:
        raise KernelRefusedError(f"kernel {kernel!r} {reason}; use kernel 'torch'")
