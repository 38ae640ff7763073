"""Every form of routed experts, every awkward routing, and random inputs for them.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moetor.config import Activation, ExpertsConfig
from oracle import Estimate, Tensors, experts

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def softsign(x: Tensor) -> Tensor:
    """A function that no kernel knows."""
    return x / (1 + x.abs())


@dataclass(frozen=True, kw_only=True)
class ExpertsCase:
    """A form, and who goes where.

    Attributes:
        routing: `random`, or the edge case that it is made to be.
        scale: of the hidden states: clamps and caps need large ones.
    """

    id: str
    config: ExpertsConfig
    tokens: int = 5
    top_k: int = 2
    scale: float = 1.0
    routing: Literal[
        "random",
        "all_on_one",
        "one_unused",
        "same_twice",
        "some_dropped",
        "token_dropped",
        "all_dropped",
    ] = "random"


def _form(id: str, *, scale: float = 1.0, **fields: Any) -> ExpertsCase:
    config = {"num_experts": 4, "hidden_size": 12, "intermediate_size": 10} | fields
    return ExpertsCase(id=id, config=ExpertsConfig(**config), scale=scale)


FORMS = [
    _form("silu"),
    _form("gelu", activation=Activation(name="gelu")),
    _form("gelu_tanh", activation=Activation(name="gelu_tanh")),
    _form("relu", activation=Activation(name="relu")),
    _form("relu2", activation=Activation(name="relu2")),
    _form("alpha", activation=Activation(alpha=1.702)),
    _form("limit_before", scale=3.0, activation=Activation(limit=0.7)),
    _form("limit_after", scale=3.0, activation=Activation(limit=0.4, limit_place="after")),
    _form("up_shift", activation=Activation(up_shift=1.0)),
    _form("alpha_and_shift", activation=Activation(alpha=0.6, up_shift=-0.5)),
    _form("softcap", scale=3.0, activation=Activation(softcap=0.8)),
    _form("two_softcaps", scale=3.0, activation=Activation(softcap=0.8, up_softcap=1.7)),
    _form("function", activation=Activation(function=softsign)),
    _form("interleaved", interleaved=True),
    _form("transposed", transposed=True),
    # Square, so that no shape tells the axes apart.
    _form("transposed_square", transposed=True, gated=False, intermediate_size=12),
    _form("bias", has_bias=True),
    _form("ungated", gated=False, activation=Activation(name="relu2")),
    _form("ungated_bias_transposed", gated=False, has_bias=True, transposed=True),
    _form("ungated_limit_before", gated=False, scale=3.0, activation=Activation(limit=0.7)),
    _form(
        "ungated_limit_after",
        gated=False,
        scale=3.0,
        activation=Activation(name="relu2", limit=0.4, limit_place="after"),
    ),
    _form("ungated_function", gated=False, activation=Activation(function=softsign)),
    _form("post_norm", post_norm_eps=1e-5),
    _form("post_norm_large_eps", post_norm_eps=0.5, has_bias=True),
    _form("post_norm_scale_first", post_norm_eps=1e-3, post_norm_order="scale_first"),
    _form("weight_on_input", weight_on_input=True),
    _form("weight_on_input_bias", weight_on_input=True, has_bias=True),
    _form(
        "gpt_oss",
        scale=3.0,
        interleaved=True,
        transposed=True,
        has_bias=True,
        activation=Activation(alpha=1.702, limit=1.5, up_shift=1.0),
    ),
]


def _edge(
    id: str, *, tokens: int = 5, top_k: int = 2, routing: Any = "random", **fields: Any
) -> ExpertsCase:
    config = {"num_experts": 4, "hidden_size": 12, "intermediate_size": 10} | fields
    return ExpertsCase(
        id=id, config=ExpertsConfig(**config), tokens=tokens, top_k=top_k, routing=routing
    )


EDGES = [
    _edge("no_token", tokens=0),
    _edge("no_token_bias", tokens=0, has_bias=True, gated=False),
    _edge("one_token", tokens=1),
    _edge("top_1", top_k=1),
    _edge("top_k_is_all", top_k=4),
    _edge("one_expert", num_experts=1, top_k=1),
    _edge(
        "one_of_everything", num_experts=1, top_k=1, tokens=1, hidden_size=1, intermediate_size=1
    ),
    _edge("odd_sizes", hidden_size=13, intermediate_size=7),
    _edge(
        "odd_sizes_transposed",
        hidden_size=7,
        intermediate_size=13,
        transposed=True,
        interleaved=True,
    ),
    _edge("more_rows_than_a_block", tokens=40, num_experts=2, hidden_size=6, intermediate_size=5),
    _edge("all_tokens_on_one_expert", routing="all_on_one", top_k=1),
    _edge("expert_without_token", routing="one_unused"),
    _edge("expert_twice_in_a_token", routing="same_twice", has_bias=True),
    _edge("some_slots_dropped", routing="some_dropped", has_bias=True),
    _edge("all_slots_of_a_token_dropped", routing="token_dropped", has_bias=True),
    _edge("all_slots_dropped", routing="all_dropped", has_bias=True),
    _edge("dropped_weight_on_input", routing="some_dropped", weight_on_input=True, has_bias=True),
]


@dataclass(frozen=True)
class Drawn:
    """One case's inputs."""

    hidden: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    tensors: Tensors

    def expected(self, config: ExpertsConfig) -> Estimate:
        """What the oracle makes of them. A dropped slot is left out, whatever its weight."""
        ids, weights = self.topk_ids.tolist(), self.topk_weights.double().tolist()
        kept = [[place for place, e in enumerate(row) if e != config.num_experts] for row in ids]
        return experts(
            self.hidden,
            [[row[place] for place in places] for row, places in zip(weights, kept, strict=True)],
            [[row[place] for place in places] for row, places in zip(ids, kept, strict=True)],
            self.tensors,
            config,
        )


