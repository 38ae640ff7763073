"""Sequence parallelism around one layer: each rank of a group takes a part of the tokens that all
of them have.

Shape letters: T tokens, N tokens of one rank, H hidden.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.parallel.collectives import all_gather


class TokenSplit:
    """Equal parts of a call's tokens; the last ranks' are filled up with rows that are dropped
    again.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def own(self, rows_TX: Tensor, fill: int = 0) -> Tensor:
        """This rank's part [N, X] of rows [T, X], or of a value per token [T]."""
        ranks, rank = self.group.size(), self.group.rank()
        share = -(-rows_TX.shape[0] // ranks)
        missing = share * ranks - rows_TX.shape[0]
        if missing:
            rows_TX = F.pad(rows_TX, (0, 0) * (rows_TX.dim() - 1) + (0, missing), value=fill)
        return rows_TX[rank * share : (rank + 1) * share]

    def own_routing(self, routing: Routing, num_experts: int) -> Routing:
        """This rank's part of a routing; rows that fill up go nowhere."""
        identity = routing.identity_weights
        return Routing(
            self.own(routing.topk_weights),
            self.own(routing.topk_ids, fill=num_experts),
            None if identity is None else self.own(identity),
        )

    def num_own(self, tokens: int) -> int:
        """How many rows of this rank's part of so many tokens do not fill it up."""
        share = -(-tokens // self.group.size())
        return min(share, max(0, tokens - self.group.rank() * share))

    def gather(self, rows_NH: Tensor, tokens: int) -> Tensor:
        """All ranks' results [T, H]."""
        return all_gather(rows_NH.contiguous(), self.group)[:tokens]
