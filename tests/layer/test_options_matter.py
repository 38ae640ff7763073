"""No option is decorative: putting one back to its default changes the result.

Each entry names a case that other tests compare with the oracle. If an implementation ignored the
option, it would compute what the oracle computes without it, and that comparison would fail.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from layer import routing_cases
from layer.expert_cases import FORMS, Drawn, ExpertsCase, draw
from moetor.config import Activation, ExpertsConfig, RouterConfig
from moetor.errors import ConfigError
from moetor.kernels.base import ExpertWeights
from moetor.kernels.reference import ReferenceKernel
from oracle import tolerance

ROUTERS = {case.id: case for case in routing_cases.CASES}
EXPERTS = {case.id: case for case in FORMS}


@dataclass(frozen=True)
class Reset:
    """One field of one case, and what it is put back to."""

    case: str
    field: str
    fields: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.case}-{self.field}"


def _default(config: type, field: str) -> Any:
    return next(found.default for found in dataclasses.fields(config) if found.name == field)


def _router(case: str, field: str, **fields: Any) -> Reset:
    return Reset(case, field, fields or {field: _default(RouterConfig, field)})


def _experts(case: str, field: str, **fields: Any) -> Reset:
    return Reset(case, field, fields or {field: _default(ExpertsConfig, field)})


def _activation(case: str, field: str) -> Reset:
    return Reset(case, f"activation.{field}", {field: _default(Activation, field)})


ROUTER_RESETS = [
    _router("top_1", "top_k", top_k=2),
    _router("sigmoid", "scoring"),
    _router("sqrt_softplus", "scoring"),
    _router("sqrt_softplus_after", "scoring"),
    _router("softmax_after", "score_order"),
    _router("renormalize", "renormalize"),
    _router("renormalize_eps", "renormalize_eps"),
    _router("renormalize_min", "renormalize_min"),
    _router("scaling", "scaling_factor"),
    _router("groups_max_inf", "num_groups", num_groups=1, top_k_groups=1),
    _router("groups_max_inf", "top_k_groups"),
    _router("groups_top2_inf", "group_score"),
    _router("groups_negative_inf", "group_mask"),
    _router("bias", "selection_bias"),
    _router("bias_after", "selection_bias"),
    _router("multiplier", "logit_multiplier"),
    _router("softcap", "logit_softcap"),
    _router("identity", "num_zero_experts", num_zero_experts=0, num_experts=10),
    _router("model_weights", "weights_precision"),
]
EXPERT_RESETS = [
    _experts("interleaved", "interleaved"),
    _experts("transposed_square", "transposed"),
    _experts("bias", "has_bias"),
    _experts("post_norm", "post_norm_eps"),
    _experts("post_norm_large_eps", "post_norm_eps", post_norm_eps=1e-5),
    _experts("post_norm_scale_first", "post_norm_order"),
    _experts("weight_on_input", "weight_on_input"),
    *(_activation(case, "name") for case in ("gelu", "gelu_tanh", "relu", "relu2")),
    _activation("alpha", "alpha"),
    _activation("limit_before", "limit"),
    _activation("limit_after", "limit"),
    _activation("limit_after", "limit_place"),
    _activation("ungated_limit_before", "limit"),
    _activation("ungated_limit_after", "limit_place"),
    _activation("up_shift", "up_shift"),
    _activation("softcap", "softcap"),
    _activation("two_softcaps", "up_softcap"),
    _activation("function", "function"),
]

# Fields that set a shape: another value does not fit the same tensors.
SIZES = {"num_experts", "hidden_size", "intermediate_size", "gated", "activation"}


def test_every_field_is_covered() -> None:
    router = {field.name for field in dataclasses.fields(RouterConfig)}
    # The gate's precision is a matter of the gate: see the last test. That of the scores shows in
    # half precision alone: see the routing tests.
    assert {reset.field for reset in ROUTER_RESETS} == router - SIZES - {
        "gate_precision",
        "score_precision",
    }
    experts = {field.name for field in dataclasses.fields(ExpertsConfig)} - SIZES
    activation = {f"activation.{field.name}" for field in dataclasses.fields(Activation)}
    assert {reset.field for reset in EXPERT_RESETS} == experts | activation


def _routed(logits: Tensor, config: RouterConfig, bias: Tensor | None) -> Tensor:
    """Weights of the experts, zero where there are none, then the token's own."""
    dense = oracle.route(logits, config, bias, logits.dtype).dense(config.num_logits)
    own = dense[:, config.num_experts :].sum(dim=1, keepdim=True)
    dense[:, config.num_experts :] = 0
    return torch.cat((dense, own), dim=1)


