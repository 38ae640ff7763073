"""A whole model over several ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moetor.errors import ConfigError, FusionError
from moetor.huggingface.block_form import find_blocks, find_left_alone
from moetor.huggingface.dense_fusing import is_dense_fused
from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.modules import FusedMoEBlock, fused_modules
from moetor.huggingface.report import ParallelReport, SpreadBlock
from moetor.huggingface.sharded_loading import withheld_files
from moetor.huggingface.tensor_parallel import (
    DensePlan,
    apply_plan,
    check_plan,
    expand_plan,
    mark_spread,
)
from moetor.layer.experts import TakenShards
from moetor.layer.sharding import (
    balanced_layer,
    check_experts,
    check_layer,
    shard_experts,
    shard_layer,
)
from moetor.parallel.config import ParallelConfig
from moetor.parallel.eplb.balancer import ExpertBalancer
from moetor.parallel.eplb.statistics import read_loads
from moetor.parallel.groups import ParallelGroups, agree, make_groups
from moetor.parallel.layout import LayerLayout

# Of every tensor so many elements are compared between the ranks.
FINGERPRINT = 16
_BALANCER = "_moetor_balancer"


def take_balancer(model: Any) -> ExpertBalancer | None:
    """The balancer that has worked after every forward pass of the model, and from now on works
    when the caller says so, who replays forward passes that no hook sees; None where there is none.
    """
    balancer, hook = model.__dict__.get(_BALANCER, (None, None))
    if hook is not None:
        hook.remove()
    return balancer  # type: ignore[no-any-return]


def parallelize(model: Any, config: ParallelConfig) -> ParallelReport:
    """Keeps this rank's part of a fused model, and makes the model communicate.

    Every rank calls it with the same whole model. Attention and dense layers are split over the
    tensor-parallel group by Transformers' own plan, routed experts as `config` says, shared experts
    where that is possible. Blocks that are not fused, and what no plan names, stay whole on every
    rank; the report says which.

    Args:
        model: a model that `moetor.fuse` has fused.

    Returns:
        What this rank holds, block by block.

    Raises:
        ConfigError: the ranks or the model do not fit the configuration; says what is possible.
        FusionError: the model is not fused, or its dense parts are.
        ParallelError: the ranks have different models or versions.
    """
    fused = fused_modules(model)
    if not fused and any(True for _ in find_blocks(model)):
        raise FusionError("the model is not fused; call moetor.fuse(model, parallel=...)")
    if is_dense_fused(model):
        raise FusionError(
            "the model's dense parts are fused already, which joins weights that ranks must split "
            "one by one; fuse with both at once: moetor.fuse(model, dense=True, parallel=...)"
        )
    device = next(model.parameters()).device
    groups = make_groups(config, device)
    agree(_facts(model))
    loads = _recorded_loads(config, fused)
    for path, module in fused:
        _check(module, groups, loads.get(path))
    left_out = [path for path, _ in fused] + [path for path, _, _ in find_left_alone(model)]
    plan = DensePlan([], {})
    if config.tensor_parallel_size > 1:
        plan = expand_plan(model, left_out, groups.mesh["tp"])
    check_plan(model, plan.entries, config.tensor_parallel_size)
    taken: TakenShards = {}
    blocks = [_spread(path, module, groups, taken, loads.get(path)) for path, module in fused]
    blocks += [
        SpreadBlock(name=path, experts="whole on every rank", reason=reason)
        for path, _, reason in find_left_alone(model)
    ]
    split = apply_plan(model, plan.entries, groups.mesh["tp"])
    model._device_mesh = groups.mesh  # Transformers asks for it when it batches
    mark_spread(model, groups, split)
    whole = _whole(model, left_out) if config.tensor_parallel_size > 1 else ()
    return ParallelReport(
        groups=groups,
        blocks=blocks,
        styles=Counter(one.style for one in split),
        whole=whole,
        left=plan.left,
        balancer=_balance(model, fused, groups),
    )


def _recorded_loads(
    config: ParallelConfig, fused: list[tuple[str, FusedMoEBlock | FusedExperts]]
) -> dict[str, list[float]]:
    """The recorded load of every layer, where a file of them was given.

    Raises:
        ConfigError: the file is not of this model.
    """
    if config.eplb is None or config.eplb.statistics is None:
        return {}
    loads = read_loads(Path(config.eplb.statistics))
    for path, module in fused:
        experts = module.routed_experts.config.num_experts
        # A layer that is fused by its experts alone was recorded under the path of its experts.
        if len(loads.get(path, ())) != experts:
            raise ConfigError(
                f"the statistics {config.eplb.statistics} have "
                f"{len(loads[path]) if path in loads else 'no'} experts for layer {path!r}, which "
                f"has {experts}; record them with this model: moetor experts --save-stats"
            )
    return loads


def _balance(
    model: nn.Module,
    fused: list[tuple[str, FusedMoEBlock | FusedExperts]],
    groups: ParallelGroups,
) -> ExpertBalancer | None:
    """A balancer that works after every forward pass of the model, where experts move."""
    eplb = groups.config.eplb
    if eplb is None or not eplb.dynamic:
        return None
    layers = []
    for path, module in fused:
        assert module.parallel is not None, "it has been spread"
        router = module.config.router.num_groups if isinstance(module, FusedMoEBlock) else 1
        layer = balanced_layer(path, module.routed_experts, module.parallel, router)
        if layer is not None:
            layers.append(layer)
    if not layers:
        return None
    balancer = ExpertBalancer(layers, eplb, groups.world if groups.config.joint else groups.tensor)
    hook = model.register_forward_hook(lambda *_: balancer.step())
    model.__dict__[_BALANCER] = balancer, hook
    return balancer


def _check(
    module: FusedMoEBlock | FusedExperts, groups: ParallelGroups, loads: list[float] | None
) -> LayerLayout:
    if isinstance(module, FusedMoEBlock):
        return check_layer(module, groups, loads)
    return check_experts(module, groups, loads)


def _spread(
    path: str,
    module: FusedMoEBlock | FusedExperts,
    groups: ParallelGroups,
    taken: TakenShards,
    loads: list[float] | None,
) -> SpreadBlock:
    module.forget_original()
    shared = ""
    if isinstance(module, FusedMoEBlock):
        layout = shard_layer(module, groups, taken, loads)
        if module.shared is not None:
            shared = "whole" if module.shared.replicated else "split"
    else:
        layout = shard_experts(module, groups, taken, loads)
    return SpreadBlock(
        name=path,
        experts=layout.label,
        shared=shared,
        dispatcher=type(layout.dispatcher).__name__,
        reason=layout.reason,
    )


def _whole(model: nn.Module, left_out: list[str]) -> tuple[str, ...]:
    """Names of linear layers that no entry of the plan split, each once."""
    names = {
        path.rpartition(".")[2]: None
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and isinstance(module.weight, Tensor)
        and type(module.weight.data).__name__ != "DTensor"
        and not any(path.startswith(f"{out}.") for out in left_out)
    }
    return tuple(names)


def _facts(model: Any) -> dict[str, Any]:
    """What every rank's model must have in common."""
    return {
        "the versions of torch and Transformers": (torch.__version__, transformers.__version__),
        "the model's class": type(model).__name__,
        "the model's configuration": json.loads(model.config.to_json_string()),
        "the model's parameters": [
            (name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()
        ],
        "the model's weights": _fingerprint(model),
        "the model's files": withheld_files(model),
    }


def _fingerprint(model: nn.Module) -> list[list[float]]:
    """A few elements of every parameter: another revision of a model shows in them."""
    told = []
    for parameter in model.parameters():
        if not any(parameter.stride()):  # one number in every place: it is read later
            continue
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // FINGERPRINT)
        told.append(flat[::step][:FINGERPRINT].float())
    return [values.tolist() for values in told if values.device.type != "meta"]
