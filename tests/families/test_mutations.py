"""No option is decorative: for each option that a family's blocks were recognised to have, another
value makes the comparison with the original fail.

The mutated layer computes with the family's own weights on the trial's own input, so that this is
what `fuse` would have seen, had it recognised the wrong value. Rounding options are left out, which
make no difference in float32, and an epsilon of 1e-20.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import moetor
from moetor.config import ExpertsConfig, RouterConfig
from moetor.errors import UnsupportedError
from moetor.huggingface.modules import FusedMoEBlock, fused_modules
from moetor.huggingface.trial import random_hidden, relative_error, tolerance
from moetor.layer.routing.router import Router
from moetor.tools.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="forms of a newer Transformers"
)
# Blocks that take more than hidden states; their parts are those of families that do not.
MORE_INPUTS = ("deepseek_v4", "zaya")


@dataclass(frozen=True)
class Mutation:
    option: str
    part: str
    config: Any


def router_mutations(config: RouterConfig) -> Iterator[Mutation]:
    def mutated(option: str, **changes: Any) -> Mutation:
        return Mutation(option, "router", replace(config, **changes))

    scoring = "softmax" if config.scoring != "softmax" else "sigmoid"
    yield mutated("scoring", scoring=scoring)
    # after and before top-k are the same where each expert is scored by itself
    if config.scoring == "softmax" and config.num_groups == 1 and not config.renormalize:
        other = "after_topk" if config.score_order == "before_topk" else "before_topk"
        yield mutated("score_order", score_order=other)
    if config.top_k > 1 and (config.scoring != "softmax" or config.score_order == "before_topk"):
        yield mutated("renormalize", renormalize=not config.renormalize)
    if config.renormalize_min:
        yield mutated("renormalize_min", renormalize_min=5.0)
    yield mutated("scaling_factor", scaling_factor=config.scaling_factor * 1.01)
    if config.num_groups > 1:
        yield mutated("groups", num_groups=1, top_k_groups=1)
        yield mutated("top_k_groups", top_k_groups=config.num_groups)
        other = "max" if config.group_score == "top2_sum" else "top2_sum"
        yield mutated("group_score", group_score=other)
    if config.logit_multiplier != 1.0:
        yield mutated("logit_multiplier", logit_multiplier=1.0)
    if config.logit_softcap is not None:
        yield mutated("logit_softcap", logit_softcap=None)


def experts_mutations(config: ExpertsConfig) -> Iterator[Mutation]:
    def mutated(option: str, **changes: Any) -> Mutation:
        return Mutation(option, "experts", replace(config, **changes))

    def activation(option: str, **changes: Any) -> Mutation:
        changed = replace(config.activation, **changes)
        return mutated(f"activation.{option}", activation=changed)

    act = config.activation
    if act.softcap is None and act.alpha == 1.0 and act.function is None:
        yield activation("name", name="relu" if act.name != "relu" else "silu")
    if act.alpha != 1.0:
        yield activation("alpha", alpha=1.0)
    if act.limit is not None:
        yield activation("limit", limit=None)
        if act.softcap is None:
            other = "after" if act.limit_place == "before" else "before"
            yield activation("limit_place", limit_place=other)
    if act.up_shift:
        yield activation("up_shift", up_shift=0.0)
    if act.softcap is not None:
        yield activation("softcap", softcap=act.softcap * 2)
    if act.up_softcap is not None:
        yield activation("up_softcap", up_softcap=None)
    if config.gated:
        yield mutated("interleaved", interleaved=not config.interleaved)
    if config.post_norm_eps is not None:
        yield mutated("post_norm_eps", post_norm_eps=1.0)
    if config.gated or act.name != "relu":  # relu(w * x) is w * relu(x) for every weight w
        yield mutated("weight_on_input", weight_on_input=not config.weight_on_input)


def shared_mutations(block: FusedMoEBlock) -> Iterator[Mutation]:
    if block.shared is None or block.children_names.final:  # a norm takes a factor of 1/2 away
        return
    config = block.shared.config
    other = "sum" if config.combine == "mean" else "mean"
    yield Mutation("shared.combine", "shared", replace(config, combine=other))


def mutations(block: FusedMoEBlock) -> Iterator[Mutation]:
    if isinstance(block.token_router, Router):
        yield from router_mutations(block.token_router.config)
        if block.selection_bias is not None:
            yield Mutation("selection_bias", "bias", None)
    yield from experts_mutations(block.routed_experts.config)
    yield from shared_mutations(block)


def run(block: FusedMoEBlock) -> torch.Tensor:
    size = block.config.hidden_size
    hidden = random_hidden(32, size, torch.empty(0))
    with torch.no_grad():
        answer = block(hidden)
    out: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
    return out.reshape(hidden.shape)


def mutate(block: FusedMoEBlock, mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation.part == "router":
        monkeypatch.setattr(block, "token_router", Router(mutation.config))
    elif mutation.part == "experts":
        monkeypatch.setattr(block.routed_experts, "config", mutation.config)
    elif mutation.part == "shared":
        monkeypatch.setattr(block.shared, "config", mutation.config)
    else:
        monkeypatch.setattr(FusedMoEBlock, "selection_bias", None)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MORE_INPUTS])
def test_every_option_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        model = tiny_model(name)
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    moetor.fuse(model)
    kinds = {
        (type(module.__dict__["_original"]), module.config): module
        for _, module in fused_modules(model)
        if isinstance(module, FusedMoEBlock)
    }
    idle = []
    for block in kinds.values():
        expected = run(block)
        for mutation in mutations(block):
            with monkeypatch.context() as patch:
                mutate(block, mutation, patch)
                if relative_error(run(block), expected) <= 10 * tolerance(torch.float32):
                    idle.append(mutation.option)
        assert torch.equal(run(block), expected)
    assert not idle
