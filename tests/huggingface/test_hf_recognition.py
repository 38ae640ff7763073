"""What is recognised in a model, and that every recognised option is one that the numbers need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tiny import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    FAMILIES,
    GPT_OSS,
    GRANITE,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN3,
    VARIANTS,
    Tiny,
    block_paths,
    bound,
    canonical,
    fused_blocks,
    logits_of,
    relative,
    some_hidden,
)
from torch import nn

import moetor
from moetor.config import RouterConfig
from moetor.errors import FusionMismatchError
from moetor.huggingface import block_form
from moetor.huggingface.router_form import RecognisedRouter
from moetor.layer.routing.router import Router

EXPERTS_OPTION = {
    "Mixtral": "num_local_experts",
    "Qwen2Moe": "num_experts",
    "Qwen3Moe": "num_local_experts",
    "Olmoe": "num_experts",
    "DeepseekV2": "n_routed_experts",
    "DeepseekV3": "n_routed_experts",
    "GptOss": "num_local_experts",
    "GraniteMoe": "num_local_experts",
}
families = pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
all_cases = pytest.mark.parametrize("tiny", [*FAMILIES, *VARIANTS], ids=lambda tiny: tiny.id)


def routers_of(model: nn.Module) -> list[RouterConfig]:
    return [block.config.router for block in fused_blocks(model)]


def expected_router(tiny: Tiny, **changes: Any) -> RouterConfig:
    assert tiny.router is not None
    return canonical(replace(tiny.router, **changes))


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_router_and_activation(tiny: Tiny, dtype: torch.dtype) -> None:
    model = tiny.build(dtype=dtype)
    moetor.fuse(model)
    assert {canonical(found) for found in routers_of(model)} == {expected_router(tiny)}
    assert {b.config.experts.activation for b in fused_blocks(model)} == {tiny.activation}


@all_cases
def test_gate_precision(tiny: Tiny) -> None:
    """DeepSeek's routers compute their logits in float32, the others in the model's dtype."""
    model = tiny.build(dtype=torch.bfloat16)
    moetor.fuse(model)
    precisions = {found.gate_precision for found in routers_of(model)}
    assert precisions == {"float32" if tiny.family.startswith("Deepseek") else "model"}


@families
@pytest.mark.parametrize("experts", [16, 40, 64, 128])
def test_number_of_experts(tiny: Tiny, experts: int) -> None:
    model = tiny.build(**{EXPERTS_OPTION[tiny.family]: experts}, num_hidden_layers=2)
    before = logits_of(model)
    moetor.fuse(model)
    wanted = expected_router(tiny, num_experts=experts)
    assert {canonical(found) for found in routers_of(model)} == {wanted}
    assert relative(logits_of(model), before) <= 1e-5


# 64 is also the number of tokens of a trial: values drawn alike would make the tokens gate rows.
@pytest.mark.parametrize("experts", [32, 64])
@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
def test_real_hidden_size(tiny: Tiny, experts: int, tmp_path: Any) -> None:
    """From the configuration alone, as `explain` reads it: wide hidden states, many experts."""
    config = tiny.config(hidden_size=2048, **{EXPERTS_OPTION[tiny.family]: experts}, head_dim=64)
    config.architectures = [tiny.model_class.__name__]
    config.save_pretrained(tmp_path)
    labels = {block.router for block in moetor.explain(str(tmp_path)).blocks}
    assert tiny.router is not None
    own = replace(tiny.router, num_experts=experts)
    # Softmax over the kept logits, or over all and renormalised, are one and the same.
    assert len(labels) == 1
    assert labels <= {Router(own).label, Router(canonical(own)).label}


@families
def test_zero_router_weights(tiny: Tiny) -> None:
    """As Transformers initialises many of them: recognised by a random copy, equal among ties."""
    model = tiny.build()
    with torch.no_grad():
        for path in block_paths(model, tiny):
            router = next(
                child
                for name, child in model.get_submodule(path).named_children()
                if name in ("gate", "router")
            )
            for tensor in (*router.parameters(), *router.buffers()):
                tensor.zero_()
    before = logits_of(model)
    moetor.fuse(model)
    assert {canonical(found) for found in routers_of(model)} == {expected_router(tiny)}
    assert relative(logits_of(model), before) <= 1e-5


@all_cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explain_from_the_configuration_says_what_fuse_does(
    tiny: Tiny, dtype: str, tmp_path: Any
) -> None:
    config = tiny.config()
    config.architectures = [tiny.model_class.__name__]
    config.save_pretrained(tmp_path)
    explained = moetor.explain(str(tmp_path), dtype=dtype)
    model = tiny.build(dtype=getattr(torch, dtype))
    fused = moetor.fuse(model)
    assert list(explained.blocks) == [replace(block, max_error=None) for block in fused.blocks]


def test_blocks_that_differ_are_each_recognised() -> None:
    """The answer for one block is only a hint for the next."""
    model = QWEN3.build(num_hidden_layers=3)
    model.model.layers[1].mlp.gate.norm_topk_prob = False
    model.model.layers[2].mlp.gate.top_k = 1
    before = logits_of(model)
    moetor.fuse(model)
    assert [(found.renormalize, found.top_k) for found in routers_of(model)] == [
        (True, 3),
        (False, 3),
        (True, 1),
    ]
    assert relative(logits_of(model), before) <= 1e-5


@pytest.mark.parametrize(
    ("hidden_act", "label"),
    [
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("silu", "silu"),
    ],
)
def test_activations(hidden_act: str, label: str) -> None:
    model = MIXTRAL.build(hidden_act=hidden_act)
    before = logits_of(model)
    moetor.fuse(model)
    assert {b.config.experts.activation.label for b in fused_blocks(model)} == {label}
    assert relative(logits_of(model), before) <= 1e-5


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "mish"])
def test_activation_without_a_name_here(hidden_act: str) -> None:
    """It is kept as a callable, by a kernel that can call it, and the report says why."""
    model = MIXTRAL.build(hidden_act=hidden_act)
    before = logits_of(model)
    report = moetor.fuse(model)
    assert [block.level for block in report.blocks] == ["block"] * 2
    assert report.kernels == ("torch",)
    assert any("activation" in refusal.reason for refusal in report.blocks[0].refusals)
    assert relative(logits_of(model), before) <= 1e-5


@dataclass(frozen=True)
class Mutation:
    """One option of what was recognised, set wrong.

    Attributes:
        router, activation, experts: fields to change in the respective configuration.
        recognised: fields of its `RouterNames`.
    """

    tiny: Tiny
    router: dict[str, Any] = field(default_factory=dict)
    recognised: dict[str, Any] = field(default_factory=dict)
    activation: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        changes = self.router | self.recognised | self.activation | self.experts
        return "-".join((self.tiny.id, *(f"{name}={value}" for name, value in changes.items())))

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        router, experts = block_form.recognise_router, block_form.recognise_experts

        def wrong_router(*args: Any, **kwargs: Any) -> Any:
            found = router(*args, **kwargs)
            assert isinstance(found, RecognisedRouter)
            config = replace(found.config, **self.router)
            names = replace(found.names, **self.recognised)
            return replace(found, config=config, names=names)

        def wrong_experts(module: nn.Module) -> Any:
            found = experts(module)
            activation = replace(found.activation, **self.activation)
            return replace(found, activation=activation, **self.experts)

        monkeypatch.setattr(block_form, "recognise_router", wrong_router)
        monkeypatch.setattr(block_form, "recognise_experts", wrong_experts)


NO_GROUPS = {"num_groups": 1, "top_k_groups": 1}
NO_BIAS = {"selection_bias": None}
MUTATIONS = (
    Mutation(MIXTRAL, router={"renormalize": False}),
    Mutation(MIXTRAL, router={"scoring": "sigmoid"}),
    Mutation(MIXTRAL, activation={"name": "gelu"}),
    Mutation(QWEN2, router={"renormalize": True}),
    Mutation(QWEN2, router={"top_k": 2}),
    Mutation(QWEN3, router={"renormalize": False}),
    Mutation(QWEN3, activation={"name": "relu"}),
    Mutation(OLMOE, router={"renormalize": True}),
    Mutation(OLMOE, router={"logit_multiplier": 1.1}),
    Mutation(DEEPSEEK_V2, router={"scaling_factor": 2.5}),
    Mutation(DEEPSEEK_V2, router=NO_GROUPS),
    Mutation(DEEPSEEK_V2, router={"group_score": "top2_sum"}),
    Mutation(DEEPSEEK_V2, router={"top_k_groups": 3}),
    Mutation(DEEPSEEK_V2, router={"renormalize": True}),
    Mutation(DEEPSEEK_V3, router={"scaling_factor": 2.4}),
    Mutation(DEEPSEEK_V3, router={"renormalize": False}),
    Mutation(DEEPSEEK_V3, router={"scoring": "sqrt_softplus"}),
    Mutation(DEEPSEEK_V3, router=NO_GROUPS),
    Mutation(DEEPSEEK_V3, router={"group_score": "max"}),
    Mutation(DEEPSEEK_V3, router={"selection_bias": False}, recognised=NO_BIAS),
    Mutation(GPT_OSS, recognised={"bias": None}),
    Mutation(GPT_OSS, activation={"alpha": 1.0}),
    Mutation(GPT_OSS, activation={"alpha": 1.6}),
    Mutation(GPT_OSS, activation={"limit": None}),
    Mutation(GPT_OSS, activation={"limit": 2.0}),
    Mutation(GPT_OSS, activation={"limit_place": "after"}),
    Mutation(GPT_OSS, activation={"up_shift": 0.0}),
    Mutation(GPT_OSS, experts={"interleaved": False}),
    Mutation(GRANITE, router={"renormalize": False, "score_order": "before_topk"}),
    Mutation(GRANITE, router={"scoring": "sigmoid"}),
    Mutation(GRANITE, activation={"name": "gelu_tanh"}),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_every_option_matters(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong option shows in the block's output, far above the tolerance, and is caught."""
    original = mutation.tiny.build()
    path = block_paths(original, mutation.tiny)[0]
    fused = copy.deepcopy(original)
    mutation.apply(monkeypatch)
    moetor.fuse(fused, level="block", verify=False)
    hidden = some_hidden(original.config.hidden_size, 64)
    with torch.no_grad():
        ours, theirs = fused.get_submodule(path)(hidden), original.get_submodule(path)(hidden)
    ours = ours[0] if isinstance(ours, tuple) else ours
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert relative(ours, theirs) > 100 * bound(torch.float32)
    with pytest.raises(FusionMismatchError, match=path):
        moetor.fuse(original, level="block")


