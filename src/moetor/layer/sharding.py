"""A layer, made whole, becomes one rank's part of it.

Shape letters: T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from moetor.config import SharedExpertsOrder
from moetor.errors import ConfigError, UnsupportedError
from moetor.layer.token_split import TokenSplit
from moetor.parallel.eplb.balancer import BalancedLayer
from moetor.parallel.groups import ParallelGroups
from moetor.parallel.layout import LayerLayout, plan_layer
from moetor.parallel.shard import slice_bounds
from moetor.quantization.method import MonolithicMethod

if TYPE_CHECKING:
    from moetor.layer.experts import Experts, TakenShards
    from moetor.layer.moe import MoELayer
    from moetor.parallel.dispatch import Dispatcher


class FusedOwner(Protocol):
    """A module that holds routed experts and is called as they are."""

    dispatcher: Dispatcher
    parallel: LayerLayout | None

    @property
    def routed_experts(self) -> Experts:
        """The experts."""

    def register_state_dict_pre_hook(self, hook: Any) -> Any:
        """As of any module."""


# The product of a dense MLP that brings it back to the hidden size.
DOWN_NAMES = ("down_proj", "output_linear", "w2", "fc2", "wo")
TRIAL_ROWS = 8


def check_layer(
    layer: MoELayer, groups: ParallelGroups, loads: Sequence[float] | None = None
) -> LayerLayout:
    """The layout that `shard_layer` would give a layer; changes nothing.

    Raises:
        ConfigError: the layer is spread already, or cannot be spread so.
    """
    if layer.parallel is not None or layer.process_group is not None:
        raise ConfigError(f"layer {layer.name!r} is spread over ranks already")
    experts = layer.routed_experts
    router = layer.config.router
    layout = plan_layer(
        groups,
        experts.config,
        router.top_k,
        multiple=experts.slice_multiple,
        loads=loads,
        num_groups=router.num_groups,
    )
    experts.check_shard(layout.shard)
    by_expert = len(layout.shard.experts) != experts.config.num_experts
    if isinstance(experts.method, MonolithicMethod) and (
        by_expert or layout.dispatcher.communicates
    ):
        raise ConfigError(
            f"layer {layer.name!r}: quant method {experts.method.name!r} routes inside its kernel "
            "and cannot leave experts out; possible: tensor parallelism alone, or a modular method"
        )
    return layout


def shard_layer(
    layer: MoELayer,
    groups: ParallelGroups,
    taken: TakenShards | None = None,
    loads: Sequence[float] | None = None,
) -> LayerLayout:
    """Keeps this rank's part of a layer's weights and makes it communicate.

    Routed experts are split as `groups.config` says. Shared experts are split by their
    intermediate size where every rank has the same tokens and trying shows that the parts add up;
    else every rank has them whole. Gate, routing and latent projections are whole on every rank.

    Args:
        layer: the same whole layer on every rank.
        taken: what layers that share parameters with this one have kept.
        loads: recorded choices of every expert, for which they are placed.

    Raises:
        ConfigError: the layer is spread already, or cannot be spread so; nothing was changed.
    """
    layout = check_layer(layer, groups, loads)
    layer.routed_experts.keep_shard(layout.shard, taken)
    layer.parallel = layout
    layer.dispatcher = layout.dispatcher
    layer.token_split = None if layout.split_group is None else TokenSplit(layout.split_group)
    if layout.reduce_group is not None:
        layer.process_group = layout.reduce_group
        layer.config = layer.config.with_runner(reduce_results=True)
    layer.register_state_dict_pre_hook(_refuse_saving)  # type: ignore[no-untyped-call]
    shared = layer.shared
    if shared is not None:
        group = layout.reduce_group
        shared.replicated = group is None or not shard_dense(
            shared.module, layer.config.hidden_size, group.rank(), group.size()
        )
        if layout.dispatcher.communicates and shared.config.order is SharedExpertsOrder.AUTO:
            shared.overlap()
    return layout


def _refuse_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise UnsupportedError(
        f"{prefix.rstrip('.') or 'this layer'} holds one rank's part of its weights, which cannot "
        "be saved; save the model before it is spread over ranks"
    )


def balanced_layer(
    name: str, experts: Experts, layout: LayerLayout, num_groups: int = 1
) -> BalancedLayer | None:
    """What a balancer needs of a spread layer; None where its experts do not move."""
    if layout.experts is None or layout.load is None:
        return None
    return BalancedLayer(
        name=name,
        weights=experts.expert_tensors,
        experts=layout.experts,
        part=layout.part,
        ranks=layout.part_ranks,
        load=layout.load,
        num_groups=num_groups,
    )


def check_experts(
    owner: FusedOwner, groups: ParallelGroups, loads: Sequence[float] | None = None
) -> LayerLayout:
    """The layout that `shard_experts` would give; changes nothing.

    Raises:
        ConfigError: the experts are spread already, or cannot be spread so.
    """
    if owner.parallel is not None:
        raise ConfigError("these experts are spread over ranks already")
    experts = owner.routed_experts
    layout = plan_layer(
        groups,
        experts.config,
        experts.top_k,
        multiple=experts.slice_multiple,
        reduces=True,
        loads=loads,
    )
    experts.check_shard(layout.shard)
    return layout


def shard_experts(
    owner: FusedOwner,
    groups: ParallelGroups,
    taken: TakenShards | None = None,
    loads: Sequence[float] | None = None,
) -> LayerLayout:
    """As `shard_layer`, for experts that are called alone: their dispatcher gives the whole sum.

    Raises:
        ConfigError: the experts are spread already, or cannot be spread so; nothing was changed.
    """
    layout = check_experts(owner, groups, loads)
    owner.routed_experts.keep_shard(layout.shard, taken)
    owner.parallel = layout
    owner.dispatcher = layout.dispatcher
    owner.register_state_dict_pre_hook(_refuse_saving)
    return layout


def shard_dense(module: nn.Module, hidden_size: int, rank: int, ranks: int) -> bool:
    """Keeps one rank's slice of a dense MLP of linear layers, whose ranks' outputs add up.

    Returns:
        False, and changes nothing, where the module is not such an MLP or trying does not show
        that the slices add up.
    """
    width = _inner_width(module, hidden_size)
    if width is None or width < ranks:
        return False
    parameter = next(module.parameters())
    if parameter.device.type != "meta" and not _slices_add_up(module, hidden_size, width, ranks):
        return False
    _keep_slice(module, width, slice_bounds(width, ranks)[rank], rank == 0)
    return True


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def _is_down(name: str) -> bool:
    return name.rpartition(".")[2] in DOWN_NAMES


def _inner_width(module: nn.Module, hidden_size: int) -> int | None:
    """I of an MLP whose parameters are those of one down product and products up to I or 2 I."""
    linears = _linears(module)
    held = sum(len(list(linear.parameters())) for linear in linears.values())
    downs = [linear for name, linear in linears.items() if _is_down(name)]
    if len(downs) != 1 or held != len(list(module.parameters())):
        return None
    width = downs[0].in_features
    fits = downs[0].out_features == hidden_size and all(
        linear.in_features == hidden_size and linear.out_features in (width, 2 * width)
        for name, linear in linears.items()
        if not _is_down(name)
    )
    return width if fits else None


def _keep_slice(
    module: nn.Module, width: int, bounds: tuple[int, int], adds_bias: bool
) -> nn.Module:
    start, stop = bounds
    for name, linear in _linears(module).items():
        weight, bias = linear.weight.detach(), linear.bias
        if _is_down(name):
            linear.weight = _frozen(weight[:, start:stop])
            linear.in_features = stop - start
            if bias is not None and not adds_bias:
                linear.bias = _frozen(torch.zeros_like(bias))
            continue
        firsts = range(0, linear.out_features, width)
        rows = [slice(first + start, first + stop) for first in firsts]
        linear.weight = _frozen(torch.cat([weight[own] for own in rows]))
        if bias is not None:
            linear.bias = _frozen(torch.cat([bias.detach()[own] for own in rows]))
        linear.out_features = len(rows) * (stop - start)
    return module


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _slices_add_up(module: nn.Module, hidden_size: int, width: int, ranks: int) -> bool:
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn((TRIAL_ROWS, hidden_size), generator=generator)
    rows = drawn.to(device=parameter.device, dtype=parameter.dtype)
    bounds = slice_bounds(width, ranks)
    with torch.no_grad():
        try:
            whole = module(rows).double()
            total = torch.zeros_like(whole)
            for number, own in enumerate(bounds):
                part = _keep_slice(copy.deepcopy(module), width, own, number == 0)
                total += part(rows).double()
        except (RuntimeError, TypeError):
            return False  # it takes more than hidden states
    allowed = 16 * torch.finfo(parameter.dtype).eps * float(whole.abs().max())
    return bool((total - whole).abs().max() <= allowed)
