"""Quantised experts for fused modules: made from the originals, which are released, or loaded.

Shape letters: T tokens, K top_k, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetor.errors import FusionError, InputError, MoetorError
from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.modules import FusedMoEBlock
from moetor.huggingface.trial import TRIAL_TOKENS, random_hidden
from moetor.kernels.formats import QuantizedExpertWeights
from moetor.kernels.routing import Routing
from moetor.layer.experts import POST_NORM_NAME, Experts
from moetor.layer.quantized_experts import QuantizedExperts, method_for
from moetor.quant_config import QuantConfig
from moetor.quantization.method import ModularMethod, make_method
from moetor.quantization.sink import deinterleaved, quantize_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedBlock:
    """What became of one block's experts.

    Attributes:
        name: of the quantisation.
        kernel: that runs them now.
        error: Frobenius norm of the routed output's deviation from the unquantised experts', over
            that of their output, on normal hidden states and a random routing; None for experts
            that were loaded quantised.
        bytes_before, bytes_after: of the two products' weights.
    """

    name: str
    kernel: str
    error: float | None
    bytes_before: int
    bytes_after: int


def check_quantizable(module: FusedMoEBlock | FusedExperts, path: str, quant: QuantConfig) -> None:
    """Refuses what `quantize_module` could not do, before anything is changed.

    Raises:
        KernelRefusedError: the requested kernel does not read the format.
        FusionError: weights that are not finite, or no method but the plain one.
    """
    experts = module.routed_experts
    if not isinstance(experts.method, ModularMethod):
        raise FusionError(f"block {path!r} uses quant method {experts.method.name!r}")
    method = _method(experts, quant)
    method.choice(method.stored_form(experts.config), experts.top_k, experts.device, experts.dtype)
    for name, tensor in (("gate_up", experts.weights.gate_up), ("down", experts.weights.down)):
        for expert, weight in enumerate(tensor):
            if not bool(torch.isfinite(weight).all()):
                raise FusionError(
                    f"block {path!r}: {name} of expert {expert} holds NaN or infinity and cannot "
                    "be quantised; nothing was changed"
                )


def quantize_module(
    module: FusedMoEBlock | FusedExperts, path: str, quant: QuantConfig
) -> QuantizedBlock:
    """Replaces a fused module's experts by quantised ones and releases the originals.

    Raises:
        FusionError: it failed; this block is as it was.
    """
    experts = module.routed_experts
    weights = experts.weights
    hidden_TH, routing = _sample(experts)
    try:
        quantized = QuantizedExperts(
            experts.config,
            _method(experts, quant),
            experts.top_k,
            weights=quantize_experts(weights, experts.config, quant),
            dtype=experts.dtype,
        )
    except (MoetorError, RuntimeError) as error:
        raise FusionError(f"the experts of block {path!r} cannot be quantised: {error}") from error
    norm = experts._modules.get(POST_NORM_NAME)
    if norm is not None:
        quantized.adopt_post_norm(norm, experts.post_norm_offset)
    with torch.no_grad():
        before, after = (one.run(hidden_TH, routing).double() for one in (experts, quantized))
    size = before.norm().clamp(min=torch.finfo(torch.float32).tiny)
    report = QuantizedBlock(
        name=quantized.method.name,
        kernel=quantized.kernel_name,
        error=float((after - before).norm() / size),
        bytes_before=weights.gate_up.nbytes + weights.down.nbytes,
        bytes_after=quantized.quantized_weights.nbytes,
    )
    module.take_quantized(quantized)
    return report


def attach_quantized(
    module: FusedMoEBlock | FusedExperts, held: QuantizedExpertWeights
) -> QuantizedBlock:
    """Gives a fused module, whose own weights are random ones, those that were loaded for it.

    Args:
        held: without biases and norm, which the module has.

    Raises:
        KernelRefusedError: the requested kernel does not read the format.
    """
    experts, config = module.routed_experts, module.routed_experts.config
    old, plain = experts.method, experts.weights
    bias = plain.gate_up_bias
    weights = replace(
        held,
        gate_up_bias=None if bias is None else deinterleaved(bias.T, config).T.contiguous(),
        down_bias=plain.down_bias,
        post_norm=plain.post_norm,
    )
    method = method_for(weights, old.requested_kernel, batch_invariant=old.batch_invariant)
    quantized = QuantizedExperts(
        config, method, experts.top_k, weights=weights, dtype=experts.dtype
    )
    norm = experts._modules.get(POST_NORM_NAME)
    if norm is not None:
        quantized.adopt_post_norm(norm, experts.post_norm_offset)
    kernel = quantized.kernel_name
    module.take_quantized(quantized)
    return QuantizedBlock(
        name=method.name,
        kernel=kernel,
        error=None,
        bytes_before=config.num_experts * config.params_per_expert * experts.dtype.itemsize,
        bytes_after=held.nbytes,
    )


def _method(experts: Experts, quant: QuantConfig) -> ModularMethod:
    old = experts.method
    method = make_method(quant, old.requested_kernel, batch_invariant=old.batch_invariant)
    assert isinstance(method, ModularMethod), "every quantisation is modular"
    return method


def _sample(experts: Experts) -> tuple[Tensor, Routing]:
    """Normal hidden states and a random routing to as many experts as a token has."""
    config, like = experts.config, experts.down_proj
    hidden_TH = random_hidden(TRIAL_TOKENS, config.hidden_size, like).flatten(0, 1)
    generator = torch.Generator().manual_seed(config.num_experts)
    scores = torch.rand((TRIAL_TOKENS, config.num_experts), generator=generator)
    weights_TK, ids_TK = scores.softmax(dim=-1).topk(experts.top_k, dim=-1)
    return hidden_TH, Routing(weights_TK.to(like.device), ids_TK.to(like.device, torch.int32))


class RefuseToSave:
    """In the place of a quantised model's `save_pretrained`, whose tensors no checkpoint format
    describes.
    """

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Raises:
        InputError: always.
        """
        raise InputError(
            "this model's experts were quantised in memory, which save_pretrained cannot write; "
            "`moetor quantize MODEL OUT --format ...` writes a quantised checkpoint"
        )
