"""Dispatch by all-gather, combine by reduce-scatter: every member sees every member's tokens.

Nothing depends on where tokens go, so all shapes follow from the common number of rows. Shape
letters: M members, N rows per member, T tokens of this rank, K top_k, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.parallel.collectives import Started, start_all_gather, start_reduce_scatter
from moetor.parallel.dispatch import Exchange, TokenDispatcher


class AllGatherDispatcher(TokenDispatcher):
    """Sends every token to every member."""

    def begin(self, hidden_TH: Tensor, routing: Routing, rows: int) -> Exchange:
        """See `Dispatcher.begin`."""
        return _Gathered(self, hidden_TH, routing, rows)


class _Gathered(Exchange):
    def __init__(
        self, dispatcher: AllGatherDispatcher, hidden_TH: Tensor, routing: Routing, rows: int
    ) -> None:
        self.dispatcher = dispatcher
        self.tokens, self.top_k = routing.topk_ids.shape
        self.like = hidden_TH
        missing = rows - self.tokens
        physical_TK = dispatcher.experts.physical(routing.topk_ids)
        weights_TK = routing.topk_weights
        dropped = dispatcher.experts.placement.num_physical
        if missing:
            hidden_TH = F.pad(hidden_TH, (0, 0, 0, missing))
            physical_TK = F.pad(physical_TK, (0, 0, 0, missing), value=dropped)
            weights_TK = F.pad(weights_TK, (0, 0, 0, missing))
        # One message instead of two: the weights' bits travel as integers.
        packed = torch.cat((weights_TK.contiguous().view(torch.int32), physical_TK), dim=1)
        self.hidden = start_all_gather(dispatcher.wire.pack(hidden_TH), dispatcher.group)
        self.packed = start_all_gather(packed, dispatcher.group)
        self.back: Started | None = None

    def arrived(self) -> tuple[Tensor, Routing]:
        """See `Exchange.arrived`: [M * N, H]."""
        experts = self.dispatcher.experts
        packed = self.packed.wait()
        weights = packed.view(torch.float32)[:, : self.top_k]
        hidden = self.dispatcher.wire.unpack(self.hidden.wait(), self.like)
        return hidden, experts.held(weights, packed[:, self.top_k :])

    def send_back(self, out_NH: Tensor) -> None:
        """See `Exchange.send_back`."""
        self.back = start_reduce_scatter(out_NH, self.dispatcher.group)

    def returned(self) -> Tensor:
        """See `Exchange.returned`."""
        assert self.back is not None, "send_back comes first"
        return self.dispatcher.finish(self.back.wait()[: self.tokens])
