"""Models with random weights, made on the device from a configuration alone: speed needs no
checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.core_model_loading import set_param_for_module
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from moetor.config import ExpertsConfig
from moetor.errors import ConfigError
from moetor.huggingface.block_form import find_packed
from moetor.huggingface.experts_form import Unrecognised, recognise_experts
from moetor.huggingface.kernel_check import check_kernels
from moetor.huggingface.load_steps import no_info
from moetor.huggingface.offloading import HostExperts, leave_host_experts, plan_offload
from moetor.huggingface.quantized_loading import hold_experts
from moetor.huggingface.streaming import stand_in
from moetor.kernels.formats import ActivationFormat, QuantizedExpertWeights, find_format
from moetor.kernels.native.pages import prefer_huge_pages
from moetor.offload_config import CpuExperts, OffloadConfig, offload_config
from moetor.quant_config import QuantConfig
from moetor.quantization.method import make_method, quant_config
from moetor.quantization.quantize import empty_matrix, quantize

# Of Transformers' usual initial weights.
_STD = 0.02

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _qwen3_30b_a3b() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
    )


CONFIGS: dict[str, Callable[[], Any]] = {"qwen3-30b-a3b": _qwen3_30b_a3b}
"""Configurations that need no files, by the name that a command takes."""


def dummy_model(
    config: Any,
    model_class: Any,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quantization: str | QuantConfig | None = None,
    cpu_experts: CpuExperts | OffloadConfig | None = None,
    kernel: str | None = None,
) -> PreTrainedModel:
    """A model of `config` in eval mode with random weights, drawn on `device` in `dtype`.

    Weights are those that the family starts training from, so that activations keep a sensible size
    and routing is nearly uniform.

    Args:
        model_class: a class of Transformers, or an Auto class, of the configuration's family.
        quantization: of the routed experts, which are then never there unquantised: all experts of
            a layer have the codes of one, its rows shifted; the model is for `fuse` alone.
        cpu_experts: which experts are made in host memory, all of a layer from one as well, for
            `fuse` with the same argument.
        kernel: that `fuse` is to be called with, refused before a weight is drawn; None where the
            model is not to be fused.

    Raises:
        ConfigError: the family does not make a model of this configuration, or the experts do not
            fit where `cpu_experts` says.
        KernelRefusedError: the kernel does not run the experts.
    """
    quant, offload = quant_config(quantization), offload_config(cpu_experts)
    by_hand = quant is not None or offload is not None
    make = partial(_made, getattr(model_class, "from_config", None) or model_class._from_config)
    method = make_method(quantization, kernel or "auto", batch_invariant=False)
    if kernel is not None:
        check_kernels(make(config, dtype, torch.device("meta")), method, device, dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make(config, dtype, torch.device("meta") if by_hand else device)
        if by_hand:
            away: HostExperts | None = None
            if offload is not None:
                away = HostExperts(*plan_offload(model, offload, device, method, dtype), {})
            _draw_apart(model, quant, away, dtype, device)
    return model.eval().requires_grad_(False)


def _made(make: Any, config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        with device:
            model: PreTrainedModel = make(config, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"no model could be made of this configuration: {error}") from error
    return model


def _draw_apart(
    model: PreTrainedModel,
    quant: QuantConfig | None,
    away: HostExperts | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Gives a model on the meta device its weights, the experts' quantised, or in host memory."""
    held: dict[str, QuantizedExpertWeights] = {}
    tensors: dict[str, torch.Tensor] = {}
    info = no_info()
    info.missing_keys = set(model.state_dict())
    for path, block, child in find_packed(model):
        module = f"{path}.{child}" if path else child
        experts = block.get_submodule(child)
        form = recognise_experts(experts)
        on_host = away is not None and module in away.modules
        if isinstance(form, Unrecognised) or (quant is None and not on_host):
            continue
        for name in ("gate_up_proj" if form.gated else "up_proj", "down_proj"):
            shape = experts.get_parameter(name).shape
            full = f"{module}.{name}"
            set_param_for_module(model, full, stand_in(shape, dtype, device), info, None)
            info.missing_keys.discard(full)
            if quant is None:
                tensors[full] = _random_matrices(shape, dtype)
        if quant is not None:
            where = torch.device("cpu") if on_host else device
            held[module] = _random_experts(form, quant, dtype, where)
    settings = LoadStateDictConfig(
        pretrained_model_name_or_path=None, device_map={"": device}, dtype=dtype
    )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would report all of them as missing
    try:
        model._finalize_model_loading(model, settings, info)
    finally:
        transformers_logging.set_verbosity(verbosity)
    hold_experts(model, held)
    if away is not None:
        leave_host_experts(model, replace(away, tensors=tensors))


def _random_matrices(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Of all experts in host memory; each has the rows of the first one, shifted."""
    made = torch.empty(shape, dtype=dtype)
    prefer_huge_pages(made)
    drawn = torch.randn(shape[1:]).mul_(_STD).to(dtype)
    for expert in range(shape[0]):
        made[expert] = drawn.roll(expert, 0)
    return made


def _random_experts(
    form: ExpertsConfig, quant: QuantConfig, dtype: torch.dtype, device: torch.device
) -> QuantizedExpertWeights:
    kind, made = find_format(quant.weight_format), []
    # Writing to fresh memory is most of the time, and goes faster on several cores.
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        for rows, depth in (
            (form.up_size, form.hidden_size),
            (form.hidden_size, form.intermediate_size),
        ):
            weight = torch.randn((rows, depth), device=device) * _STD
            codes = quantize(weight, kind)
            matrix = empty_matrix(kind, form.num_experts, rows, depth, device=device)
            for field, tensor in matrix.tensors.items():
                # Rows of blocks cannot be shifted without their scales.
                rolls = kind.group[0] <= 1
                put = partial(_put_expert, tensor, getattr(codes, field), rolls)
                list(pool.map(put, range(form.num_experts)))
            made.append(matrix)
    return QuantizedExpertWeights(
        gate_up=made[0],
        down=made[1],
        activation_format=cast(ActivationFormat, quant.activation_format),
    )


def _put_expert(into: torch.Tensor, one: torch.Tensor, rolls: bool, expert: int) -> None:
    """The common codes as an expert's own, its rows shifted where they can be."""
    into[expert] = _shifted(one, expert) if rolls else one


def _shifted(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    as_bytes = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
    return as_bytes.roll(rows, 0).view(tensor.dtype)
