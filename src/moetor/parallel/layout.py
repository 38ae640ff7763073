"""Where one layer's experts and tokens are, among the ranks of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from moetor.config import ExpertsConfig
from moetor.errors import ConfigError
from moetor.parallel.allgather import AllGatherDispatcher
from moetor.parallel.alltoall import AllToAllDispatcher
from moetor.parallel.config import ParallelConfig
from moetor.parallel.dispatch import Dispatcher, ReplicatedDispatcher, TokenDispatcher
from moetor.parallel.eplb.balance import balance
from moetor.parallel.eplb.load import ExpertLoad
from moetor.parallel.groups import ParallelGroups
from moetor.parallel.placement import ExpertMap, ExpertPlacement
from moetor.parallel.shard import ExpertShard, slice_bounds
from moetor.parallel.wire import Fp8Wire


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """One layer on this rank.

    Attributes:
        shard: what the rank holds of the experts.
        experts: where every expert is; None where each rank has a slice of all of them.
        part: this rank's part of the placement.
        dispatcher: how tokens reach experts; it sums nothing that `reduce_group` sums.
        reduce_group: over which results are summed after the experts, or None.
        split_group: over which a call's tokens are split before and gathered after, or None.
        load: counts the router's choices, where experts move by it.
        part_ranks: for every part the global rank that holds it with this rank's slice.
        reason: why it differs from what the configuration usually means, or nothing.
    """

    shard: ExpertShard
    experts: ExpertMap | None
    part: int
    dispatcher: Dispatcher
    reduce_group: dist.ProcessGroup | None
    split_group: dist.ProcessGroup | None
    load: ExpertLoad | None
    part_ranks: tuple[int, ...]
    reason: str = ""

    @property
    def label(self) -> str:
        """What this rank holds, for tables."""
        shard, width = self.shard, self.shard.stop - self.shard.start
        return f"{len(shard.experts)} experts x {width}"


def plan_layer(
    groups: ParallelGroups,
    form: ExpertsConfig,
    top_k: int,
    *,
    multiple: int = 1,
    reduces: bool = False,
    loads: Sequence[float] | None = None,
    num_groups: int = 1,
) -> LayerLayout:
    """The layout of a layer with experts of this form; makes no communication.

    Args:
        form: of the whole layer.
        top_k: K.
        multiple: slices of the intermediate size begin at multiples of it.
        reduces: the dispatcher itself gives the whole sum, for experts outside of a `MoELayer`;
            tokens are then not split.
        loads: recorded choices of every expert, for which the placement is made.
        num_groups: routing groups.

    Raises:
        ConfigError: the experts cannot be split so; says what is possible.
    """
    config = groups.config
    ranks = config.world_size if config.joint else config.tensor_parallel_size
    index = groups.rank if config.joint else groups.tensor_rank
    first = 0 if config.joint else groups.rank - groups.tensor_rank
    parts, reason = _expert_parts(config, ranks, form)
    width = ranks // parts
    placement = ExpertPlacement.linear(form.num_experts, parts, config.num_redundant_experts)
    if loads is not None and config.eplb is not None:
        placement = balance(placement, loads, config.eplb, num_groups)
    part, piece = divmod(index, width)
    start, stop = slice_bounds(form.intermediate_size, width, multiple)[piece]
    shard = ExpertShard(experts=placement.parts[part], start=start, stop=stop, adds_bias=piece == 0)
    splits = config.sequence_parallel and not reduces
    # The ranks of a tensor-parallel group see the same tokens: one of them counts.
    counts = splits or groups.tensor_rank == 0
    eplb = config.eplb if config.eplb is not None and config.eplb.dynamic else None
    load = None if eplb is None else ExpertLoad(form.num_experts, eplb, counts=counts)
    sums_tensor = config.tensor_parallel_size > 1 and not splits
    dispatcher, experts = _dispatcher(
        groups,
        placement,
        width,
        top_k,
        splits,
        groups.tensor if reduces and sums_tensor else None,
    )
    return LayerLayout(
        shard=shard,
        experts=experts,
        part=part,
        dispatcher=dispatcher,
        reduce_group=groups.tensor if sums_tensor and not reduces else None,
        split_group=groups.tensor if splits else None,
        load=load,
        part_ranks=tuple(first + p * width + piece for p in range(parts)),
        reason=reason,
    )


def _expert_parts(config: ParallelConfig, ranks: int, form: ExpertsConfig) -> tuple[int, str]:
    """Into how many parts the experts are split by expert, and why if not as usual."""
    parts = min(config.num_expert_parts, ranks)
    if form.post_norm_eps is None or parts == ranks:
        return parts, ""
    if config.enable_expert_parallel:
        raise ConfigError(
            f"expert_parallel_size={parts} would split these experts by their intermediate size "
            f"over {ranks // parts} ranks each, and a norm follows every expert, which needs its "
            f"whole output; possible: expert_parallel_size={ranks}"
        )
    return ranks, ("split by expert: a norm follows every expert and needs its whole output")


def _dispatcher(
    groups: ParallelGroups,
    placement: ExpertPlacement,
    width: int,
    top_k: int,
    splits: bool,
    reduce_group: dist.ProcessGroup | None,
) -> tuple[Dispatcher, ExpertMap | None]:
    """The dispatcher for this rank, and its view of the placement.

    Args:
        width: ranks that share a part.
    """
    config = groups.config
    tp = config.tensor_parallel_size
    if not config.joint and not splits:
        if len(placement.parts) == 1:
            return ReplicatedDispatcher(None, reduce_group), None
        experts = ExpertMap(placement, [groups.tensor_rank // width], 0)
        return ReplicatedDispatcher(experts, reduce_group), experts
    if config.joint and splits:
        group, indices = groups.world, list(range(config.world_size))
    elif config.joint:
        group = groups.data
        indices = [data * tp + groups.tensor_rank for data in range(config.data_parallel_size)]
    else:
        group, indices = groups.tensor, list(range(tp))
    member_parts = [index // width for index in indices]
    me = (
        groups.rank
        if config.joint and splits
        else (groups.data_rank if config.joint else groups.tensor_rank)
    )
    experts = ExpertMap(placement, member_parts, me)
    dispatcher = _choice(config, len(member_parts), top_k)(
        group,
        experts,
        max_rows=config.max_tokens_per_rank,
        uniform=not config.joint,
        reduce_group=reduce_group,
        wire=Fp8Wire() if config.dispatch_dtype == "fp8" else None,
    )
    return dispatcher, experts


def _choice(config: ParallelConfig, members: int, top_k: int) -> type[TokenDispatcher]:
    """All-to-all where a token is expected on less than half of the members, else all-gather."""
    if config.dispatcher == "alltoall":
        return AllToAllDispatcher
    if config.dispatcher == "allgather":
        return AllGatherDispatcher
    reached = members * (1 - (1 - 1 / members) ** top_k)
    bounded = config.max_tokens_per_rank is not None or not config.joint
    return AllToAllDispatcher if reached < members / 2 and not bounded else AllGatherDispatcher
