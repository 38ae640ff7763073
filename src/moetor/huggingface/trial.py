"""Running a replacement against what it replaces, on random input, before anything is changed.

Shape letters: T tokens, K top_k, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetor.errors import FusionMismatchError
from moetor.huggingface.any_size import call_original
from moetor.huggingface.block_plan import BlockPlan, Layout
from moetor.huggingface.experts_form import Unrecognised
from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.modules import FusedMoEBlock, gate_forward
from moetor.huggingface.router_form import KeptRouter
from moetor.huggingface.router_trial import random_token_ids
from moetor.kernels.base import ExpertWeights

# Tokens of a trial: enough that most experts of a usual model are met, few enough to be quick.
TRIAL_TOKENS = 32
# Tokens with which compositions are told apart where no proof was asked for.
FEW_TOKENS = 2
# Both are those of two sequences: some blocks count tokens in each.
_SEQUENCES = 2


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted deviation, relative to the largest output.

    float32: both sides sum thousands of products in another order, some 1e-7 each. Half precision:
        the original
    rounds the two products, the activation, the weighting and every one of its K additions to the
    dtype, so that a handful of half ulps of the largest term add up.
    """
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        return 1e-5
    return 6 * torch.finfo(dtype).eps


def relative_error(ours: Tensor, original: Tensor) -> float:
    """Largest absolute deviation over the largest absolute original value; NaN on one side alone
    is infinite.
    """
    if ours.shape != original.shape:
        return float("inf")
    a, b = ours.double(), original.double()
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = b[finite].abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(((a - b)[finite].abs().max() / scale).item())


def random_hidden(tokens: int, hidden_size: int, like: Tensor) -> Tensor:
    """Normal hidden states [2, T / 2, H] in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(tokens * hidden_size)
    shape = (_SEQUENCES, tokens // _SEQUENCES, hidden_size)
    drawn = torch.randn(shape, generator=generator)
    return drawn.to(device=like.device, dtype=like.dtype)


def try_block(
    plans: Iterable[BlockPlan], *, compare: bool
) -> tuple[FusedMoEBlock, float | None] | Unrecognised:
    """The fused block of the first plan that reproduces the original, and its error.

    Args:
        plans: compositions of one block.
        compare: False tries them on few tokens, only to tell compositions apart, takes the nearest
            one and gives no error.

    Raises:
        FusionMismatchError: no plan reproduces the original.
    """
    tokens = TRIAL_TOKENS if compare else FEW_TOKENS
    best: tuple[FusedMoEBlock, float] | None = None
    weights: ExpertWeights | None = None
    for plan in plans:
        if weights is None:
            weights = plan.experts_weights()  # the same for every composition, and packed once
        hidden = random_hidden(tokens, plan.config.hidden_size, weights.down)
        limit = tolerance(hidden.dtype)
        tried = _try_plan(plan, weights, hidden)
        if isinstance(tried, Unrecognised):
            return tried
        fused, error = tried
        if error <= limit:
            return fused, error if compare else None
        if best is None or error < best[1]:
            best = tried
    assert best is not None, "there is at least one composition"
    if not compare:
        return best[0], None
    raise FusionMismatchError(
        f"block {plan.path!r}: the fused block differs from the original by {best[1]:.2e} of its "
        f"largest output, {limit:.1e} is allowed; nothing was changed. Use level='experts' for "
        "this model"
    )


def _try_plan(
    plan: BlockPlan, weights: ExpertWeights, hidden: Tensor
) -> tuple[FusedMoEBlock, float] | Unrecognised:
    """The fused block of one plan, and its error on `hidden` [B, S, H]."""
    extra = _extra_inputs(plan, hidden)
    with torch.no_grad():
        answer = call_original(plan.block, lambda: plan.block(hidden.clone(), **extra))
    shaped = _returns(answer, hidden, plan)
    if isinstance(shaped, Unrecognised):
        return shaped
    fused = FusedMoEBlock(shaped, weights)
    with torch.no_grad(), gate_forward(fused):
        ours = fused(hidden, **extra)
    pairs = zip(_tensors(ours), _tensors(answer), strict=True)
    return fused, max(relative_error(a, b) for a, b in pairs)


def _returns(answer: Any, hidden: Tensor, plan: BlockPlan) -> BlockPlan | Unrecognised:
    """The plan with what the block returns, read off its answer to `hidden` [B, S, H]."""
    stranger = Unrecognised("its block returns something that no description covers")
    first, *rest = _tensors(answer)
    if not isinstance(first, Tensor) or first.numel() != hidden.numel() or len(rest) > 1:
        return stranger
    shapes: dict[torch.Size, Layout] = {
        hidden.shape: "same",
        hidden.flatten(0, 1).shape: "rows",
        torch.Size([hidden.numel()]): "flat",
    }
    layout = shapes.get(first.shape)
    if layout is None:
        return stranger
    plan = replace(plan, layout=layout)
    if not rest:
        return plan
    tokens, router = hidden.shape[:2].numel(), plan.config.router
    second = rest[0]
    if not isinstance(second, Tensor):
        return stranger
    if second.numel() == tokens * router.top_k:
        return replace(plan, returns="hidden_and_weights")
    if second.numel() == tokens * router.num_logits:
        return replace(plan, returns="hidden_and_logits")
    if isinstance(plan.router, KeptRouter) and plan.router.answers == 4:
        return replace(plan, returns="hidden_and_state")
    return stranger


def _tensors(answer: Any) -> tuple[Any, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def _extra_inputs(plan: BlockPlan, hidden: Tensor) -> dict[str, Tensor]:
    """Values for the block's arguments beside hidden states; a state from the block before stays
    out.
    """
    if "input_ids" not in plan.inputs:
        return {}
    ids = random_token_ids(plan.router_module, hidden.shape[:2].numel(), hidden.device)
    return {"input_ids": ids.reshape(hidden.shape[:2])}


def try_experts(
    original: nn.Module, fused: FusedExperts, path: str, *, compare: bool
) -> float | None:
    """The error of fused experts against the original, under random routing.

    Args:
        compare: False only shows, with few tokens, that both are called alike, and gives no error.

    Raises:
        FusionMismatchError: it exceeds the tolerance.
    """
    config = fused.routed_experts.config
    like = next(original.parameters())
    tokens = TRIAL_TOKENS if compare else FEW_TOKENS
    hidden_TH = random_hidden(tokens, config.hidden_size, like).flatten(0, 1)
    generator = torch.Generator().manual_seed(config.num_experts)
    scores = torch.rand((tokens, config.num_experts), generator=generator)
    weights_TK, ids_TK = scores.topk(fused.routed_experts.top_k, dim=-1)
    weights_TK = weights_TK.to(device=like.device, dtype=like.dtype)
    ids_TK = ids_TK.to(like.device)
    with torch.no_grad():
        expected = call_original(original, lambda: original(hidden_TH.clone(), ids_TK, weights_TK))
        ours = fused(hidden_TH, ids_TK, weights_TK)
    error, limit = relative_error(ours, expected), tolerance(like.dtype)
    if not compare and error < float("inf"):
        return None
    if error > limit:
        raise FusionMismatchError(
            f"experts {path!r}: the fused experts differ from the original by {error:.2e} of their "
            f"largest output, {limit:.1e} is allowed; nothing was changed"
        )
    return error
