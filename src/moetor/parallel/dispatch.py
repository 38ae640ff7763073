"""Bringing tokens to the ranks that hold their experts, and the results back.

Shape letters: T tokens of this rank, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from moetor.kernels.routing import Routing


class Dispatcher(ABC):
    """The two communications around the routed experts."""

    communicates: bool
    """Whether there is anything under which shared experts can be overlapped."""

    @abstractmethod
    def dispatch(self, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """Tokens and routing as the local experts see them."""

    @abstractmethod
    def combine(self, out_TH: Tensor) -> Tensor:
        """The local experts' results, brought back to the ranks of their tokens."""


class LocalDispatcher(Dispatcher):
    """One device holds every expert: nothing to send."""

    communicates = False

    def dispatch(self, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """The arguments themselves."""
        return hidden_TH, routing

    def combine(self, out_TH: Tensor) -> Tensor:
        """The argument itself."""
        return out_TH


def all_reduce(partial_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' partial results, as a new tensor; traceable by `torch.compile`."""
    result: Tensor = collectives.all_reduce(partial_TH, "sum", group)
    return result
