"""Attention and dense layers over ranks, by the plan that Transformers has for the model.

A plan names modules and parameters with `*` for layer numbers, and a style for each. Transformers
applies it while it loads; here it is applied to a live model, whose whole tensors each rank slices
for itself. MoE blocks that Moetor spreads are left out of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moetor.errors import ConfigError, UnsupportedError
from moetor.parallel.groups import ParallelGroups

# Styles that act on experts, which Moetor spreads itself or leaves whole.
EXPERTS_STYLES = ("moe_tp_experts", "moe_identity_expert", "ep_dispatch_experts", "grouped_gemm")
# Products whose columns are attention heads, which a rank must have whole.
HEAD_COUNTS = {
    "q_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
    "v_proj": "num_key_value_heads",
    "q_b_proj": "num_attention_heads",
    "kv_b_proj": "num_attention_heads",
}


# Attention that its family's plan does not split rightly: class of the module, reason.
WHOLE_ATTENTION = {
    "DogeAttention": "its mask is made from the values of all heads",
    "DiffusionGemmaEncoderTextAttention": "the decoder, which the plan does not split, reads it",
    "DiffusionGemmaDecoderTextAttention": "the encoder, whose keys it reads, is not split",
}


_GROUPS = "_moetor_parallel_groups"
_SPLIT = "_moetor_split_modules"


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A module or parameter and its style."""

    name: str
    style: str


@dataclass(frozen=True, slots=True)
class SplitModule:
    """A module to which an entry of the plan was applied.

    Attributes:
        before: the forward that the module had of its own before, where it had one.
        after: the same afterwards; most styles wrap it.
    """

    name: str
    style: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class DensePlan:
    """What is split, and the kinds of modules that the plan names and that stay whole, with the
    reason.
    """

    entries: list[PlanEntry]
    left: dict[str, str]


def mark_spread(model: Any, groups: ParallelGroups, split: list[SplitModule]) -> None:
    """Notes on a model over which ranks it lies, and what `apply_plan` did."""
    model.__dict__[_GROUPS] = groups
    model.__dict__[_SPLIT] = split


def spread_over(model: Any) -> ParallelGroups | None:
    """The ranks that a model has been spread over; None for a whole one."""
    groups: ParallelGroups | None = model.__dict__.get(_GROUPS)
    return groups


def split_modules(model: Any) -> list[SplitModule]:
    """The modules that Transformers' plan has split, in the plan's order; none of a whole model."""
    split: list[SplitModule] = model.__dict__.get(_SPLIT, [])
    return split


def expand_plan(model: Any, left_out: Collection[str], mesh: DeviceMesh) -> DensePlan:
    """The entries of the model's tensor-parallel plan with layer numbers in place of `*`, a
    module's parameters before the module.

    Args:
        left_out: paths of modules whose entries, and those below them, are left out.
        mesh: one-dimensional, of the ranks of this rank's tensor-parallel group.

    Raises:
        UnsupportedError: a style that the installed Transformers does not have.
    """
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}

    def style_of(name: str, *, is_parameter: bool) -> str | None:
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = plan.get(generic)
        if style is None and is_parameter:
            style = plan.get(generic.rpartition(".")[0])
        return style

    entries: list[PlanEntry] = []
    left_paths: dict[str, str] = {}
    for path, module in model.named_modules():
        if any(path == out or path.startswith(f"{out}.") for out in left_out):
            continue
        names = [(f"{path}.{name}" if path else name, True) for name in module._parameters]
        for name, is_parameter in (*names, (path, False)):
            style = style_of(name, is_parameter=is_parameter)
            if style is None or style in EXPERTS_STYLES:
                continue
            reason = _reason_to_leave(model, path, module, style, style_of)
            if reason is None and is_parameter:
                reason = _refusal(model, module, name, style, mesh)
            if reason is not None:
                left_paths[path] = reason
            if path not in left_paths:  # else its parameters are whole
                entries.append(PlanEntry(name, style))
    left = {path.rpartition(".")[2]: reason for path, reason in left_paths.items()}
    return DensePlan(entries, left)


