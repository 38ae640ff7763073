"""Ranks that share experts keep in step: before every step they agree on what it is.

Data-parallel ranks have different sequences, and every one of them must call every MoE layer
equally often. So the ranks tell one another how many model calls their step has and how many tokens
the largest one; who has less to do calls the model with a token that belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moetor.parallel.dispatch import agreed_rows
from moetor.parallel.groups import ParallelGroups


@dataclass(frozen=True, slots=True)
class Agreed:
    """One step of all ranks.

    Attributes:
        replay: every rank has single tokens alone, or nothing, and so replays a CUDA graph.
        calls: of the model; 0 where no rank has anything to compute.
        rows: tokens of the largest call of any rank.
    """

    replay: bool
    calls: int
    rows: int


class Lockstep:
    """The agreement before every step.

    Args:
        groups: of data-parallel ranks that share their experts.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._group = groups.world
        config = groups.config
        self._split = config.tensor_parallel_size if config.sequence_parallel else 1

    def agree(self, rows: Items[int], *, replay: bool) -> Agreed:
        """What all ranks do.

        Args:
            rows: tokens of this rank's calls.
            replay: whether this rank could replay a graph.
        """
        told = torch.tensor([not replay, len(rows), max(rows, default=0)], dtype=torch.int64)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        eager, calls, most = told.tolist()
        return Agreed(not eager, calls, most)

    def bounded(self, rows: int) -> AbstractContextManager[None]:
        """No rank has more than `rows` tokens in the calls inside, so that layers need not ask."""
        return agreed_rows(max(1, -(-rows // self._split)))
