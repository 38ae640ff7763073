"""Whether the Triton kernels can run, and what they refuse, before anything is launched.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.triton.choose import Device

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MIN_CAPABILITY = (8, 0)
_MAX_TOP_K = 64
# Places in one expert's matrix are 32-bit numbers in the kernels; experts' own are 64-bit.
_MAX_MATRIX = 2**31
# Programs of a launch.
_MAX_GRID = 2**31 - 1


@functools.cache
def have_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def have_roles() -> bool:
    """Whether the installed Triton is the one that `roles_kernels` are written for and ran with:
    their language, Gluon, changes from version to version. Triton is not imported for that."""
    return have_triton() and importlib.metadata.version("triton").split(".")[:2] == ["3", "6"]


@functools.cache
def gpu(index: int) -> Device:
    """Facts of CUDA device number `index`."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Device(
        sms=properties.multi_processor_count,
        shared=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined, unused-ignore]
        capability=capability,
        roles=capability == (9, 0) and have_roles(),
    )


def device_of(tensor: Tensor) -> Device:
    """Facts of the GPU that holds `tensor`."""
    index = tensor.device.index
    return gpu(torch.cuda.current_device() if index is None else index)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of `tensor`."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def described(tensor: Tensor, box: list[int]) -> Any:
    """A tensor descriptor that reads or writes boxes of `box` elements."""
    from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found, unused-ignore]
        TensorDescriptor,
    )

    return TensorDescriptor.from_tensor(tensor, box)


def overlap(tensor: Tensor) -> bool:
    """Whether a launch may start while the one before it ends (compute capability 9.0)."""
    return tensor.is_cuda and device_of(tensor).capability >= (9, 0)


def chained(pdl: bool) -> dict[str, bool]:
    """The launch option of a kernel that begins with `device_code.chain`."""
    return {"launch_pdl": True} if pdl else {}


def _too_many_slots(top_k: int) -> str | None:
    if top_k > _MAX_TOP_K:
        return f"takes at most {_MAX_TOP_K} slots per token, not {top_k}"
    return None


def device_refusal(device: str) -> str | None:
    """Why no Triton kernel runs on `device` here, as half a sentence, or None."""
    if device != "cuda":
        return f"runs on NVIDIA GPUs, not on {device}"
    if not have_triton():
        return "needs Triton, which is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "is written for NVIDIA GPUs, and this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and torch sees none"
    return capability_refusal(gpu(torch.cuda.current_device()).capability)


def capability_refusal(capability: tuple[int, int]) -> str | None:
    """Why no Triton kernel runs on a GPU of this compute capability, or None."""
    if capability < _MIN_CAPABILITY:
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def refusal(query: KernelQuery) -> str | None:
    """Why no Triton kernel runs `query`, as half a sentence, or None."""
    if query.device != "cuda":
        return device_refusal(query.device)
    if query.weight_format != "unquantized":
        return f"reads unquantised weights, not {query.weight_format}"
    form = query.experts
    if form.hidden_size * max(form.up_size, form.intermediate_size) >= _MAX_MATRIX:
        return (
            f"reads matrices of less than 2^31 elements each, not {form.up_size} x "
            f"{form.hidden_size}"
        )
    return call_refusal(query)


def call_refusal(query: KernelQuery) -> str | None:
    """What does not depend on the weights' format: why `query` does not run on a GPU here."""
    if query.dtype not in DTYPES:
        return f"computes in bfloat16, float16 or float32, not {query.dtype}"
    return _too_many_slots(query.top_k) or device_refusal(query.device)


