"""From router logits to weights and ids, in torch operations that compile.

Shape letters: T tokens, K top_k, E logits (experts and identity experts), G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.config import RouterConfig
from moetor.kernels.invariant import in_fixed_blocks


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        topk_weights: float32 [T, K].
        topk_ids: int32 [T, K]: logical expert ids; the id `num_experts` is a dropped slot and its
            weight is 0.
        identity_weights: float32 [T], the weight of the token itself, where identity experts were
            chosen.
        chosen_ids: int32 [T, K], the choice before identity experts became dropped slots; None
            where there are none.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    identity_weights: Tensor | None = None
    chosen_ids: Tensor | None = None


def _elementwise(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """A function of each element, with bits that do not depend on the other tokens.

    On the CPU torch computes the last elements of a tensor with other instructions, so that a
    token's score would depend on the number of tokens: chunks would show.
    """
    if logits.device.type != "cpu":
        return function(logits)
    return in_fixed_blocks(function, logits, logits.shape[-1])


def _score(logits: Tensor, config: RouterConfig) -> Tensor:
    match config.scoring:
        case "softmax":
            return torch.softmax(logits, dim=-1)
        case "sigmoid":
            return _elementwise(torch.sigmoid, logits)
        case "sqrt_softplus":
            return _elementwise(lambda x: torch.sqrt(F.softplus(x)), logits)


def adjust_logits(logits: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """The first steps of the formula: a factor, and c * tanh(logits / c)."""
    if multiplier != 1.0:
        logits = logits * multiplier
    if softcap is not None:
        logits = _elementwise(lambda x: softcap * torch.tanh(x / softcap), logits)
    return logits


def _limit_groups(choice_TE: Tensor, config: RouterConfig) -> Tensor:
    """Masks the experts outside the best `top_k_groups` groups (arXiv:2405.04434, section 2.2)."""
    choice_TGX: Tensor = choice_TE.unflatten(-1, (config.num_groups, -1))
    if config.group_score == "max":
        group_TG = choice_TGX.amax(dim=-1)
    else:
        group_TG = choice_TGX.topk(2, dim=-1).values.sum(dim=-1)
    kept = group_TG.topk(config.top_k_groups, dim=-1, sorted=False).indices
    allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(-1, kept, True)
    masked = 0.0 if config.group_mask == "zero" else float("-inf")
    return choice_TGX.masked_fill(~allowed_TG.unsqueeze(-1), masked).flatten(-2)


def split_identity(
    weights_TK: Tensor, ids_TK: Tensor, config: RouterConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turns the slots of identity experts into dropped ones and sums their weights per token."""
    if config.num_zero_experts == 0:
        return weights_TK, ids_TK, None
    identity_TK = ids_TK >= config.num_experts
    identity_T = torch.where(identity_TK, weights_TK, 0.0).sum(dim=-1)
    weights_TK = torch.where(identity_TK, 0.0, weights_TK)
    return weights_TK, ids_TK.clamp(max=config.num_experts), identity_T


def route(
    logits_TE: Tensor,
    config: RouterConfig,
    selection_bias: Tensor | None,
    dtype: torch.dtype,
    forced_ids: Tensor | None = None,
) -> Routing:
    """Routes each token by itself; the formula is that of `moetor.config.RouterConfig`.

    Args:
        logits_TE: [T, E], any floating dtype. Scores are computed in float32 (float64 for float64
            logits), or in the logits' dtype where the configuration says so.
        selection_bias: [E], added to the scores for the choice alone (`before_topk`), or to the
            logits (`after_topk`).
        dtype: of the hidden states, to which `weights_precision="model"` rounds.
        forced_ids: [T, K], used instead of the choice; the weights are still the formula's.
    """
    logits = logits_TE
    if config.score_precision == "float32" and logits.dtype != torch.float64:
        logits = logits.to(torch.float32)
    logits = adjust_logits(logits, config.logit_multiplier, config.logit_softcap)
    scores = logits if config.score_order == "after_topk" else _score(logits, config)
    if forced_ids is not None:
        ids = forced_ids.to(device=scores.device, dtype=torch.int64)
    else:
        choice = scores if selection_bias is None else scores + selection_bias
        if config.num_groups > 1:
            choice = _limit_groups(choice, config)
        ids = choice.topk(config.top_k, dim=-1).indices
    kept = scores.gather(-1, ids)
    weights = _score(kept, config) if config.score_order == "after_topk" else kept
    if config.renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        if config.renormalize_min:
            total = total.clamp(min=config.renormalize_min)
        weights = weights / (total + config.renormalize_eps if config.renormalize_eps else total)
    if config.scaling_factor != 1.0:
        weights = weights * config.scaling_factor
    if config.weights_precision == "model":
        weights = weights.to(dtype)
    ids = ids.to(torch.int32)
    weights, slots, identity = split_identity(weights.to(torch.float32), ids, config)
    return Routing(weights, slots, identity, ids if config.num_zero_experts else None)
