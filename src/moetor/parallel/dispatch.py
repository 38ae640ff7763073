"""Bringing tokens to the ranks that hold their experts, and the results back.

Shape letters: T tokens of this rank, N rows that arrive at this rank, K top_k, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from moetor.errors import InputError
from moetor.kernels.routing import Routing
from moetor.parallel.collectives import host_agree
from moetor.parallel.placement import ExpertMap
from moetor.parallel.wire import PlainWire, Wire

if TYPE_CHECKING:
    from collections.abc import Iterator

_agreed: ContextVar[int | None] = ContextVar("moetor_agreed_rows", default=None)


@contextmanager
def agreed_rows(rows: int) -> Iterator[None]:
    """Tells the dispatchers called inside that no rank has more than `rows` tokens per call.

    For whoever drives the ranks and has agreed on it once, instead of at every layer; every rank
    must say the same.
    """
    token = _agreed.set(rows)
    try:
        yield
    finally:
        _agreed.reset(token)


class Exchange:
    """One batch on its way to the experts and back.

    Between its three steps other work may run; what is communicated is communicated meanwhile.
    This one's dispatcher waits in each step.
    """

    def __init__(self, dispatcher: Dispatcher, hidden_TH: Tensor, routing: Routing) -> None:
        self._dispatcher = dispatcher
        self._arrived = dispatcher.dispatch(hidden_TH, routing)
        self._result: Tensor | None = None

    def arrived(self) -> tuple[Tensor, Routing]:
        """Tokens [N, H] and routing as the local experts see them."""
        return self._arrived

    def send_back(self, out_NH: Tensor) -> None:
        """Takes the local experts' results."""
        self._result = self._dispatcher.combine(out_NH)

    def returned(self) -> Tensor:
        """The results [T, H] of this rank's tokens."""
        assert self._result is not None, "send_back comes first"
        return self._result


class Dispatcher(ABC):
    """The two communications around the routed experts."""

    communicates: bool
    """Whether there is anything under which shared experts can be overlapped."""
    fan_in: int = 1
    """Rows that may arrive per token of the rank with the most."""

    @abstractmethod
    def dispatch(self, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """Tokens and routing as the local experts see them."""

    @abstractmethod
    def combine(self, out_NH: Tensor) -> Tensor:
        """The local experts' results, brought back to the ranks of their tokens."""

    def begin(self, hidden_TH: Tensor, routing: Routing, rows: int) -> Exchange:
        """Starts a dispatch whose combine follows; several may be under way.

        Args:
            rows: as `common_rows` gave it, for the whole call or a part of it.
        """
        return Exchange(self, hidden_TH, routing)

    def common_rows(self, hidden_TH: Tensor) -> int:
        """A bound of every rank's tokens in this call, the same on all of them."""
        return hidden_TH.shape[0]

    def agree_least(self, value: int, device: torch.device) -> int:
        """The least of the ranks' values; asked once per value, and so in the same order on all."""
        return value


class LocalDispatcher(Dispatcher):
    """One device holds every expert: nothing to send."""

    communicates = False

    def dispatch(self, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """The arguments themselves."""
        return hidden_TH, routing

    def combine(self, out_NH: Tensor) -> Tensor:
        """The argument itself."""
        return out_NH


class ReplicatedDispatcher(Dispatcher):
    """Every rank has every token and some of the experts: slots of the others are dropped, and the
    ranks' results are summed afterwards.

    Args:
        experts: where experts are; None where every rank has a slice of each of them.
        reduce_group: sum over it in the combine, for a caller that does not.
    """

    communicates = False

    def __init__(
        self,
        experts: ExpertMap | None,
        reduce_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.experts = experts
        self.reduce_group = reduce_group

    def dispatch(self, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """The tokens, and the slots of this rank's experts."""
        if self.experts is None:
            return hidden_TH, routing
        physical_TK = self.experts.physical(routing.topk_ids)
        return hidden_TH, self.experts.held(routing.topk_weights, physical_TK)

    def combine(self, out_NH: Tensor) -> Tensor:
        """The argument, or its sum over the group."""
        if self.reduce_group is not None:
            dist.all_reduce(out_NH, group=self.reduce_group)
        return out_NH


class TokenDispatcher(Dispatcher):
    """What dispatchers that send tokens share.

    Args:
        group: its members have different tokens.
        experts: where experts are, seen from this group.
        max_rows: `ParallelConfig.max_tokens_per_rank`.
        uniform: the members always have equally many tokens (sequence parallel).
        reduce_group: sum over it after the combine, for a caller that does not.
        wire: how tokens travel; as they are by default.
    """

    communicates = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        experts: ExpertMap,
        *,
        max_rows: int | None = None,
        uniform: bool = False,
        reduce_group: dist.ProcessGroup | None = None,
        wire: Wire | None = None,
    ) -> None:
        self.wire = PlainWire() if wire is None else wire
        self.group = group
        self.experts = experts
        self.max_rows = max_rows
        self.uniform = uniform
        self.reduce_group = reduce_group
        self.fan_in = group.size()
        self._open: Exchange | None = None
        self._least: dict[int, int] = {}

    @abstractmethod
    def begin(self, hidden_TH: Tensor, routing: Routing, rows: int) -> Exchange:
        """See `Dispatcher.begin`."""

    def dispatch(self, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """See `Dispatcher.dispatch`."""
        self._open = self.begin(hidden_TH, routing, self.common_rows(hidden_TH))
        return self._open.arrived()

    def combine(self, out_NH: Tensor) -> Tensor:
        """See `Dispatcher.combine`."""
        assert self._open is not None, "dispatch comes first"
        exchange, self._open = self._open, None
        exchange.send_back(out_NH)
        return exchange.returned()

    @property
    def known_rows(self) -> int | None:
        """The bound on the members' tokens where it is known without asking them."""
        agreed = _agreed.get()
        return self.max_rows if agreed is None else agreed

    def common_rows(self, hidden_TH: Tensor) -> int:
        """See `Dispatcher.common_rows`.

        Raises:
            InputError: this rank has more tokens than was agreed.
            UnsupportedError: nothing was agreed, and a CUDA graph is being captured.
        """
        tokens, known = hidden_TH.shape[0], self.known_rows
        if known is not None and tokens > known:
            raise InputError(
                f"{tokens} tokens were given where at most {known} were agreed between the ranks; "
                "raise max_tokens_per_rank or agreed_rows(...)"
            )
        if self.uniform:
            return tokens
        if known is not None:
            return known
        return host_agree(tokens, dist.ReduceOp.MAX, self.group, hidden_TH.device)

    def agree_least(self, value: int, device: torch.device) -> int:
        """See `Dispatcher.agree_least`."""
        if value not in self._least:
            self._least[value] = host_agree(value, dist.ReduceOp.MIN, self.group, device)
        return self._least[value]

    def finish(self, out_TH: Tensor) -> Tensor:
        """The last sum, where there is one."""
        if self.reduce_group is not None:
            dist.all_reduce(out_TH, group=self.reduce_group)
        return out_TH
