"""Recognising a Transformers MoE block: its children by name and kind, its composition by what it
computes.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from moetor.config import ExpertsConfig, MoEConfig, RouterConfig, RunnerConfig, SharedExpertsConfig
from moetor.huggingface.block_plan import BlockChildren, BlockPlan
from moetor.huggingface.experts_form import Unrecognised, is_experts, recognise_experts
from moetor.huggingface.placement import OFFLOADED, is_offloaded
from moetor.huggingface.router_form import (
    KeptRouter,
    RecognisedRouter,
    kept_router,
    recognise_router,
)
from moetor.huggingface.router_trial import EXTRA_INPUTS, Answer
from moetor.huggingface.routing_in_block import BlockParts, ask_block
from moetor.huggingface.split_activation import recognise_split
from moetor.huggingface.split_experts import (
    SplitExperts,
    find_split,
    tensor_at,
)
from moetor.layer.routing.router import Router

ROUTER_NAMES = ("gate", "router")
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_GATE_NAMES = ("shared_expert_gate",)
INPUT_NAMES = ("fc1_latent_proj", "pre_expert_proj", "pre_expert_norm")
OUTPUT_NAMES = ("fc2_latent_proj", "post_expert_proj")
FINAL_NAMES = ("post_mlp_layernorm",)
SHARED_WEIGHT_ARGUMENTS = ("gammas",)
BLOCK_SCALE_ATTRIBUTES = ("routed_scaling_factor",)
ADD_IN_FLOAT32_FLAGS = ("enable_moe_fp32_combine",)


ExpertsSource = str | SplitExperts
"""The name of a child that holds packed experts, or experts that a description found apart."""

# Blocks that hold experts in a way that no experts form describes: class name, reason.
LEFT_ALONE = {
    "DogeCDMoE": "its experts are thousands of single neurons found by product keys; there is no "
    "matrix product to fuse",
    "JetMoeMoA": "its experts are projections around attention, which are called apart from each "
    "other; there is no feed-forward block to fuse",
    "NllbMoeSparseMLP": "its routing has a capacity per expert, and its Transformers forward runs "
    "experts 0 and 1 alone, whatever the router says",
    "VitPoseBackboneMoeMLP": "its experts are chosen by data set, not by token",
}


def has_parameters(module: nn.Module) -> bool:
    """Whether the module or a part of it holds a parameter with any element."""
    return any(parameter.numel() for parameter in module.parameters())


def find_left_alone(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """MoE blocks without packed experts: (path, module, reason)."""
    for path, module in model.named_modules():
        reason = LEFT_ALONE.get(type(module).__name__)
        experts = module._modules.get("experts")
        if reason is not None:
            yield path, module, reason
        elif experts is None or is_experts(experts) or not has_parameters(experts):
            continue
        elif type(experts).__name__ not in LEFT_ALONE and find_split(module) is None:
            kind = type(experts).__name__
            yield path, module, f"its experts are a {kind}, which no description covers"


def find_packed(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every module that holds packed experts: (path, module, name of its experts child)."""
    for path, module in model.named_modules():
        for name in _packed_children(module):
            yield path, module, name


def _packed_children(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        if is_experts(child) and name not in SHARED_NAMES:
            yield name


def find_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertsSource]]:
    """Every module that holds experts: (path, module, what its experts are)."""
    for path, module in model.named_modules():
        if type(module).__name__ in LEFT_ALONE:
            continue
        for name in _packed_children(module):
            yield path, module, name
        split = find_split(module)
        if split is not None:
            yield path, module, split


def experts_form(block: nn.Module, source: ExpertsSource) -> ExpertsConfig | Unrecognised:
    """The form of a block's experts, or why they have none that we know."""
    if isinstance(source, SplitExperts):
        return recognise_split(block, source)
    return recognise_experts(block.get_submodule(source))