def draw_tensors(config: ExpertsConfig, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    """Random weights, nothing zero, sized so that outputs are of the order of one."""

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=rng, dtype=torch.float64) * fan_in**-0.5).to(dtype)

    e, h, i, j = config.num_experts, config.hidden_size, config.intermediate_size, config.up_size
    return Tensors(
        gate_up=normal(*((e, h, j) if config.transposed else (e, j, h)), fan_in=h),
        down=normal(*((e, i, h) if config.transposed else (e, h, i)), fan_in=i),
        gate_up_bias=normal(e, j) if config.has_bias else None,
        down_bias=normal(e, h) if config.has_bias else None,
        post_norm=None if config.post_norm_eps is None else 1 + normal(h),
    )


def _draw_ids(case: ExpertsCase, rng: torch.Generator) -> Tensor:
    tokens, top_k, count = case.tokens, case.top_k, case.config.num_experts
    if tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int32)
    ids = torch.stack([torch.randperm(count, generator=rng)[:top_k] for _ in range(tokens)])
    match case.routing:
        case "all_on_one":
            ids[:] = int(torch.randint(count, (), generator=rng))
        case "one_unused":
            unused = int(torch.randint(count, (), generator=rng))
            others = torch.tensor([e for e in range(count) if e != unused])
            places = torch.stack(
                [torch.randperm(count - 1, generator=rng)[:top_k] for _ in range(tokens)]
            )
            ids = others[places]
        case "same_twice":
            ids[:, 1] = ids[:, 0]
        case "some_dropped":
            ids[::2, 0] = count
            ids[1, top_k - 1] = count
        case "token_dropped":
            ids[tokens // 2] = count
        case "all_dropped":
            ids[:] = count
    return ids.to(torch.int32)


def draw(case: ExpertsCase, dtype: torch.dtype, rng: torch.Generator) -> Drawn:
    """Fresh inputs for `case`."""
    config = case.config
    hidden = case.scale * torch.randn(case.tokens, config.hidden_size, generator=rng)
    ids = _draw_ids(case, rng)
    weights = torch.rand(case.tokens, case.top_k, generator=rng) + 0.2
    weights = torch.where(ids == config.num_experts, 0.0, weights)
    return Drawn(hidden.to(dtype), weights, ids, draw_tensors(config, dtype, rng))
