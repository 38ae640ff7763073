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
from moetor.parallel.direct_rows import DirectRows, direct_rows
from moetor.parallel.dispatch import Exchange, TokenDispatcher


class AllGatherDispatcher(TokenDispatcher):
    """Sends every token to every member."""

    def begin(self, hidden_TH: Tensor, routing: Routing, rows: int) -> Exchange:
        """See `Dispatcher.begin`."""
        message, packed = _message(self, hidden_TH, routing, rows)
        direct = None if torch.compiler.is_compiling() else direct_rows(self.group)
        if direct is not None and direct.takes(message, packed, hidden_TH):
            return _Direct(self, direct, message, packed, hidden_TH)
        return _Gathered(self, message, packed, hidden_TH)


def _message(
    dispatcher: AllGatherDispatcher, hidden_TH: Tensor, routing: Routing, rows: int
) -> tuple[Tensor, Tensor]:
    """What a rank sends, filled up to `rows`: tokens, and weights' bits beside physical ids."""
    missing = rows - hidden_TH.shape[0]
    physical_TK = dispatcher.experts.physical(routing.topk_ids)
    weights_TK = routing.topk_weights
    dropped = dispatcher.experts.placement.num_physical
    if missing:
        hidden_TH = F.pad(hidden_TH, (0, 0, 0, missing))
        physical_TK = F.pad(physical_TK, (0, 0, 0, missing), value=dropped)
        weights_TK = F.pad(weights_TK, (0, 0, 0, missing))
    # One message instead of two: the weights' bits travel as integers.
    packed = torch.cat((weights_TK.contiguous().view(torch.int32), physical_TK), dim=1)
    return dispatcher.wire.pack(hidden_TH), packed


def _arrived(
    dispatcher: AllGatherDispatcher, message: Tensor, packed: Tensor, like: Tensor
) -> tuple[Tensor, Routing]:
    """All members' tokens, and the routing to this rank's experts."""
    top_k = packed.shape[1] // 2
    weights = packed.view(torch.float32)[:, :top_k]
    hidden = dispatcher.wire.unpack(message, like)
    return hidden, dispatcher.experts.held(weights, packed[:, top_k:])


class _Gathered(Exchange):
    """By the collectives of the backend, which run meanwhile."""

    def __init__(
        self, dispatcher: AllGatherDispatcher, message: Tensor, packed: Tensor, like: Tensor
    ) -> None:
        self.dispatcher, self.like = dispatcher, like
        self.hidden = start_all_gather(message, dispatcher.group)
        self.packed = start_all_gather(packed, dispatcher.group)
        self.back: Started | None = None

    def arrived(self) -> tuple[Tensor, Routing]:
        """See `Exchange.arrived`: [M * N, H]."""
        return _arrived(self.dispatcher, self.hidden.wait(), self.packed.wait(), self.like)

    def send_back(self, out_NH: Tensor) -> None:
        """See `Exchange.send_back`."""
        self.back = start_reduce_scatter(out_NH, self.dispatcher.group)

    def returned(self) -> Tensor:
        """See `Exchange.returned`."""
        assert self.back is not None, "send_back comes first"
        return self.dispatcher.finish(self.back.wait()[: len(self.like)])


class _Direct(Exchange):
    """By launches of this stream, through memory that the members share."""

    def __init__(
        self,
        dispatcher: AllGatherDispatcher,
        direct: DirectRows,
        message: Tensor,
        packed: Tensor,
        like: Tensor,
    ) -> None:
        self.dispatcher, self.direct, self.like = dispatcher, direct, like
        self.gathered = direct.gather(message, packed)
        self.back: Tensor | None = None

    def arrived(self) -> tuple[Tensor, Routing]:
        """See `Exchange.arrived`: [M * N, H]."""
        return _arrived(self.dispatcher, *self.gathered, self.like)

    def send_back(self, out_NH: Tensor) -> None:
        """See `Exchange.send_back`."""
        self.back = self.direct.scatter(out_NH)

    def returned(self) -> Tensor:
        """See `Exchange.returned`."""
        assert self.back is not None, "send_back comes first"
        return self.dispatcher.finish(self.back[: len(self.like)])
