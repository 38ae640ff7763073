"""The native CPU kernel: routed experts in C++, reading Transformers' packed weights in place.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product
(2 I when gated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery, Weights
from moetor.kernels.formats import QuantizedExpertWeights
from moetor.kernels.native import library
from moetor.kernels.native.build import BuildError
from moetor.kernels.native.codes import check_tensor, code_fields, codes_refusal


def _unsupported_form(config: ExpertsConfig) -> str | None:
    if config.post_norm_eps is not None:
        return "does not have the norm of each expert's output"
    if config.activation.function is not None:
        return f"cannot call a Python activation ({config.activation.label})"
    return None


def _check_inputs(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: Weights,
    config: ExpertsConfig,
) -> None:
    if hidden_TH.dtype not in library.DTYPE_CODES:
        raise InputError(f"hidden states are {hidden_TH.dtype}, not float32, bfloat16 or float16")
    if hidden_TH.dim() != 2 or topk_ids_TK.dim() != 2:
        raise InputError(
            f"hidden states {list(hidden_TH.shape)} and topk_ids {list(topk_ids_TK.shape)} "
            "must be [T, H] and [T, K]"
        )
    tokens, top_k, dtype = hidden_TH.shape[0], topk_ids_TK.shape[1], hidden_TH.dtype
    check_tensor(hidden_TH, "hidden states", (tokens, config.hidden_size), dtype)
    if not hidden_TH.is_contiguous():
        raise InputError("hidden states must be contiguous")
    check_tensor(topk_weights_TK, "topk_weights", (tokens, top_k), torch.float32)
    check_tensor(topk_ids_TK, "topk_ids", (tokens, top_k), torch.int32)
    if isinstance(weights, ExpertWeights):
        check_tensor(weights.gate_up, "gate_up", config.gate_up_shape, dtype)
        check_tensor(weights.down, "down", config.down_shape, dtype)
    for bias, name, size in (
        (weights.gate_up_bias, "gate_up_bias", config.up_size),
        (weights.down_bias, "down_bias", config.hidden_size),
    ):
        if bias is not None:
            check_tensor(bias, name, (config.num_experts, size), dtype)
        elif config.has_bias:
            raise InputError(f"has_bias=True, and {name} is missing")


def _matrix(weight_EXY: Tensor, *, transposed: bool) -> tuple[Tensor, int, bool]:
    """The tensor to read, the stride between its rows, and whether its output axis is the
    contiguous one.

    A view whose middle axis is contiguous is read in place as the other form; one with no
    contiguous axis is copied.
    """
    _, rows, columns = weight_EXY.shape
    if weight_EXY.stride(2) == 1 or columns == 1:
        return weight_EXY, weight_EXY.stride(1), transposed
    if weight_EXY.stride(1) == 1 or rows == 1:
        return weight_EXY, weight_EXY.stride(2), not transposed
    copy = weight_EXY.contiguous()
    return copy, copy.stride(1), transposed


def _plain_fields(
    weights: ExpertWeights, config: ExpertsConfig
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """The fields of `library.Arguments` that describe weights in the dtype of the inputs, and the
    tensors they point into, which may be copies."""
    gate_up, gate_up_stride, gate_up_columns = _matrix(
        weights.gate_up, transposed=config.transposed
    )
    down, down_stride, down_columns = _matrix(weights.down, transposed=config.transposed)
    fields = {
        "gate_up": gate_up.data_ptr(),
        "down": down.data_ptr(),
        "gate_up_expert_stride": gate_up.stride(0),
        "gate_up_stride": gate_up_stride,
        "down_expert_stride": down.stride(0),
        "down_stride": down_stride,
        "gate_up_columns": gate_up_columns,
        "down_columns": down_columns,
    }
    return fields, (gate_up, down)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call with all its addresses, to be run as often as what they point to changes.

    Attributes:
        arguments: as the library reads them, but for the workspace.
        held: every tensor that they point into.
    """

    native: library.Library
    arguments: library.Arguments
    held: tuple[Tensor | None, ...]

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory that a run needs."""
        return self.native.workspace_bytes(self.arguments)

    def use_workspace(self, workspace: Tensor) -> None:
        """Gives the call its scratch memory, which the caller keeps alive."""
        self.arguments.workspace = workspace.data_ptr()
        self.arguments.workspace_bytes = workspace.numel()


def prepare(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: Weights,
    config: ExpertsConfig,
    out_TH: Tensor,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> Prepared:
    """A call of the kernel that writes into `out_TH`; arguments and errors as `native_experts`."""
    refused = _unsupported_form(config)
    if refused is not None:
        raise KernelRefusedError(f"kernel 'native' {refused}; use kernel 'torch'")
    try:
        native = library.load()
    except BuildError as error:
        raise KernelRefusedError(f"kernel 'native' {error}; use kernel 'torch'") from error
    if isa is not None and isa not in native.isas:
        raise KernelRefusedError(f"isa={isa!r} is not had here; there are {', '.join(native.isas)}")
    _check_inputs(hidden_TH, topk_weights_TK, topk_ids_TK, weights, config)
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    held: tuple[Tensor, ...] = ()
    if isinstance(weights, QuantizedExpertWeights):
        fields = code_fields(weights, config)
    else:
        fields, held = _plain_fields(weights, config)
    up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias.contiguous()
    down_bias = None if weights.down_bias is None else weights.down_bias.contiguous()
    activation = config.activation
    arguments = library.Arguments(
        hidden=hidden_TH.data_ptr(),
        topk_weights=topk_weights_TK.data_ptr(),
        topk_ids=topk_ids_TK.data_ptr(),
        gate_up_bias=None if up_bias is None else up_bias.data_ptr(),
        down_bias=None if down_bias is None else down_bias.data_ptr(),
        out=out_TH.data_ptr(),
        tokens=hidden_TH.shape[0],
        top_k=topk_ids_TK.shape[1],
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        gate_up_bias_stride=config.up_size,
        down_bias_stride=config.hidden_size,
        dtype=library.DTYPE_CODES[hidden_TH.dtype],
        isa=native.isa_code(isa),
        threads=torch.get_num_threads() if threads is None else threads,
        gated=config.gated,
        interleaved=config.interleaved,
        weight_on_input=config.weight_on_input,
        activation=library.ACTIVATION_CODES[activation.name],
        limit_place=0 if activation.limit is None else library.LIMIT_CODES[activation.limit_place],
        alpha=activation.alpha,
        limit=activation.limit or 0.0,
        up_shift=activation.up_shift,
        softcap=activation.softcap or 0.0,
        up_softcap=activation.up_softcap or activation.softcap or 0.0,
        **fields,
    )
    tensors = (hidden_TH, topk_weights_TK, topk_ids_TK, out_TH, up_bias, down_bias)
    return Prepared(native, arguments, (*tensors, *held, *_codes_of(weights)))


def _codes_of(weights: Weights) -> tuple[Tensor, ...]:
    if not isinstance(weights, QuantizedExpertWeights):
        return ()
    return (*weights.gate_up.tensors.values(), *weights.down.tensors.values())


def native_experts(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: Weights,
    config: ExpertsConfig,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """The routed experts' weighted sum [T, H]. See `ExpertsKernel`; gradients are not recorded.

    Args:
        hidden_TH: float32, bfloat16 or float16, contiguous.
        topk_weights_TK: float32.
        topk_ids_TK: int32 in [0, E].
        weights: in the dtype of `hidden_TH`, or quantised; biases in the dtype of `hidden_TH`.
        isa: `avx2`, `avx512` or `avx512_bf16`; None for the best that this processor has. The
            result's last bits depend on it. `avx512_bf16` multiplies bfloat16 inputs as they are
            and rounds the activation between the products to bfloat16; everything else it
            computes as `avx512` does.
        threads: of torch's pool; None for `torch.get_num_threads()`. The result does not depend on
            it.

    Raises:
        InputError: a tensor of the wrong shape, dtype or device, or an expert id outside [0, E].
        KernelRefusedError: a form, an instruction set or a platform that the kernel does not have.
    """
    out_TH = torch.empty_like(hidden_TH)
    call = prepare(
        hidden_TH,
        topk_weights_TK,
        topk_ids_TK,
        weights,
        config,
        out_TH,
        isa=isa,
        threads=threads,
    )
    workspace = library.workspace(call.workspace_bytes)
    call.use_workspace(workspace)
    status = call.native.run(call.arguments)
    if status == library.BAD_EXPERT_ID:
        raise InputError(f"topk_ids hold an id outside [0, {config.num_experts}]")
    if status != 0:
        raise RuntimeError(
            f"the native kernel answered {status}: its Python side and its C++ side disagree"
        )
    return out_TH


class NativeKernel(ExpertsKernel):
    """Vector instructions chosen at run time; a token's bits never depend on the batch or on the
    threads."""

    name = "native"

    def refusal(self, query: KernelQuery) -> str | None:
        """Other devices, dtypes, formats and forms; or why the library cannot be built (which is
        tried here)."""
        if query.device != "cpu":
            return f"runs on the CPU, not on {query.device}"
        if query.weight_format != "unquantized":
            refused = codes_refusal(query)
            if refused is not None:
                return refused
        if query.dtype not in library.DTYPE_CODES:
            return f"computes float32, bfloat16 and float16, not {query.dtype}"
        form = _unsupported_form(query.experts)
        if form is not None:
            return form
        try:
            library.load()
        except BuildError as error:
            return str(error)
        return None

    def __call__(
        self,
        hidden_TH: Tensor,
        topk_weights_TK: Tensor,
        topk_ids_TK: Tensor,
        weights: Weights,
        config: ExpertsConfig,
        *,
        batch_invariant: bool = False,
    ) -> Tensor:
        """See `ExpertsKernel` and `native_experts`. It is batch invariant with or without
        `batch_invariant`."""
        return native_experts(hidden_TH, topk_weights_TK, topk_ids_TK, weights, config)

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """A token's activations, sums and sorted slots, and a share of the threads' fixed scratch.

        The fixed part (packed inputs and sums of at most 192 slots a thread) is shared out
        over 256 tokens: a call of fewer tokens needs at most as much as one of 256.
        """
        pad = 176  # rows are padded to four vectors of codes; of bytes, there is a scale too
        size = config.intermediate_size
        floats = top_k * (size + -(-size // 4) + pad) + config.hidden_size + pad
        fixed = 4 * 193 * (config.hidden_size + pad + 4112) * torch.get_num_threads()
        fixed += 12 * (config.num_experts + 2) + 1024
        return 4 * floats + 8 * top_k + -(-fixed // 256)