def recognise_block(
    path: str,
    block: nn.Module,
    source: ExpertsSource,
    *,
    quantization: str | None,
    runner: RunnerConfig,
    hint: RouterConfig | None,
) -> BlockPlan | Unrecognised:
    """A plan for the whole block, or why there is none."""
    arguments = _arguments(block, source)
    if isinstance(arguments, Unrecognised):
        return arguments
    children = _children(block, source)
    if isinstance(children, Unrecognised):
        return children
    experts = experts_form(block, source)
    if isinstance(experts, Unrecognised):
        return experts
    hidden_size = _hidden_size(block, children, experts)
    router = _router(block, source, children, experts, hidden_size, hint)
    if isinstance(router, Unrecognised):
        return router
    explained = {children.output_bias}
    if isinstance(router, RecognisedRouter) and router.names.selection_bias_on_block:
        explained.add(router.names.selection_bias)
    stray = [name for name in (*block._parameters, *block._buffers) if name not in explained]
    if stray:
        return Unrecognised(
            f"its block holds tensors that no description covers: {', '.join(stray)}"
        )
    if isinstance(router, RecognisedRouter):
        formula = router.config
    else:
        formula = RouterConfig(num_experts=experts.num_experts, top_k=router.top_k)
    config = MoEConfig(
        hidden_size=hidden_size,
        router=formula,
        experts=experts,
        shared=_shared_config(block, children, hidden_size),
        runner=runner,
        internal_gate=isinstance(router, RecognisedRouter),
        latent_size=experts.hidden_size if children.inputs else None,
        quantization=quantization,
    )
    return BlockPlan(
        path=path,
        block=block,
        router=router,
        children=children,
        config=config,
        split=source if isinstance(source, SplitExperts) else None,
        inputs=arguments,
        shared_weights=_shared_weights(block, children, router),
    )


def _router(
    block: nn.Module,
    source: ExpertsSource,
    children: BlockChildren,
    experts: ExpertsConfig,
    hidden_size: int,
    hint: RouterConfig | None,
) -> RecognisedRouter | KeptRouter | Unrecognised:
    """How the block routes: its router's answer, else what the block makes of it."""
    parts = BlockParts(
        router=children.router,
        experts=children.experts,
        others=tuple(name for name in (children.shared,) if name is not None),
    )
    dtype = experts_tensor(block, source).dtype

    def ask(twin: nn.Module, selection_bias: Tensor | None) -> Answer | Unrecognised:
        return ask_block(
            block,
            parts,
            twin,
            num_experts=experts.num_experts,
            hidden_size=hidden_size,
            dtype=dtype,
            selection_bias=selection_bias,
        )

    return recognise_router(
        block.get_submodule(children.router),
        block,
        num_experts=experts.num_experts,
        hidden_size=hidden_size,
        dtype=dtype,
        hint=hint,
        ask=ask if children.experts in block._modules else None,
    )


def experts_modules(block: nn.Module, source: ExpertsSource) -> Iterator[nn.Module]:
    """The modules that a fused block no longer calls."""
    names = source.children if isinstance(source, SplitExperts) else (source,)
    for name in names:
        yield from block.get_submodule(name).modules()


def experts_tensor(block: nn.Module, source: ExpertsSource) -> Tensor:
    """One of the experts' weights: their dtype and device."""
    if isinstance(source, SplitExperts):
        return tensor_at(block, source.slots[0].path)
    return next(block.get_submodule(source).parameters())


def _arguments(block: nn.Module, source: ExpertsSource) -> tuple[str, ...] | Unrecognised:
    """Names of what the block takes besides hidden states, or why it cannot be called by us."""
    if is_offloaded(block):
        return Unrecognised(OFFLOADED)
    packed = block if isinstance(source, SplitExperts) else block.get_submodule(source)
    if "forward" in block.__dict__ or "forward" in packed.__dict__:
        return Unrecognised("its forward is wrapped by a hook (such as that of tensor parallelism)")
    extra = _extra_arguments(block)
    unknown = [name for name in extra if name not in EXTRA_INPUTS]
    return Unrecognised(f"its block also takes {', '.join(unknown)}") if unknown else extra


def _extra_arguments(block: nn.Module) -> tuple[str, ...]:
    """Names of what the block takes besides hidden states."""
    return tuple(
        name
        for name, parameter in list(inspect.signature(block.forward).parameters.items())[1:]
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    )


def recognise_beside(block: nn.Module, source: ExpertsSource) -> KeptRouter | None:
    """The router of a layer that calls router and experts itself, each with an input of its own
    (Gemma 4): there is no block around them that could be replaced, and none is needed.

    None where the block is not such a layer.
    """
    router = next((block._modules[name] for name in ROUTER_NAMES if name in block._modules), None)
    if router is None or isinstance(source, SplitExperts):
        return None
    if all(name in EXTRA_INPUTS for name in _extra_arguments(block)):
        return None
    if any("forward" in m.__dict__ for m in (block, router, block.get_submodule(source))):
        return None
    experts = recognise_experts(block.get_submodule(source))
    if isinstance(experts, Unrecognised):
        return None
    weight = experts_tensor(block, source)
    asked = kept_router(router, experts.hidden_size, weight.dtype, "its layer calls it")
    return asked if isinstance(asked, KeptRouter) else None