@pytest.mark.parametrize("reset", ROUTER_RESETS, ids=lambda reset: reset.id)
def test_router_options_matter(reset: Reset, rng: torch.Generator) -> None:
    case = replace(ROUTERS[reset.case], tokens=30)
    changed = replace(case.config, **reset.fields)
    assert changed != case.config
    logits, bias = routing_cases.draw(case, torch.bfloat16, rng)
    before = _routed(logits, case.config, bias)
    after = _routed(logits, changed, bias if changed.selection_bias else None)
    assert (before - after).abs().max() > 1e-4 * before.abs().max()


@pytest.mark.parametrize("reset", EXPERT_RESETS, ids=lambda reset: reset.id)
def test_expert_options_matter(reset: Reset, rng: torch.Generator) -> None:
    case = EXPERTS[reset.case]
    if reset.field.startswith("activation."):
        changed = replace(case.config, activation=replace(case.config.activation, **reset.fields))
    else:
        changed = replace(case.config, **reset.fields)
    assert changed != case.config
    drawn = draw(case, torch.float32, rng)
    before = drawn.expected(case.config)
    after = _fitting(drawn, changed).expected(changed)
    difference = (before.value - after.value).abs()
    assert (difference > 3 * tolerance(before, torch.float32)).any()


def _fitting(drawn: Drawn, config: ExpertsConfig) -> Drawn:
    """The same tensors, without those that the form does not have."""
    tensors = drawn.tensors
    if not config.has_bias:
        tensors = tensors._replace(gate_up_bias=None, down_bias=None)
    if config.post_norm_eps is None:
        tensors = tensors._replace(post_norm=None)
    return replace(drawn, tensors=tensors)


def test_the_precision_of_the_gate_matters(rng: torch.Generator) -> None:
    config = RouterConfig(num_experts=8, top_k=2, gate_precision="float32")
    hidden = torch.randn(6, 16, generator=rng).bfloat16()
    weight = torch.randn(8, 16, generator=rng).bfloat16()
    exact = oracle.gate(hidden, weight, None, config)
    rounded = oracle.gate(hidden, weight, None, replace(config, gate_precision="model"))
    assert (exact - rounded).abs().max() > 1e-4 * exact.abs().max()


@dataclass(frozen=True)
class Together:
    """Two options of an activation at once."""

    id: str
    fields: dict[str, Any]


@pytest.mark.parametrize(
    "together",
    [
        Together("softcap_alpha", {"softcap": 0.8, "alpha": 1.7}),
        Together("softcap_up_shift", {"softcap": 0.8, "up_shift": 1.0}),
        Together("softcap_limit_after", {"softcap": 0.8, "limit": 0.2, "limit_place": "after"}),
        Together("softcap_function", {"softcap": 0.8, "function": torch.tanh}),
        Together("function_alpha", {"function": torch.tanh, "alpha": 1.7}),
    ],
    ids=lambda together: together.id,
)
def test_options_are_combined_or_refused(together: Together, rng: torch.Generator) -> None:
    try:
        activation = Activation(**together.fields)
    except ConfigError:
        return
    assert "function" not in together.fields, "a function has no use for the other options"
    config = ExpertsConfig(num_experts=2, hidden_size=6, intermediate_size=5, activation=activation)
    case = ExpertsCase(id=together.id, config=config, scale=3.0)
    drawn = draw(case, torch.float32, rng)
    out = ReferenceKernel()(
        drawn.hidden,
        drawn.topk_weights,
        drawn.topk_ids,
        ExpertWeights(**drawn.tensors._asdict()),
        config,
    )
    oracle.assert_close(out, drawn.expected(config))
