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
        sent, sent_routing = owner.dispatcher.dispatch(hidden_TX, routing)
        if between is not None:
            between()
        out_TX = owner.dispatcher.combine(owner.routed_experts.run(sent, sent_routing))
        return add_identity(out_TX, hidden_TX, routing, owner.ranks)

    def run_monolithic(self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor) -> Tensor:
        """See `MoERunner.run_monolithic`."""
        return layer.routed_experts.run_logits(
            hidden_TX, logits_TE, layer.config.router, layer.selection_bias
        )
