"""Recognising a Transformers MoE block: its children by name and kind, its composition by what it
computes.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from moetor.config import ExpertsConfig, MoEConfig, RouterConfig, RunnerConfig, SharedExpertsConfig
from moetor.huggingface.experts_form import Unrecognised, is_experts, recognise_experts
from moetor.huggingface.modules import BlockPlan
from moetor.huggingface.router_form import recognise_router
from moetor.layer.moe import ChildNames

ROUTER_NAMES = ("gate", "router")
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_GATE_NAMES = ("shared_expert_gate",)
BLOCK_SCALE_ATTRIBUTES = ("routed_scaling_factor",)


def find_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every module that holds packed experts: (path, module, name of its experts child)."""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if is_experts(child):
                yield path, module, name


def recognise_block(
    path: str,
    block: nn.Module,
    experts_name: str,
    *,
    quantization: str | None,
    runner: RunnerConfig,
    hint: RouterConfig | None,
) -> BlockPlan | Unrecognised:
    """A plan for the whole block, or why there is none."""
    if "forward" in block.__dict__ or "forward" in block.get_submodule(experts_name).__dict__:
        return Unrecognised("its forward is wrapped by a hook (device map or tensor parallelism)")
    needed = [
        name
        for name, parameter in list(inspect.signature(block.forward).parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if needed:
        return Unrecognised(f"its block also takes {', '.join(needed)}")
    names = _child_names(block, experts_name)
    if isinstance(names, Unrecognised):
        return names
    experts = recognise_experts(block.get_submodule(experts_name))
    if isinstance(experts, Unrecognised):
        return experts
    router = recognise_router(block.get_submodule(names.gate), block, hint)
    if isinstance(router, Unrecognised):
        return router
    stray = [
        name
        for name in (*block._parameters, *block._buffers)
        if not (router.selection_bias_on_block and (router.selection_bias or "").startswith(name))
    ]
    if stray:
        return Unrecognised(
            f"its block holds tensors that no description covers: {', '.join(stray)}"
        )
    return BlockPlan(
        path=path,
        block=block,
        router=router,
        names=names,
        config=_layer_config(block, names, router.config, experts, quantization, runner),
    )


def compositions(plan: BlockPlan) -> Iterator[BlockPlan]:
    """The ways in which the parts may be put together, the likeliest first; the trial decides.

    They differ in what adds routed and shared results, and in a scale that the block rather than
    its router applies.
    """
    scales = [1.0]
    for name in BLOCK_SCALE_ATTRIBUTES:
        value = getattr(plan.block, name, None)
        if isinstance(value, int | float) and value != 1.0:
            scales.append(float(value))
    for scale in scales:
        factor = plan.router.config.scaling_factor * scale
        router = replace(plan.router.config, scaling_factor=factor)
        config = replace(plan.config, router=router)
        scaled = replace(plan, router=replace(plan.router, config=router), config=config)
        yield scaled
        if config.shared is not None:
            mean = replace(config.shared, combine="mean")
            yield replace(scaled, config=replace(config, shared=mean))


def _child_names(block: nn.Module, experts_name: str) -> ChildNames | Unrecognised:
    children = dict(block.named_children())
    gate = next((name for name in ROUTER_NAMES if name in children), None)
    if gate is None:
        return Unrecognised("it has no router of its own beside its experts")
    shared = next((name for name in SHARED_NAMES if name in children), None)
    shared_gate = next((name for name in SHARED_GATE_NAMES if name in children), None)
    known = {experts_name, gate, shared, shared_gate}
    others = [
        name
        for name, child in children.items()
        if name not in known and next(child.parameters(), None) is not None
    ]
    if others:
        return Unrecognised(f"its block holds {', '.join(others)}, which no description covers")
    return ChildNames(
        gate=gate,
        experts=experts_name,
        shared=shared or ChildNames.shared,
        shared_gate=shared_gate or ChildNames.shared_gate,
    )


def _layer_config(
    block: nn.Module,
    names: ChildNames,
    router: RouterConfig,
    experts: ExpertsConfig,
    quantization: str | None,
    runner: RunnerConfig,
) -> MoEConfig:
    shared_module = block._modules.get(names.shared)
    shared = None
    if shared_module is not None:
        widths = [m.in_features for m in shared_module.modules() if isinstance(m, nn.Linear)]
        shared = SharedExpertsConfig(
            intermediate_size=widths[-1] if widths else experts.hidden_size,
            sigmoid_gate=names.shared_gate in block._modules,
        )
    return MoEConfig(
        hidden_size=experts.hidden_size,
        router=router,
        experts=experts,
        shared=shared,
        runner=runner,
        quantization=quantization,
    )