def check_tensor(
    tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuses a tensor on another device, of another dtype or of another shape.

    Raises:
        InputError: with its name, what it is and what it must be.
    """
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}, the hidden states are on {device}")
    if tensor.dtype != dtype:
        raise InputError(f"{name} is {tensor.dtype}, it must be {dtype}")
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}, it must be {list(shape)}")


def check_rows(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    config: ExpertsConfig,
) -> None:
    """Refuses hidden states and a routing of wrong shapes, dtypes and devices.

    Raises:
        InputError: naming the tensor, what it is and what it must be.
    """
    if hidden_TH.dtype not in DTYPES:
        raise InputError(f"hidden states are {hidden_TH.dtype}, not bfloat16, float16 or float32")
    if hidden_TH.dim() != 2 or topk_ids_TK.dim() != 2:
        raise InputError(
            f"hidden states {list(hidden_TH.shape)} and topk_ids {list(topk_ids_TK.shape)} "
            "must be [T, H] and [T, K]"
        )
    (tokens, top_k), dtype = (hidden_TH.shape[0], topk_ids_TK.shape[1]), hidden_TH.dtype
    device = hidden_TH.device
    if top_k < 1:
        raise InputError("topk_ids [T, K] must have at least one slot per token")
    check_tensor(hidden_TH, "hidden states", (tokens, config.hidden_size), dtype, device)
    if not hidden_TH.is_contiguous():
        raise InputError("hidden states must be contiguous")
    check_tensor(topk_weights_TK, "topk_weights", (tokens, top_k), torch.float32, device)
    check_tensor(topk_ids_TK, "topk_ids", (tokens, top_k), torch.int32, device)


def check_others(
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    post_norm: Tensor | None,
    config: ExpertsConfig,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Refuses biases and a norm that the form does not describe.

    Args:
        dtypes: that biases may have.

    Raises:
        InputError: naming the tensor, what it is and what it must be.
    """
    for bias, name, size in (
        (gate_up_bias, "gate_up_bias", config.up_size),
        (down_bias, "down_bias", config.hidden_size),
    ):
        if bias is not None:
            dtype = bias.dtype if bias.dtype in dtypes else dtypes[0]
            check_tensor(bias, name, (config.num_experts, size), dtype, device)
        elif config.has_bias:
            raise InputError(f"has_bias=True, and {name} is missing")
    if config.post_norm_eps is not None:
        if post_norm is None:
            raise InputError("post_norm_eps is set, and the norm's weight is missing")
        check_tensor(post_norm, "post_norm", (config.hidden_size,), post_norm.dtype, device)


def check_inputs(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
) -> None:
    """Refuses wrong shapes, dtypes and devices.

    Raises:
        InputError: naming the tensor, what it is and what it must be.
    """
    check_rows(hidden_TH, topk_weights_TK, topk_ids_TK, config)
    dtype, device = hidden_TH.dtype, hidden_TH.device
    check_tensor(weights.gate_up, "gate_up", config.gate_up_shape, dtype, device)
    check_tensor(weights.down, "down", config.down_shape, dtype, device)
    for weight, name in ((weights.gate_up, "gate_up"), (weights.down, "down")):
        _, rows, columns = weight.shape
        last = (rows - 1) * weight.stride(1) + (columns - 1) * weight.stride(2)
        if last >= _MAX_MATRIX:
            raise InputError(
                f"{name} has strides {list(weight.stride())}: one expert's matrix spans {last + 1} "
                "elements, it must be less than 2^31; make it contiguous"
            )
    others = (weights.gate_up_bias, weights.down_bias, weights.post_norm)
    check_others(*others, config, device, (dtype,))


def check_on_gpu(kernel: str, hidden_TH: Tensor) -> None:
    """Refuses hidden states that are elsewhere.

    Raises:
        InputError: saying where they are.
    """
    if hidden_TH.device.type != "cuda":
        raise InputError(
            f"hidden states are on {hidden_TH.device}; kernel {kernel!r} reads CUDA tensors"
        )


def check_call(
    kernel: str,
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: ExpertWeights,
    config: ExpertsConfig,
) -> None:
    """What a call of `kernel` refuses before any launch.

    Raises:
        InputError: a tensor of the wrong shape, dtype or device.
        KernelRefusedError: a form that the kernel does not have, or no Triton.
    """
    check_on_gpu(kernel, hidden_TH)
    check_inputs(hidden_TH, topk_weights_TK, topk_ids_TK, weights, config)
    query = KernelQuery(
        device="cuda", dtype=hidden_TH.dtype, experts=config, top_k=topk_ids_TK.shape[1]
    )
    # The query's answer is that for the current GPU; the tensors may be on an older one.
    reason = refusal(query) or capability_refusal(device_of(hidden_TH).capability)
    if reason is not None:
        raise KernelRefusedError(f"kernel {kernel!r} {reason}; use kernel 'torch'")


def check_programs(kernel: str, programs: int, other: str) -> None:
    """Refuses a launch of more programs than a grid has.

    Raises:
        KernelRefusedError: saying which kernel takes the call.
    """
    if programs > _MAX_GRID:
        raise KernelRefusedError(
            f"kernel {kernel!r} would need {programs} programs in one launch, a GPU takes "
            f"{_MAX_GRID}; use kernel {other!r}"
        )


def output_stride(weight_EXY: Tensor, *, transposed: bool) -> tuple[int, int, int]:
    """Strides of the expert, of a step along the product's output, of one along its depth."""
    stride_e, first, second = weight_EXY.stride()
    return (stride_e, second, first) if transposed else (stride_e, first, second)


def flat(bias: Tensor | None, otherwise: Tensor) -> Tensor:
    """A contiguous bias, or any tensor in its place where there is none."""
    return otherwise if bias is None else bias.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """[..., H] as [T, H] with a contiguous last axis; a copy only where a view cannot do."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
