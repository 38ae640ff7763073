"""One layer whose experts are in host memory.

Shape letters: T tokens, K top_k, H hidden, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.layer.offload.lane import Join
from moetor.layer.offload.store import LayerStore
from moetor.parallel.placement import held_by_table

if TYPE_CHECKING:
    from moetor.layer.offload.group import ExpertOffload


class OffloadedLayer:
    """Splits a call's slots: those of cached experts on the GPU, the others on the host at the same
    time; with many tokens, part of the others or all of them are computed on the GPU too, to which
    their experts are copied chunk by chunk.

    Args:
        number: of the layer in its group.
    """

    def __init__(self, group: ExpertOffload, store: LayerStore, number: int) -> None:
        self.group, self.store, self.number = group, store, number
        self.num_experts = store.experts.config.num_experts
        self.host_weights = store.experts.kernel_weights
        self.config = store.experts.config

    def run(self, hidden_TH: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the routed experts, [T, H]: two sums, each rounded to the dtype of
        `hidden_TH`, whose sum is rounded once more; with chunks, sums of them in float32.
        """
        if hidden_TH.shape[0] == 0:
            return torch.empty_like(hidden_TH)
        group = self.group
        if self.number == 0:
            group.step()
        weights_TK, ids_TK = routing.topk_weights, routing.topk_ids.to(torch.int32)
        group.count(self.number, ids_TK)
        if group.streams(hidden_TH.shape[0]):
            return self._streamed(hidden_TH, weights_TK, ids_TK)
        slots_E1, host_E1, _ = self._tables()
        cached = self.store.cached
        if cached is not None and cached.config.num_experts == self.num_experts:
            # All are there, and none ever moves.
            return cached.run(
                hidden_TH, held_by_table(weights_TK, ids_TK, slots_E1, self.num_experts)
            )
        on_host = held_by_table(weights_TK, ids_TK, host_E1, self.num_experts)
        join = self._start(hidden_TH, on_host)
        if cached is None:
            return join()
        slots = cached.config.num_experts
        cached_TH = cached.run(hidden_TH, held_by_table(weights_TK, ids_TK, slots_E1, slots))
        return join().add_(cached_TH)

    def _start(self, hidden_TH: Tensor, on_host: Routing) -> Join:
        return self.group.lane.start(
            self.number,
            self.host_weights,
            self.config,
            hidden_TH,
            on_host.topk_weights,
            on_host.topk_ids,
        )

    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, host's experts and places of those that are not in the cache, by expert id."""
        slots_E1, host_E1, place_E1 = self.group.tables[self.number, :, : self.num_experts + 1]
        return slots_E1, host_E1, place_E1

    def _streamed(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """The first of the experts that are not in the cache are copied, the host has the rest."""
        slots_E1, host_E1, place_E1 = self._tables()
        absent = self.group.hot.absent(self.number)
        wanted = absent[: self.group.balance.copied(hidden_TH.shape[0], len(absent))]
        place_TK = place_E1[ids_TK.long()]
        join: Join | None = None
        if len(wanted) < len(absent):
            copied_TK = place_TK < len(wanted)
            host_TK = torch.where(copied_TK, self.num_experts, host_E1[ids_TK.long()])
            join = self._start(hidden_TH, Routing(weights_TK, host_TK))
        sum_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        cached = self.store.cached
        if cached is not None:
            slots = cached.config.num_experts
            sum_TH += cached.run(hidden_TH, held_by_table(weights_TK, ids_TK, slots_E1, slots))
        staging = self.group.staging(self.store)
        for start, experts in staging.chunks(self.store, wanted):
            count = min(staging.count, len(wanted) - start)
            slot_TK = place_TK - start
            inside_TK = (slot_TK >= 0) & (slot_TK < count)
            part = Routing(
                torch.where(inside_TK, weights_TK, 0.0),
                torch.where(inside_TK, slot_TK, staging.count),
            )
            sum_TH += experts.run(hidden_TH, part)
        if join is not None:
            sum_TH += join()
        return sum_TH.to(hidden_TH.dtype)

    def workspace_bytes_per_token(self) -> int:
        """Temporary memory of a call per token, on the GPU."""
        experts = self.store.cached
        if experts is None and self.group.stream_min_tokens is None:
            return 0
        of = self.store.experts
        choice = of.method.choice(of.config, of.top_k, self.group.device, of.dtype)
        return choice.kernel.workspace_bytes_per_token(of.config, of.top_k, of.dtype)
