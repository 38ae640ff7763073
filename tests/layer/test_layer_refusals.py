"""What a layer refuses when it is made or called, and what survives copying and conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer.expert_cases import draw_tensors
from layer.layer_cases import (
    DEEPSEEK_V3,
    GPT_OSS,
    IDENTITY,
    PLAIN_SHARED,
    build,
    draw_input,
    draw_layer,
    make_config,
)
from moetor.config import SharedExpertsConfig
from moetor.errors import ConfigError, InputError, KernelRefusedError, UnsupportedError
from moetor.kernels.base import ExpertWeights
from moetor.layer import ChildNames, MoELayer
from moetor.layer.parts import LayerParts


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Fields of the configuration, parts that contradict it, words of the refusal."""

    id: str
    words: str
    fields: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] = ConfigError


CASES = [
    Refused(
        id="gate_without_internal_gate",
        fields={"internal_gate": False},
        parts={"gate": nn.Linear(12, 6)},
        words="a gate was given to a layer with internal_gate=False",
    ),
    Refused(
        id="shared_without_config",
        parts={"shared": nn.Linear(12, 12)},
        words="configured without them",
    ),
    Refused(
        id="shared_gate_without_config",
        fields={"shared": PLAIN_SHARED},
        parts={"shared_gate": nn.Linear(12, 1)},
        words="shared.sigmoid_gate is False",
    ),
    Refused(
        id="input_projection_without_latent",
        parts={"input_transform": nn.Linear(12, 5)},
        words="without latent_size",
    ),
    Refused(
        id="output_projection_without_latent",
        parts={"output_transform": nn.Linear(5, 12)},
        words="without latent_size",
    ),
    Refused(
        id="reduction_without_group",
        fields={"runner": {"reduce_results": True}},
        words="reduce_results=True needs a process_group",
    ),
    Refused(
        id="padded_post_norm",
        fields={"hidden_size": 13, "experts": {"post_norm_eps": 1e-5},
                "runner": {"hidden_multiple": 8}},
        words="post-expert norm cannot run on a padded hidden size",
    ),
    Refused(
        id="unknown_quantization",
        fields={"quantization": "runes"},
        words=r"quantization='runes' is not known here; possible: None, fp8, ",
    ),
    Refused(
        id="unknown_kernel",
        fields={"runner": {"kernel": "warp"}},
        words=r"unknown kernel 'warp'; the kernels are auto, ",
        error=KernelRefusedError,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_refused_when_made(case: Refused) -> None:
    with pytest.raises(case.error, match=case.words):
        MoELayer(make_config(**case.fields), parts=LayerParts(**case.parts))


@pytest.mark.parametrize("name", ["gate_up", "down", "gate_up_bias", "down_bias", "post_norm"])
def test_expert_weights_of_a_wrong_shape_are_refused(name: str, rng: torch.Generator) -> None:
    config = make_config(experts={"has_bias": True, "post_norm_eps": 1e-5})
    tensors = draw_tensors(config.experts, torch.float32, rng)._asdict()
    shape = tuple(tensors[name].shape)
    for wrong in (tensors[name][..., 1:], tensors[name].unsqueeze(0), None):
        weights = ExpertWeights(**(tensors | {name: wrong}))
        with pytest.raises(ConfigError) as caught:
            MoELayer(config, parts=LayerParts(experts=weights))
        assert f"{name} has shape" in str(caught.value)
        assert f"needs {shape}" in str(caught.value)


def test_a_bias_that_the_form_does_not_have_is_refused(rng: torch.Generator) -> None:
    tensors = draw_tensors(make_config(experts=GPT_OSS).experts, torch.float32, rng)
    weights = ExpertWeights(**tensors._asdict())
    config = make_config(experts=GPT_OSS | {"has_bias": False})
    with pytest.raises(ConfigError, match=r"gate_up_bias has shape .* needs None"):
        MoELayer(config, parts=LayerParts(experts=weights))


@pytest.mark.parametrize("shape", [(3, 11), (3, 13), (12, 3), (1,)])
def test_a_wrong_width_is_refused(shape: tuple[int, ...]) -> None:
    layer = MoELayer(make_config()).eval()
    with pytest.raises(InputError) as caught:
        layer(torch.randn(shape))
    assert f"{layer.name!r} takes hidden states [..., 12], not {shape}" in str(caught.value)


def test_training_with_gradients_is_refused(rng: torch.Generator) -> None:
    config = make_config(shared=PLAIN_SHARED)
    layer = build(config, draw_layer(config, torch.float32, rng), name="block 2")
    given = draw_input(layer, 3, rng)
    wanted = layer(given.hidden)
    layer.train()
    with pytest.raises(UnsupportedError, match=r"'block 2' is for inference.*model.eval\(\)"):
        layer(given.hidden)
    with torch.no_grad():
        assert torch.equal(layer(given.hidden), wanted)
    with torch.inference_mode():
        assert torch.equal(layer(given.hidden), wanted)


@pytest.mark.parametrize(
    "fields",
    [{}, {"latent_size": 5}, {"shared": PLAIN_SHARED}, {"internal_gate": False}],
    ids=["plain", "latent", "shared", "external"],
)
def test_no_wrong_gradients(fields: dict[str, Any], rng: torch.Generator) -> None:
    """In eval mode the layer runs with gradients enabled, and gives none rather than a part."""
    config = make_config(**fields)
    layer = build(config, draw_layer(config, torch.float32, rng))
    given = draw_input(layer, 3, rng)
    out = layer(given.hidden.clone().requires_grad_(), given.logits)
    if out.requires_grad:
        with pytest.raises((NotImplementedError, RuntimeError)):
            out.sum().backward()


# --- parameters ----------------------------------------------------------------------------------

FULL = {
    "router": DEEPSEEK_V3,
    "shared": SharedExpertsConfig(intermediate_size=7, sigmoid_gate=True),
    "latent_size": 5,
    "experts": {"has_bias": True},
    "gate_bias": True,
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": FULL,
    "external": {"router": DEEPSEEK_V3, "internal_gate": False},
    "ungated": {"experts": {"gated": False, "post_norm_eps": 1e-5}},
    "identity": {"router": IDENTITY},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_dict_brings_everything_over(name: str, rng: torch.Generator) -> None:
    config = make_config(**LAYERS[name])
    layer = build(config, draw_layer(config, torch.float32, rng))
    other = MoELayer(config).eval()
    given = draw_input(layer, 5, rng)
    before = other(given.hidden, given.logits)
    other.load_state_dict(layer.state_dict())
    after = other(given.hidden, given.logits)
    assert torch.equal(after, layer(given.hidden, given.logits))
    assert not torch.equal(before, after)


def test_the_names_are_those_of_transformers(rng: torch.Generator) -> None:
    layer = MoELayer(make_config(**FULL))
    assert set(layer.state_dict()) == {
        "gate.weight", "gate.bias", "gate.selection_bias",
        "experts.gate_up_proj", "experts.gate_up_proj_bias",
        "experts.down_proj", "experts.down_proj_bias",
        "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight",
        "shared_experts.down_proj.weight", "shared_expert_gate.weight",
        "routed_input_transform.weight", "routed_output_transform.weight",
    }  # fmt: skip
    ungated = MoELayer(make_config(**LAYERS["ungated"]))
    assert set(ungated.state_dict()) == {
        "gate.weight", "experts.up_proj", "experts.down_proj", "experts.post_norm",
    }  # fmt: skip


def test_parts_go_by_the_names_that_were_asked_for(rng: torch.Generator) -> None:
    names = ChildNames(
        gate="router",
        experts="feed",
        shared="common",
        shared_gate="common_gate",
        input_transform="down",
        output_transform="up",
    )
    config = make_config(**FULL)
    tensors = draw_layer(config, torch.float32, rng)
    plain = build(config, tensors)
    renamed = MoELayer(config, names=names).eval()
    own = {
        "gate": "router", "experts": "feed", "shared_experts": "common",
        "shared_expert_gate": "common_gate", "routed_input_transform": "down",
        "routed_output_transform": "up",
    }  # fmt: skip
    state = {}
    for key, value in plain.state_dict().items():
        first, rest = key.split(".", 1)
        state[f"{own[first]}.{rest}"] = value
    renamed.load_state_dict(state)
    given = draw_input(plain, 4, rng)
    assert torch.equal(renamed(given.hidden), plain(given.hidden))


def test_given_weights_are_held_without_a_copy(rng: torch.Generator) -> None:
    config = make_config()
    tensors = draw_tensors(config.experts, torch.float32, rng)
    up, down = nn.Parameter(tensors.gate_up, requires_grad=False), tensors.down
    gate = nn.Linear(12, 6, bias=False)
    parts = LayerParts(experts=ExpertWeights(gate_up=up, down=down), gate=gate)
    layer = MoELayer(config, parts=parts)
    assert layer.routed_experts.get_parameter("gate_up_proj") is up
    assert layer.routed_experts.down_proj.data_ptr() == down.data_ptr()
    assert layer.gate_module is gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["plain", "full", "identity"])
def test_to_another_dtype(name: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """A converted layer is the layer that would have been built from converted weights."""
    config = make_config(**LAYERS[name])
    tensors = draw_layer(config, torch.float32, rng)
    converted = build(config, tensors).to(dtype)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    experts = type(tensors.experts)(*map(cast, tensors.experts))
    built = build(config, type(tensors)(experts, tensors.state))
    if converted.selection_bias is not None and built.selection_bias is not None:
        built.selection_bias.copy_(converted.selection_bias)  # a buffer of its own precision
    given = draw_input(built, 5, rng)
    out = converted(given.hidden)
    assert out.dtype == dtype
    assert torch.equal(out, built(given.hidden))


def test_new_weights_are_drawn_and_not_zero() -> None:
    layer = MoELayer(make_config(**FULL), dtype=torch.bfloat16)
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if "bias" not in name:
            assert parameter.abs().mean() > 0.01
            assert parameter.abs().mean() < 2
    assert repr(layer.routed_experts) == (
        "Experts(8 experts, hidden_size=5, intermediate_size=10, silu)"
    )
