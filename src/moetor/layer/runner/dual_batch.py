"""Two halves of the tokens: one's communication under the other's computation.

Shape letters: T tokens, X hidden of the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.layer.runner.base import Between, ExpertsOwner, add_identity
from moetor.layer.runner.default import DefaultRunner, part_of


class DualBatchRunner(DefaultRunner):
    """Sends both halves off, and computes the one while the other travels.

    The second half is dispatched under the first one's experts, and the first half's results
    return under the second one's. All runs on one stream; the collectives' own stream does the
    rest, so a CUDA graph holds it. A layer whose dispatcher does not communicate has nothing to
    hide, and runs in one.

    Args:
        min_tokens: fewer tokens than this, on the rank with the most, run in one: halves have
            smaller products and twice the messages.
    """

    def __init__(self, min_tokens: int) -> None:
        self.min_tokens = min_tokens

    def run_experts(
        self,
        owner: ExpertsOwner,
        hidden_TX: Tensor,
        routing: Routing,
        *,
        between: Between | None = None,
    ) -> Tensor:
        """See `MoERunner.run_experts`; `between` runs while both halves travel."""
        dispatcher, experts = owner.dispatcher, owner.routed_experts
        rows = dispatcher.common_rows(hidden_TX)
        if not dispatcher.communicates or rows < max(self.min_tokens, 2):
            return self.run_rows(owner, hidden_TX, routing, rows, between)
        half = (rows + 1) // 2
        parts = [
            (hidden_TX[start:stop], part_of(routing, start, stop), stop - start)
            for start, stop in ((0, half), (half, rows))
        ]
        first, second = (dispatcher.begin(*part) for part in parts)
        if between is not None:
            between()
        for exchange in (first, second):
            exchange.send_back(experts.run(*exchange.arrived()))
        returned = [
            add_identity(exchange.returned(), hidden, part, owner.ranks)
            for exchange, (hidden, part, _) in zip((first, second), parts, strict=True)
        ]
        return torch.cat(returned)
