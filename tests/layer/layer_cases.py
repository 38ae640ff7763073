"""Whole layers: a table with every option, random weights for them, and what the oracle makes of
them.

Shape letters: T tokens, H hidden, E experts (N with identity experts), I intermediate, X latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import oracle
from layer.expert_cases import draw_tensors
from moetor.config import (
    Activation,
    ExpertsConfig,
    MoEConfig,
    RouterConfig,
    RunnerConfig,
    SharedExpertsConfig,
)
from moetor.kernels.base import ExpertWeights
from moetor.layer import MoELayer
from moetor.layer.parts import LayerParts
from oracle import Estimate, OracleRouting, Tensors

# Selections closer than this are not judged: float32 scores may order them either way.
MARGIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """A layer and the scale of its input."""

    id: str
    config: MoEConfig
    scale: float = 1.0


def make_config(
    *,
    router: dict[str, Any] | None = None,
    experts: dict[str, Any] | None = None,
    shared: SharedExpertsConfig | None = None,
    runner: dict[str, Any] | None = None,
    hidden_size: int = 12,
    latent_size: int | None = None,
    **fields: Any,
) -> MoEConfig:
    """A small layer of six experts; the torch kernel, where `runner` does not say otherwise."""
    routing = {"num_experts": 6, "top_k": 2} | (router or {})
    sizes = {
        "num_experts": routing["num_experts"],
        "hidden_size": latent_size or hidden_size,
        "intermediate_size": 10,
    }
    return MoEConfig(
        hidden_size=hidden_size,
        router=RouterConfig(**routing),
        experts=ExpertsConfig(**(sizes | (experts or {}))),
        shared=shared,
        runner=RunnerConfig(**({"kernel": "torch"} | (runner or {}))),
        latent_size=latent_size,
        **fields,
    )


def _case(id: str, *, scale: float = 1.0, **fields: Any) -> LayerCase:
    return LayerCase(id=id, config=make_config(**fields), scale=scale)


DEEPSEEK_V3 = {
    "num_experts": 8,
    "top_k": 3,
    "scoring": "sigmoid",
    "num_groups": 4,
    "top_k_groups": 2,
    "group_score": "top2_sum",
    "selection_bias": True,
    "renormalize": True,
    "renormalize_eps": 1e-20,
    "scaling_factor": 2.5,
    "gate_precision": "float32",
}
GPT_OSS = {
    "interleaved": True,
    "transposed": True,
    "has_bias": True,
    "activation": Activation(alpha=1.702, limit=1.5, up_shift=1.0),
}
IDENTITY = {"num_zero_experts": 4, "selection_bias": True, "scaling_factor": 2.0, "top_k": 3}
PLAIN_SHARED = SharedExpertsConfig(intermediate_size=7)

CASES = [
    _case("mixtral", router={"renormalize": True}),
    _case(
        "qwen2_moe",
        router={"weights_precision": "model"},
        shared=SharedExpertsConfig(intermediate_size=9, sigmoid_gate=True),
    ),
    _case(
        "deepseek_v2",
        router={"num_experts": 8, "num_groups": 4, "top_k_groups": 2, "scaling_factor": 16.0},
        shared=PLAIN_SHARED,
    ),
    _case("deepseek_v3", router=DEEPSEEK_V3, shared=PLAIN_SHARED),
    _case(
        "gpt_oss",
        scale=3.0,
        router={"score_order": "after_topk"},
        experts=GPT_OSS,
        gate_bias=True,
    ),
    _case("granitemoe", router={"score_order": "after_topk", "logit_multiplier": 0.5}),
    _case("longcat", router=IDENTITY),
    _case(
        "llama4",
        router={"scoring": "sigmoid", "top_k": 1},
        experts={"weight_on_input": True, "transposed": True},
        shared=PLAIN_SHARED,
    ),
    _case("mean", shared=SharedExpertsConfig(intermediate_size=7, combine="mean")),
    _case(
        "float32_add",
        router={"gate_precision": "float32"},
        shared=SharedExpertsConfig(intermediate_size=7, add_in_float32=True),
    ),
    _case(
        "shared_activation",
        scale=3.0,
        shared=SharedExpertsConfig(
            intermediate_size=7, activation=Activation(alpha=1.702, limit=0.8, up_shift=1.0)
        ),
    ),
    _case("latent", latent_size=5),
    _case(
        "latent_shared",
        latent_size=16,
        shared=SharedExpertsConfig(intermediate_size=7, sigmoid_gate=True, combine="mean"),
    ),
    _case("latent_identity", latent_size=8, router=IDENTITY, shared=PLAIN_SHARED),
    _case("padded", hidden_size=13, runner={"hidden_multiple": 8}),
    _case(
        "padded_everything",
        hidden_size=13,
        router=IDENTITY,
        experts=GPT_OSS,
        shared=PLAIN_SHARED,
        runner={"hidden_multiple": 16},
    ),
    _case("padded_latent", latent_size=5, shared=PLAIN_SHARED, runner={"hidden_multiple": 4}),
    _case("external_logits", internal_gate=False),
    _case("external_logits_bias", internal_gate=False, router=DEEPSEEK_V3, shared=PLAIN_SHARED),
    _case(
        "chunked",
        router=IDENTITY,
        shared=PLAIN_SHARED,
        runner={"name": "chunked", "workspace_bytes": 3000},
    ),
    _case("monolithic", router=DEEPSEEK_V3, quantization="unquantized_monolithic"),
    _case(
        "monolithic_chunked",
        quantization="unquantized_monolithic",
        shared=PLAIN_SHARED,
        runner={"name": "chunked", "workspace_bytes": 1},
    ),
    _case("ungated_post_norm", experts={"gated": False, "post_norm_eps": 1e-5}),
    _case("batch_invariant", runner={"batch_invariant": True}),
    _case("reference", shared=PLAIN_SHARED, runner={"kernel": "reference"}),
    _case("odd", hidden_size=7, experts={"intermediate_size": 5}, shared=PLAIN_SHARED),
    _case("top_k_is_all", router={"top_k": 6}),
    _case("one_expert", router={"num_experts": 1, "top_k": 1}),
]


@dataclass(frozen=True)
class LayerTensors:
    """Every weight of a layer."""

    experts: Tensors
    state: dict[str, Tensor]


def draw_layer(config: MoEConfig, dtype: torch.dtype, rng: torch.Generator) -> LayerTensors:
    """Random weights, nothing zero, under the names of the layer's state dict."""

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=rng) * shape[-1] ** -0.5).to(dtype)

    h, x, n = config.hidden_size, config.latent_size, config.router.num_logits
    state: dict[str, Tensor] = {}
    if config.internal_gate:
        state["gate.weight"] = normal(n, h) * 1.5
        if config.gate_bias:
            state["gate.bias"] = normal(n)
    if config.router.selection_bias:
        name = "gate.selection_bias" if config.internal_gate else "_selection_bias"
        state[name] = 0.3 * torch.randn(n, generator=rng)
    if config.shared is not None:
        size = config.shared.intermediate_size
        state["shared_experts.gate_proj.weight"] = normal(size, h)
        state["shared_experts.up_proj.weight"] = normal(size, h)
        state["shared_experts.down_proj.weight"] = normal(h, size)
        if config.shared.sigmoid_gate:
            state["shared_expert_gate.weight"] = normal(1, h)
    if x is not None:
        state["routed_input_transform.weight"] = normal(x, h)
        state["routed_output_transform.weight"] = normal(h, x)
    return LayerTensors(draw_tensors(config.experts, dtype, rng), state)


