"""Configurations that contradict themselves are refused when they are made, and say what is
possible."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from moetor.config import (
    Activation,
    ExpertsConfig,
    MoEConfig,
    RouterConfig,
    RunnerConfig,
    SharedExpertsConfig,
)
from moetor.errors import ConfigError, MoetorError

ROUTER = {"num_experts": 8, "top_k": 2}
EXPERTS = {"num_experts": 8, "hidden_size": 16, "intermediate_size": 12}
MOE = {
    "hidden_size": 16,
    "router": RouterConfig(**ROUTER),
    "experts": ExpertsConfig(**EXPERTS),
}
MAKE: dict[str, Any] = {
    "router": lambda **fields: RouterConfig(**(ROUTER | fields)),
    "activation": Activation,
    "experts": lambda **fields: ExpertsConfig(**(EXPERTS | fields)),
    "shared": lambda **fields: SharedExpertsConfig(**({"intermediate_size": 4} | fields)),
    "runner": RunnerConfig,
    "moe": lambda **fields: MoEConfig(**(MOE | fields)),
}


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A configuration, the fields that spoil it, and words that the message must hold."""

    make: str
    words: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Readable name of the case."""
        parts = (f"{name}={value}" for name, value in self.fields.items())
        return re.sub(r"\(.*?\)", "", f"{self.make}-{'-'.join(parts)}")


def _refused(make: str, *words: str, **fields: Any) -> Refused:
    return Refused(make=make, words=words, fields=fields)


CASES = [
    *(
        _refused("router", f"{name}=0", "at least 1", **{name: 0})
        for name in ("num_experts", "top_k", "num_groups", "top_k_groups")
    ),
    _refused("router", "top_k=-1", "at least 1", top_k=-1),
    _refused("router", "scoring='tanh'", "softmax, sigmoid, sqrt_softplus", scoring="tanh"),
    _refused("router", "'sometimes'", "before_topk, after_topk", score_order="sometimes"),
    _refused("router", "group_score='sum'", "max, top2_sum", group_score="sum"),
    _refused("router", "group_mask='inf'", "zero, -inf", group_mask="inf"),
    _refused("router", "gate_precision='half'", "float32, model", gate_precision="half"),
    _refused("router", "weights_precision='half'", "float32, model", weights_precision="half"),
    _refused("router", "num_zero_experts=-1", "not be negative", num_zero_experts=-1),
    _refused("router", "top_k=9", "8 experts", "lower top_k", top_k=9),
    _refused("router", "top_k=11", "10 experts", top_k=11, num_zero_experts=2),
    _refused("router", "logit_softcap=0", "positive", "None turns it off", logit_softcap=0.0),
    _refused("router", "logit_softcap=-1", "positive", logit_softcap=-1.0),
    _refused("router", "logit_softcap=nan", "positive", logit_softcap=float("nan")),
    _refused("router", "renormalize_eps", "not be negative", renormalize_eps=-1e-9),
    _refused("router", "renormalize_min", "not be negative", renormalize_min=-1e-9),
    _refused("router", "top_k_groups=2", "num_groups=1", top_k_groups=2),
    _refused("router", "8 experts", "do not divide", "num_groups=3", num_groups=3),
    _refused("router", "9 experts", "do not divide", num_groups=2, num_zero_experts=1),
    _refused("router", "top_k_groups=5", "num_groups=4", num_groups=4, top_k_groups=5),
    _refused("router", "score_order='before_topk'", num_groups=2, score_order="after_topk"),
    _refused(
        "router", "at least two experts", num_groups=8, top_k_groups=4, group_score="top2_sum"
    ),
    _refused("router", "top_k=5", "4 experts", "top_k_groups=1", num_groups=2, top_k=5),
    _refused("activation", "name='mish'", "silu, gelu, gelu_tanh, relu, relu2", name="mish"),
    _refused("activation", "limit_place='under'", "before, after", limit_place="under"),
    _refused("activation", "alpha=1.7", "silu alone", "gelu", alpha=1.7, name="gelu"),
    _refused("activation", "softcap", "silu alone", "relu", softcap=1.0, name="relu"),
    _refused("activation", "limit=0", "positive", "None turns it off", limit=0.0),
    _refused("activation", "limit=-2", "positive", limit=-2.0),
    _refused("activation", "softcap=0", "positive", "None turns it off", softcap=0.0),
    *(
        _refused("experts", f"{name}=0", "at least 1", **{name: 0})
        for name in ("num_experts", "hidden_size", "intermediate_size")
    ),
    _refused("experts", "interleaved=True", "gated=True", interleaved=True, gated=False),
    _refused("experts", "up_shift", "gated=True", gated=False, activation=Activation(up_shift=1.0)),
    _refused("experts", "softcap", "gated=True", gated=False, activation=Activation(softcap=1.0)),
    _refused("experts", "post_norm_eps=0", "positive", post_norm_eps=0.0),
    _refused("experts", "post_norm_eps=-1", "positive", post_norm_eps=-1.0),
    _refused("shared", "intermediate_size=0", "at least 1", intermediate_size=0),
    _refused("shared", "combine='max'", "sum, mean", combine="max"),
    _refused(
        "shared",
        "order='first'",
        "no_overlap, internal_overlapped, multi_stream_overlapped",
        order="first",
    ),
    _refused("runner", "name='fast'", "default, chunked", name="fast"),
    _refused("runner", "workspace_bytes=0", "at least 1", workspace_bytes=0),
    _refused("runner", "hidden_multiple=0", "at least 1", hidden_multiple=0),
    _refused("moe", "hidden_size=0", "at least 1", hidden_size=0),
    _refused("moe", "among 4 experts", "there are 8", router=RouterConfig(num_experts=4, top_k=2)),
    _refused("moe", "experts.hidden_size=16", "hidden_size=32", hidden_size=32),
    _refused("moe", "experts.hidden_size=16", "latent_size=8", latent_size=8),
    _refused(
        "moe",
        "identity experts",
        "weight_on_input=True",
        router=RouterConfig(**ROUTER, num_zero_experts=2),
        experts=ExpertsConfig(**EXPERTS, weight_on_input=True),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_refused_with_what_is_possible(case: Refused) -> None:
    with pytest.raises(ConfigError) as caught:
        MAKE[case.make](**case.fields)
    for word in case.words:
        assert word in str(caught.value)
    owner = {"moe": "MoEConfig", "shared": "SharedExpertsConfig"}
    assert str(caught.value).startswith(owner.get(case.make, case.make.capitalize()))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MoetorError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", MAKE)
def test_accepted_frozen_and_keyword_only(make: str) -> None:
    config = MAKE[make]()
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        type(config)(getattr(config, name))
    assert config == MAKE[make]()
    assert hash(config) == hash(MAKE[make]())


@pytest.mark.parametrize(
    ("fields", "up_size", "gate_up", "down"),
    [
        ({}, 24, (8, 24, 16), (8, 16, 12)),
        ({"gated": False}, 12, (8, 12, 16), (8, 16, 12)),
        ({"transposed": True}, 24, (8, 16, 24), (8, 12, 16)),
        ({"interleaved": True}, 24, (8, 24, 16), (8, 16, 12)),
    ],
)
def test_shapes_of_a_form(
    fields: dict[str, Any], up_size: int, gate_up: tuple[int, ...], down: tuple[int, ...]
) -> None:
    config = MAKE["experts"](**fields)
    assert config.up_size == up_size
    assert config.gate_up_shape == gate_up
    assert config.down_shape == down
    assert config.params_per_expert == (up_size + 12) * 16


def test_the_width_of_the_logits_counts_identity_experts() -> None:
    assert MAKE["router"](num_zero_experts=3).num_logits == 11
    assert MAKE["router"](num_zero_experts=3, top_k=11).top_k == 11


def test_with_runner_changes_the_runner_alone() -> None:
    config = MAKE["moe"](runner=RunnerConfig(kernel="torch"))
    changed = config.with_runner(name="chunked", workspace_bytes=7)
    assert changed.runner == RunnerConfig(name="chunked", workspace_bytes=7, kernel="torch")
    assert dataclasses.replace(changed, runner=config.runner) == config
    assert config.runner.name == "default"


@pytest.mark.parametrize(
    ("activation", "label"),
    [
        (Activation(), "silu"),
        (Activation(alpha=1.702, limit=7.0, up_shift=1.0), "silu alpha=1.702 limit=7 before up+1"),
        (Activation(limit=2.5, limit_place="after"), "silu limit=2.5 after"),
        (Activation(softcap=3.0), "silu softcap=3"),
        (Activation(name="gelu", function=abs), "abs"),
    ],
)
def test_an_activation_names_itself(activation: Activation, label: str) -> None:
    assert activation.label == label
