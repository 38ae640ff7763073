"""Dispatch and combine by all-to-all: a token travels once to each member that holds one of its
experts, and one weighted sum comes back from each.

Where the members' counts are not known beforehand, exactly the rows that are needed travel, and
the host waits for the counts. Where a bound is known (`max_tokens_per_rank`, `agreed_rows`), every
pair of members exchanges that many rows and the counts stay on the device: all shapes are fixed,
and a CUDA graph can hold it. Shape letters: M members, N rows, T tokens of this rank, K top_k, H
hidden.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moetor.errors import UnsupportedError
from moetor.kernels.routing import Routing
from moetor.parallel.collectives import Started, start_all_to_all
from moetor.parallel.dispatch import Exchange, TokenDispatcher


class AllToAllDispatcher(TokenDispatcher):
    """Sends every token to the members that hold its experts."""

    def begin(self, hidden_TH: Tensor, routing: Routing, rows: int) -> Exchange:
        """See `Dispatcher.begin`.

        Raises:
            UnsupportedError: no bound is known, and a CUDA graph is being captured.
        """
        slots_MTK = self.experts.all_slots(self.experts.physical(routing.topk_ids))
        size_M = self.experts.all_num_slots(hidden_TH.device)
        goes_MT = (slots_MTK < size_M[:, None, None]).any(dim=-1)
        parcel = _Parcel(hidden_TH, routing.topk_weights, slots_MTK, goes_MT)
        if self.known_rows is not None or self.uniform:
            return _Bounded(self, parcel, rows)
        if hidden_TH.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "an all-to-all of exactly the rows that are needed counts them on the host, which "
                "a CUDA graph cannot hold; give ParallelConfig(max_tokens_per_rank=...) or run the "
                "call inside agreed_rows(...)"
            )
        return _Exact(self, parcel)


class _Parcel:
    """What is to be sent: tokens, weights, their slots on every member, and who gets which."""

    def __init__(
        self, hidden_TH: Tensor, weights_TK: Tensor, slots_MTK: Tensor, goes_MT: Tensor
    ) -> None:
        self.hidden_TH = hidden_TH
        self.weights_TK = weights_TK
        self.slots_MTK = slots_MTK
        self.goes_MT = goes_MT

    def routing_bits(self) -> Tensor:
        """Int32 [M, T, 2 K]: weights, as their bits, and slots on each member."""
        weights = self.weights_TK.contiguous().view(torch.int32)
        return torch.cat((weights.expand_as(self.slots_MTK), self.slots_MTK), dim=-1)


class _Travelling(Exchange):
    """What both forms share: unpacking what arrives, and summing what returns."""

    dispatcher: AllToAllDispatcher
    parcel: _Parcel
    hidden: Started
    packed: Started
    back: Started | None = None

    def arrived(self) -> tuple[Tensor, Routing]:
        """See `Exchange.arrived`."""
        packed = self.packed.wait()
        top_k = packed.shape[1] // 2
        weights = packed[:, :top_k].contiguous().view(torch.float32)
        slots = packed[:, top_k:].contiguous()
        here = slots < self.dispatcher.experts.num_slots()
        hidden = self.dispatcher.wire.unpack(self.hidden.wait(), self.parcel.hidden_TH)
        return hidden, Routing(torch.where(here, weights, 0.0), slots)

    def _sum(self, rows_NH: Tensor, row_MT: Tensor) -> Tensor:
        """The sum over members of the rows that belong to each token, members in order.

        Args:
            row_MT: which row a member's answer for a token is; any, where it got none.
        """
        hidden_TH = self.parcel.hidden_TH
        wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        total = torch.zeros(hidden_TH.shape, dtype=wide, device=hidden_TH.device)
        for row_T, goes_T in zip(row_MT, self.parcel.goes_MT, strict=True):
            part = rows_NH[row_T].to(wide)
            total += torch.where(goes_T.unsqueeze(1), part, 0.0)
        return self.dispatcher.finish(total.to(hidden_TH.dtype))


class _Exact(_Travelling):
    def __init__(self, dispatcher: AllToAllDispatcher, parcel: _Parcel) -> None:
        self.dispatcher, self.parcel = dispatcher, parcel
        group, goes_MT = dispatcher.group, parcel.goes_MT
        counts_M = goes_MT.sum(dim=1)
        theirs_M = torch.empty_like(counts_M)
        dist.all_to_all_single(theirs_M, counts_M, group=group)
        self.sent, self.received = torch.stack((counts_M, theirs_M)).tolist()
        token_N = goes_MT.nonzero()[:, 1]
        bits_NX = parcel.routing_bits()[goes_MT]
        message_TB = dispatcher.wire.pack(parcel.hidden_TH)
        self.hidden = start_all_to_all(message_TB[token_N], group, self.sent, self.received)
        self.packed = start_all_to_all(bits_NX, group, self.sent, self.received)
        row = goes_MT.flatten().cumsum(0).view_as(goes_MT) - 1
        self.row_MT = row.clamp(min=0)

    def send_back(self, out_NH: Tensor) -> None:
        """See `Exchange.send_back`."""
        self.back = start_all_to_all(out_NH, self.dispatcher.group, self.received, self.sent)

    def returned(self) -> Tensor:
        """See `Exchange.returned`."""
        assert self.back is not None, "send_back comes first"
        rows_NH = self.back.wait()
        if rows_NH.shape[0] == 0:  # nothing was sent, so that no row can stand for none
            rows_NH = rows_NH.new_zeros((1, rows_NH.shape[1]))
        return self._sum(rows_NH, self.row_MT)


class _Bounded(_Travelling):
    def __init__(self, dispatcher: AllToAllDispatcher, parcel: _Parcel, rows: int) -> None:
        self.dispatcher, self.parcel = dispatcher, parcel
        goes_MT, hidden_TH = parcel.goes_MT, parcel.hidden_TH
        members = goes_MT.shape[0]
        place_MT = goes_MT.cumsum(dim=1) - 1
        base_M1 = torch.arange(members, device=goes_MT.device).unsqueeze(1) * (rows + 1)
        # Row `rows` of every member takes what is not sent, and is cut off.
        target_MT = base_M1 + torch.where(goes_MT, place_MT, rows)
        bits = parcel.routing_bits()
        width = bits.shape[-1]
        nothing_M = dispatcher.experts.all_num_slots(bits.device)
        packed = nothing_M[:, None, None].expand(members, rows + 1, width).contiguous()
        packed = packed.view(-1, width).index_copy(0, target_MT.flatten(), bits.flatten(0, 1))
        message_TB = dispatcher.wire.pack(hidden_TH)
        hidden = message_TB.new_zeros((members * (rows + 1), message_TB.shape[1]))
        spread = message_TB.expand(members, *message_TB.shape).reshape(-1, message_TB.shape[1])
        hidden = hidden.index_copy(0, target_MT.flatten(), spread)
        self.hidden = start_all_to_all(_cut(hidden, members, rows), dispatcher.group)
        self.packed = start_all_to_all(_cut(packed, members, rows), dispatcher.group)
        last = max(rows - 1, 0)
        start_M1 = torch.arange(members, device=goes_MT.device).unsqueeze(1) * rows
        self.row_MT = start_M1 + place_MT.clamp(min=0, max=last)

    def send_back(self, out_NH: Tensor) -> None:
        """See `Exchange.send_back`."""
        self.back = start_all_to_all(out_NH, self.dispatcher.group)

    def returned(self) -> Tensor:
        """See `Exchange.returned`."""
        assert self.back is not None, "send_back comes first"
        return self._sum(self.back.wait(), self.row_MT)


def _cut(padded: Tensor, members: int, rows: int) -> Tensor:
    """The rows that travel: all but the last one of every member."""
    width = padded.shape[1]
    return padded.view(members, rows + 1, width)[:, :rows].reshape(members * rows, width)
