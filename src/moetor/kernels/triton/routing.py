"""Routing in one launch; the twin in torch operations is `moetor.kernels.routing.route`.

Shape letters: T tokens, K top_k, N logits (experts and identity experts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetor.config import RouterConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.routing import Routing
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import next_power_of_2

_MAX_LOGITS = 1024
_MAX_TOP_K = 64


def routing_refusal(config: RouterConfig, device: str, dtype: torch.dtype) -> str | None:
    """Why this kernel does not route logits of `dtype` on `device`, as half a sentence, or None."""
    if config.num_logits > _MAX_LOGITS:
        return f"routes among at most {_MAX_LOGITS} experts, not {config.num_logits}"
    if config.top_k > _MAX_TOP_K:
        return f"takes at most {_MAX_TOP_K} slots per token, not {config.top_k}"
    if config.score_precision != "float32":
        return "scores in float32, not in the dtype of the logits"
    if dtype not in support.DTYPES:
        return f"reads logits in bfloat16, float16 or float32, not {dtype}"
    return support.device_refusal(device)


def route(
    logits_TN: Tensor, config: RouterConfig, selection_bias: Tensor | None, dtype: torch.dtype
) -> Routing:
    """Routes each token, as `moetor.kernels.routing.route` does; no token sees another.

    Where scores are equal the smaller id wins.

    Raises:
        InputError: a tensor of the wrong shape or device.
        KernelRefusedError: this machine, or more experts than the kernel takes.
    """
    reason = routing_refusal(config, logits_TN.device.type, logits_TN.dtype)
    if reason is not None:
        raise KernelRefusedError(f"the Triton router {reason}; use moetor.kernels.routing.route")
    _check(logits_TN, config, selection_bias)
    return run_route(logits_TN, config, selection_bias, dtype)


def _check(logits_TN: Tensor, config: RouterConfig, selection_bias: Tensor | None) -> None:
    if logits_TN.dim() != 2 or logits_TN.shape[1] != config.num_logits:
        raise InputError(
            f"router logits have shape {list(logits_TN.shape)}, they must be "
            f"[T, {config.num_logits}]"
        )
    if selection_bias is None:
        return
    if tuple(selection_bias.shape) != (config.num_logits,):
        raise InputError(
            f"selection_bias has shape {list(selection_bias.shape)}, it must be "
            f"[{config.num_logits}]"
        )
    if selection_bias.device != logits_TN.device:
        raise InputError(
            f"selection_bias is on {selection_bias.device}, the logits are on {logits_TN.device}"
        )


def run_route(
    logits_TN: Tensor, config: RouterConfig, selection_bias: Tensor | None, dtype: torch.dtype
) -> Routing:
    """The launch, on inputs that are known to be right."""
    from moetor.kernels.triton import routing_kernels

    tokens, top_k = logits_TN.shape[0], config.top_k
    weights_TK = logits_TN.new_empty((tokens, top_k), dtype=torch.float32)
    ids_TK = logits_TN.new_empty((tokens, top_k), dtype=torch.int32)
    identity_T = None
    if config.num_zero_experts:
        identity_T = logits_TN.new_empty((tokens,), dtype=torch.float32)
    if tokens == 0:
        return Routing(weights_TK, ids_TK, identity_T)
    padded = next_power_of_2(config.num_logits)
    pdl = support.overlap(logits_TN)
    with support.on_device_of(logits_TN):
        routing_kernels.route_tokens[(tokens,)](
            logits_TN,
            support.flat(selection_bias, logits_TN),
            weights_TK,
            ids_TK,
            weights_TK if identity_T is None else identity_T,
            *logits_TN.stride(),
            N=config.num_logits,
            NP=padded,
            E=config.num_experts,
            K=top_k,
            KP=next_power_of_2(top_k),
            MULTIPLIER=float(config.logit_multiplier),
            SOFTCAP=None if config.logit_softcap is None else float(config.logit_softcap),
            SCORING=config.scoring,
            AFTER=config.score_order == "after_topk",
            HAS_BIAS=selection_bias is not None,
            GROUPS=config.num_groups,
            GP=next_power_of_2(config.num_groups),
            KEPT=config.top_k_groups,
            TOP2=config.group_score == "top2_sum",
            MASK_ZERO=config.group_mask == "zero",
            RENORMALIZE=config.renormalize,
            EPS=float(config.renormalize_eps),
            MIN=float(config.renormalize_min),
            FACTOR=float(config.scaling_factor),
            ROUND=_rounded(config, dtype),
            PDL=pdl,
            num_warps=1 if padded * next_power_of_2(config.num_groups) <= 1024 else 4,
            **support.chained(pdl),
        )
    return Routing(weights_TK, ids_TK, identity_T)


def _rounded(config: RouterConfig, dtype: torch.dtype) -> Any:
    """Triton's name of the dtype to which `weights_precision="model"` rounds, or None."""
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

    if config.weights_precision != "model":
        return None
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype)