def build(config: MoEConfig, tensors: LayerTensors, **options: Any) -> MoELayer:
    """The layer with these weights, for inference."""
    parts = LayerParts(experts=ExpertWeights(**tensors.experts._asdict()))
    layer = MoELayer(config, parts=parts, dtype=tensors.experts.down.dtype, **options).eval()
    answer = layer.load_state_dict(tensors.state, strict=False)
    assert not answer.unexpected_keys
    assert all(key.startswith("experts.") for key in answer.missing_keys)
    return layer


def expected(
    config: MoEConfig, tensors: LayerTensors, hidden_TH: Tensor, routing: OracleRouting
) -> Estimate:
    """The layer's output for a routing, by the oracle."""
    state, inner_TX = tensors.state, hidden_TH.double()
    if config.latent_size is not None:
        inner_TX = inner_TX @ state["routed_input_transform.weight"].double().T
    out = oracle.experts(inner_TX, routing.weights, routing.ids, tensors.experts, config.experts)
    if config.latent_size is not None:
        out = oracle.product(out, state["routed_output_transform.weight"])
    if config.shared is None:
        return out
    gate_up = ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight")
    gate = state.get("shared_expert_gate.weight")
    shared = oracle.shared_experts(
        hidden_TH,
        torch.cat([state[name] for name in gate_up]),
        state["shared_experts.down_proj.weight"],
        None if gate is None else gate[0],
        config.shared,
    )
    return oracle.add(out, shared, mean=config.shared.combine == "mean")


@dataclass(frozen=True)
class Input:
    """What a layer is called with, and where its tokens go."""

    hidden: Tensor
    logits: Tensor | None
    routing: OracleRouting


def draw_input(layer: MoELayer, tokens: int, rng: torch.Generator, *, scale: float = 1.0) -> Input:
    """Hidden states [T, H] (and logits, for a layer without a gate) whose choices are clear."""
    config, dtype = layer.config, layer.routed_experts.dtype

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        hidden = (scale * torch.randn(rows, config.hidden_size, generator=rng)).to(dtype)
        return hidden, (2 * torch.randn(rows, config.router.num_logits, generator=rng)).to(dtype)

    hidden, drawn = draw(tokens)
    for _ in range(1000):
        logits = None if config.internal_gate else drawn
        judged = layer.logits(hidden, logits)
        assert judged is not None
        routing = oracle.route(judged, config.router, layer.selection_bias, dtype)
        unclear = [row for row, margin in enumerate(routing.margin) if margin <= MARGIN]
        if not unclear:
            return Input(hidden, logits, routing)
        hidden, drawn = hidden.clone(), drawn.clone()
        hidden[unclear], drawn[unclear] = draw(len(unclear))
    raise AssertionError("no clear choice in 1000 attempts")