def _reason_to_leave(
    model: Any, path: str, module: nn.Module, style: str, style_of: Callable[..., str | None]
) -> str | None:
    """Why an entry of the plan cannot be applied to this module of a live model, if it cannot."""
    if style.startswith("embedding") and type(module) is not nn.Embedding:
        return f"{type(module).__name__} does more than look up rows"
    if style.startswith(("colwise", "rowwise")) and isinstance(module, nn.ModuleList):
        return "the plan names a list of modules"
    owner_path = path.rpartition(".")[0]
    owner = model.get_submodule(owner_path)
    if type(owner).__name__ in WHOLE_ATTENTION:
        return WHOLE_ATTENTION[type(owner).__name__]
    if style == "rowwise":
        siblings = (f"{owner_path}.{name}" for name, _ in owner.named_children())
        styles = [style_of(sibling, is_parameter=False) or "" for sibling in siblings]
        if not any(other in ("colwise", "packed_colwise") for other in styles):
            return "nothing before it is split"
    return None


def _refusal(model: Any, module: nn.Module, name: str, style: str, mesh: DeviceMesh) -> str | None:
    """Why the style itself refuses a parameter, if it does."""
    styles = _styles()
    if style not in styles:
        raise UnsupportedError(
            f"the plan of {type(model).__name__} asks for the style {style!r}, which the installed "
            "Transformers does not have; update it"
        )
    try:
        styles[style].validate_param(module, name.rpartition(".")[2], mesh, parameter_name=name)
    except ValueError as error:
        return str(error)
    return None


def check_plan(model: Any, entries: list[PlanEntry], ranks: int) -> None:
    """Refuses numbers of attention heads that the plan would cut.

    Raises:
        ConfigError: the ranks do not divide them; says which numbers of ranks do.
    """
    for what, heads in _split_heads(model, entries):
        if heads % ranks:
            possible = [size for size in range(1, heads + 1) if heads % size == 0]
            raise ConfigError(
                f"tensor_parallel_size={ranks} does not divide {what}={heads} of "
                f"{type(model).__name__}; possible by it: {', '.join(map(str, possible))}"
            )


def _split_heads(model: Any, entries: list[PlanEntry]) -> Iterator[tuple[str, int]]:
    """The numbers of attention heads that the plan splits."""
    for entry in entries:
        owner, _, leaf = entry.name.rpartition(".")
        if entry.style != "colwise" or leaf not in HEAD_COUNTS:
            continue
        attention = model.get_submodule(owner)
        config = getattr(attention, "config", None)
        what = HEAD_COUNTS[leaf]
        heads = getattr(attention, "num_heads", None) if what == "num_attention_heads" else None
        if not isinstance(heads, int):
            heads = getattr(config, what, None)
        if isinstance(heads, int):
            yield what, heads


def apply_plan(model: Any, entries: list[PlanEntry], mesh: DeviceMesh) -> list[SplitModule]:
    """Slices parameters and wraps forwards; the modules and parameters that got a style.

    Args:
        mesh: one-dimensional, of the ranks of this rank's tensor-parallel group.
    """
    styles = _styles()
    done: list[SplitModule] = []
    for entry in entries:
        style = styles[entry.style]
        owner, _, leaf = entry.name.rpartition(".")
        holder = model.get_submodule(owner)
        if leaf in holder._parameters:
            style.shard_param(holder, leaf, mesh)
            continue
        module: nn.Module = model.get_submodule(entry.name)
        if entry.style == "mla_kv_a_proj":
            module.config = model.config.get_text_config()  # its style asks for a width of it
        before = module.__dict__.get("forward")
        style.install_forward(module, mesh)
        after = module.__dict__.get("forward")
        done.append(SplitModule(entry.name, entry.style, before, after))
    return done


def _styles() -> Any:
    from transformers.distributed import tensor_parallel

    return tensor_parallel.ALL_PARALLEL_STYLES
