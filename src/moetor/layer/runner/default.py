"""All tokens at once. Shape letters: T tokens, E router logits, X hidden of the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.layer.runner.base import Between, ExpertsOwner, MoERunner, add_identity

if TYPE_CHECKING:
    from moetor.layer.moe import MoELayer


class DefaultRunner(MoERunner):
    """Dispatches, computes and combines every token in one step."""

    def run_experts(
        self,
        owner: ExpertsOwner,
        hidden_TX: Tensor,
        routing: Routing,
        *,
        between: Between | None = None,
    ) -> Tensor:
        """See `MoERunner.run_experts`."""
        rows = owner.dispatcher.common_rows(hidden_TX)
        return self.run_rows(owner, hidden_TX, routing, rows, between)

    def run_rows(
        self,
        owner: ExpertsOwner,
        hidden_TX: Tensor,
        routing: Routing,
        rows: int,
        between: Between | None = None,
    ) -> Tensor:
        """Dispatch, experts and combine of at most `rows` tokens per rank."""
        exchange = owner.dispatcher.begin(hidden_TX, routing, rows)
        if between is not None:
            between()
        exchange.send_back(owner.routed_experts.run(*exchange.arrived()))
        return add_identity(exchange.returned(), hidden_TX, routing, owner.ranks)

    def run_monolithic(self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor) -> Tensor:
        """See `MoERunner.run_monolithic`."""
        return layer.routed_experts.run_logits(
            hidden_TX, logits_TE, layer.config.router, layer.selection_bias
        )


def part_of(routing: Routing, start: int, stop: int) -> Routing:
    """The routing of some of the tokens."""
    identity = routing.identity_weights
    return Routing(
        routing.topk_weights[start:stop],
        routing.topk_ids[start:stop],
        None if identity is None else identity[start:stop],
    )
