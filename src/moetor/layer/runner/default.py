"""All tokens at once. Shape letters: T tokens, E router logits, X hidden of the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.layer.runner.base import ExpertsOwner, MoERunner

if TYPE_CHECKING:
    from moetor.layer.moe import MoELayer


class DefaultRunner(MoERunner):
    """Dispatches, computes and combines every token in one step."""

    def run_experts(self, owner: ExpertsOwner, hidden_TX: Tensor, routing: Routing) -> Tensor:
        """See `MoERunner.run_experts`."""
        sent, sent_routing = owner.dispatcher.dispatch(hidden_TX, routing)
        out_TX = owner.dispatcher.combine(owner.routed_experts.run(sent, sent_routing))
        return add_identity(out_TX, hidden_TX, routing)

    def run_monolithic(self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor) -> Tensor:
        """See `MoERunner.run_monolithic`."""
        return layer.routed_experts.run_logits(
            hidden_TX, logits_TE, layer.config.router, layer.selection_bias
        )


def add_identity(out_TX: Tensor, hidden_TX: Tensor, routing: Routing) -> Tensor:
    """Adds the share of the identity experts, which return their input (LongCat-Flash)."""
    if routing.identity_weights is None:
        return out_TX
    share = hidden_TX.float() * routing.identity_weights.unsqueeze(-1)
    return (out_TX.float() + share).to(out_TX.dtype)