def test_clamp_is_reached() -> None:
    """Otherwise the mutations of gpt-oss would prove nothing."""
    model = GPT_OSS.build()
    experts = model.model.layers[0].mlp.experts
    hidden = some_hidden(64, 64)[0]
    gate_up = torch.einsum("th,ehj->tej", hidden, experts.gate_up_proj.detach())
    beyond = (gate_up.abs() > 1.5).float().mean()
    assert 0.1 < float(beyond) < 0.9


def _scaled(model: Any) -> None:
    model.model.layers[0].mlp.gate.weight.data.mul_(1e-4)


def _dominated(model: Any) -> None:
    model.model.layers[0].mlp.gate.weight.data.mul_(100.0)


@pytest.mark.parametrize("change", [_scaled, _dominated])
@pytest.mark.parametrize("tiny", [MIXTRAL, QWEN2, DEEPSEEK_V2], ids=lambda tiny: tiny.id)
def test_trained_values_have_no_say_in_recognition(
    tiny: Tiny, change: Callable[[Any], None]
) -> None:
    """A router whose weights are nearly equal, or one of which wins everything."""
    model = tiny.build()
    change(model)
    before = logits_of(model)
    moetor.fuse(model)
    assert {canonical(found) for found in routers_of(model)} == {expected_router(tiny)}
    assert relative(logits_of(model), before) <= 1e-5
