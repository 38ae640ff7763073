"""What experts that are held apart do between their two products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetor.config import ExpertsConfig
from moetor.huggingface.bare import bare_copy
from moetor.huggingface.experts_form import (
    ACTIVATION_ATTRIBUTES,
    Unrecognised,
    find_activation,
)
from moetor.huggingface.split_experts import SplitExperts


class _Answer(nn.Module):
    """Stands for a linear module: answers with what it was given beforehand, or with its input."""

    def __init__(self, answer: Tensor | None) -> None:
        super().__init__()
        self.answer = answer
        self.weight = torch.zeros(())  # some experts cast to its dtype

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if self.answer is None else self.answer


def recognise_split(block: nn.Module, split: SplitExperts) -> ExpertsConfig | Unrecognised:
    """The form of the experts with their activation, or why they have none that we know."""
    stranger = split.is_whole(block)
    if stranger is not None:
        return stranger
    if any(
        "forward" in module.__dict__
        for child in split.children
        for module in block.get_submodule(child).modules()
    ):
        return Unrecognised("its experts' forward is wrapped by a hook (device map)")
    owner, function = _own_function(block, split)
    if function is None:
        return Unrecognised("its experts name no activation")
    activation = find_activation(owner, split.config, function)
    if activation is None:
        return Unrecognised("its activation matches none of the known ones")
    return replace(split.config, activation=activation)


def _own_function(
    block: nn.Module, split: SplitExperts
) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """What stands between the two products, as a function of [..., 2] (or [..., 1] ungated)."""
    form = split.form
    if "*" in form.down:
        expert = block.get_submodule(split.slots[0].path.rpartition(".")[0].rpartition(".")[0])
        leaf = {role: getattr(form, role).rpartition(".")[2] for role in ("gate", "up", "down")}
        return expert, lambda packed: _through_expert(expert, leaf, packed)
    parts: list[Any] = [block]
    parts += [m for child in split.children for m in block.get_submodule(child).modules()]
    for part in parts:
        for name in ACTIVATION_ATTRIBUTES:
            act = getattr(part, name, None)
            if callable(act):
                return part, lambda packed, act=act: act(packed[..., 0:1]) * packed[..., 1:2]
    # Aria writes silu out; the trial of the whole block decides whether that is so
    silu = torch.nn.functional.silu
    return block, lambda packed: silu(packed[..., 0:1]) * packed[..., 1:2]


def _through_expert(expert: nn.Module, leaf: dict[str, str], packed: Tensor) -> Tensor:
    """The expert's own forward with its products taken out."""
    twin = bare_copy(expert)
    gated = bool(leaf["gate"])
    if gated:
        twin._modules[leaf["gate"]] = _Answer(packed[..., 0:1])
    twin._modules[leaf["up"]] = _Answer(packed[..., 1:2] if gated else packed[..., 0:1])
    twin._modules[leaf["down"]] = _Answer(None)
    out: Tensor = twin(packed[..., 0:1])
    return out
