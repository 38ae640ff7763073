"""Every option of a router and every awkward size, and logits whose choices are clear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import oracle
from moetor.config import RouterConfig

# Selections closer than this are not judged: float32 scores may order them either way.
MARGIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class RoutingCase:
    """A router; `bias` is the mean of its selection bias."""

    id: str
    config: RouterConfig
    bias: float = 0.0
    tokens: int = 9
    scale: float = 2.0


def _case(
    id: str, *, bias: float = 0.0, tokens: int = 9, scale: float = 2.0, **fields: Any
) -> RoutingCase:
    config = RouterConfig(**({"num_experts": 8, "top_k": 3} | fields))
    return RoutingCase(id=id, config=config, bias=bias, tokens=tokens, scale=scale)


GROUPS = {"num_experts": 12, "num_groups": 4, "top_k_groups": 2}
CASES = [
    _case("softmax"),
    _case("sigmoid", scoring="sigmoid"),
    _case("sqrt_softplus", scoring="sqrt_softplus"),
    _case("softmax_after", score_order="after_topk"),
    _case("sigmoid_after", scoring="sigmoid", score_order="after_topk"),
    _case("sqrt_softplus_after", scoring="sqrt_softplus", score_order="after_topk"),
    _case("bias", scoring="sigmoid", selection_bias=True),
    _case("bias_softmax", selection_bias=True),
    _case("bias_after", score_order="after_topk", selection_bias=True),
    _case("groups_max_inf", **GROUPS, group_mask="-inf"),
    _case("groups_max_zero", **GROUPS),
    _case(
        "groups_top2_inf",
        **GROUPS,
        scoring="sigmoid",
        group_score="top2_sum",
        group_mask="-inf",
        tokens=30,
    ),
    _case(
        "groups_top2_zero_bias",
        **GROUPS,
        scoring="sigmoid",
        group_score="top2_sum",
        selection_bias=True,
        bias=2.0,
    ),
    _case(
        "groups_negative_inf",
        **GROUPS,
        scoring="sigmoid",
        group_mask="-inf",
        selection_bias=True,
        bias=-3.0,
    ),
    _case("groups_all_kept", num_experts=12, num_groups=4, top_k_groups=4),
    _case(
        "groups_with_identity",
        num_experts=10,
        num_zero_experts=2,
        num_groups=4,
        top_k_groups=2,
        group_mask="-inf",
    ),
    _case("renormalize", renormalize=True),
    _case("renormalize_eps", scoring="sigmoid", renormalize=True, renormalize_eps=0.3),
    _case("renormalize_min", scoring="sigmoid", renormalize=True, renormalize_min=2.5),
    _case("renormalize_min_not_reached", scoring="sigmoid", renormalize=True, renormalize_min=1e-3),
    _case("renormalize_after", scoring="sigmoid", score_order="after_topk", renormalize=True),
    _case("scaling", scaling_factor=2.5),
    _case("renormalize_scaling", renormalize=True, scaling_factor=16.0),
    _case("multiplier", logit_multiplier=0.25),
    _case("softcap", logit_softcap=1.5),
    _case("multiplier_softcap", logit_multiplier=3.0, logit_softcap=2.0),
    _case("identity", num_experts=6, num_zero_experts=4),
    _case(
        "identity_bias", num_experts=6, num_zero_experts=4, selection_bias=True, scaling_factor=6.0
    ),
    _case("identity_renormalized", num_experts=4, num_zero_experts=6, renormalize=True, top_k=5),
    _case("model_weights", weights_precision="model", renormalize=True),
    _case("model_weights_identity", weights_precision="model", num_experts=5, num_zero_experts=3),
    _case(
        "deepseek_v3",
        num_experts=16,
        top_k=4,
        num_groups=4,
        top_k_groups=2,
        scoring="sigmoid",
        group_score="top2_sum",
        selection_bias=True,
        bias=3.0,
        renormalize=True,
        renormalize_eps=1e-20,
        scaling_factor=2.5,
    ),
    _case("no_token", tokens=0),
    _case(
        "no_token_everything",
        tokens=0,
        num_experts=10,
        num_zero_experts=2,
        num_groups=4,
        top_k_groups=2,
        selection_bias=True,
        renormalize=True,
    ),
    _case("one_token", tokens=1),
    _case("top_1", top_k=1),
    _case("top_k_is_all", top_k=8, renormalize=True),
    _case("top_k_is_all_after", top_k=8, score_order="after_topk"),
    _case("one_expert", num_experts=1, top_k=1),
    _case("one_expert_per_group", num_experts=5, num_groups=5, top_k_groups=3),
    _case("huge_logits", scale=80.0),
    _case("huge_logits_sigmoid", scale=30.0, scoring="sigmoid", top_k=2),
    _case("huge_logits_sqrt_softplus", scale=80.0, scoring="sqrt_softplus"),
]


def draw(
    case: RoutingCase, dtype: torch.dtype, rng: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Logits whose every choice is clear, and a bias."""
    config = case.config
    width = config.num_experts + config.num_zero_experts
    bias = torch.randn(width, generator=rng) + case.bias if config.selection_bias else None
    rows: list[Tensor] = []
    for _ in range(10_000):
        if len(rows) == case.tokens:
            break
        row = (case.scale * torch.randn(1, width, generator=rng)).to(dtype)
        if oracle.route(row, config, bias, dtype).margin[0] > MARGIN:
            rows.append(row)
    assert len(rows) == case.tokens
    return (torch.cat(rows) if rows else torch.empty(0, width, dtype=dtype)), bias