def beside_label(block: nn.Module) -> str:
    """The routing of a layer that calls its router itself, for a table."""
    router = next(block._modules[name] for name in ROUTER_NAMES if name in block._modules)
    return f"callable {type(router).__name__}"


def router_label(plan: BlockPlan) -> str:
    """The plan's routing, for a table."""
    if isinstance(plan.router, KeptRouter):
        return f"callable {type(plan.router_module).__name__}"
    return Router(plan.config.router).label


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
    scales.append(float(plan.config.router.top_k))  # OpenAI's privacy filter
    for scale in scales:
        if scale != 1.0 and isinstance(plan.router, KeptRouter):
            continue
        router = replace(
            plan.config.router, scaling_factor=plan.config.router.scaling_factor * scale
        )
        config = replace(plan.config, router=router)
        yield replace(plan, config=config, block_scale=scale)
        if config.shared is not None:
            mean = replace(config.shared, combine="mean")
            yield replace(plan, config=replace(config, shared=mean), block_scale=scale)
    experts = replace(plan.config.experts, weight_on_input=True)
    yield replace(plan, config=replace(plan.config, experts=experts))


def _children(block: nn.Module, source: ExpertsSource) -> BlockChildren | Unrecognised:
    """The block's children by their part, or which of them has none."""
    children = dict(block.named_children())

    def present(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name in children and has_parameters(children[name]))

    split, experts = None, source
    if isinstance(source, SplitExperts):
        split, experts = source, source.name
    router, shared = present(ROUTER_NAMES), present(SHARED_NAMES)
    if not router:
        return Unrecognised("it has no router of its own beside its experts")
    bias = None if split is None else block._parameters.get(split.form.output_bias)
    found = BlockChildren(
        router=router[0],
        experts=str(experts),
        replaced=() if split is None else split.children,
        output_bias=None if split is None or bias is None else split.form.output_bias,
        shared=next(iter(shared), None),
        shared_gate=next(iter(present(SHARED_GATE_NAMES)), None),
        inputs=present(INPUT_NAMES),
        outputs=present(OUTPUT_NAMES),
        final=present(FINAL_NAMES),
        idle=tuple(
            name
            for name, child in children.items()
            if not has_parameters(child) and next(child.parameters(), None) is not None
        ),
    )
    taken = found.names.union(found.replaced)
    others = [name for name in present(tuple(children)) if name not in taken]
    if others:
        return Unrecognised(f"its block holds {', '.join(others)}, which no description covers")
    if bool(found.inputs) != bool(found.outputs):
        return Unrecognised("its block projects the experts' input or output, but not both")
    return found


def _shared_weights(
    block: nn.Module, children: BlockChildren, router: RecognisedRouter | KeptRouter
) -> str | None:
    """The shared experts' argument for a router's fourth answer, where they take one."""
    if children.shared is None or isinstance(router, RecognisedRouter) or router.answers != 4:
        return None
    taken = inspect.signature(block.get_submodule(children.shared).forward).parameters
    return next((name for name in SHARED_WEIGHT_ARGUMENTS if name in taken), None)


def _hidden_size(block: nn.Module, children: BlockChildren, experts: ExpertsConfig) -> int:
    if not children.inputs:
        return experts.hidden_size
    first = block.get_submodule(children.inputs[0])
    return int(getattr(first, "in_features", experts.hidden_size))


def _shared_config(
    block: nn.Module, children: BlockChildren, hidden_size: int
) -> SharedExpertsConfig | None:
    if children.shared is None:
        return None
    shared = block.get_submodule(children.shared)
    widths = [module.in_features for module in shared.modules() if isinstance(module, nn.Linear)]
    return SharedExpertsConfig(
        intermediate_size=widths[-1] if widths else hidden_size,
        sigmoid_gate=children.shared_gate is not None,
        add_in_float32=any(bool(getattr(block, name, False)) for name in ADD_IN_FLOAT32_FLAGS),
    )
