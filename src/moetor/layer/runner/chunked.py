"""Tokens in chunks whose length follows from a byte budget.

Shape letters: T tokens, E router logits, X hidden of the experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetor.errors import ConfigError
from moetor.kernels.routing import Routing
from moetor.layer.runner.base import Between, ExpertsOwner
from moetor.layer.runner.default import DefaultRunner, part_of

if TYPE_CHECKING:
    from moetor.layer.moe import MoELayer


class ChunkedRunner(DefaultRunner):
    """Bounds the routed experts' temporary memory: routing covers all tokens, the experts take them
    chunk by chunk.

    Args:
        workspace_bytes: upper bound of a chunk's temporary memory. A single token is always run.
    """

    def __init__(self, workspace_bytes: int) -> None:
        if workspace_bytes < 1:
            raise ConfigError(f"workspace_bytes={workspace_bytes} must be at least 1")
        self.workspace_bytes = workspace_bytes

    def chunk_tokens(self, owner: ExpertsOwner) -> int:
        """Tokens per chunk under the budget, on this rank."""
        tokens = owner.routed_experts.tokens_within(self.workspace_bytes)
        return max(1, tokens // owner.dispatcher.fan_in)

    def run_experts(
        self,
        owner: ExpertsOwner,
        hidden_TX: Tensor,
        routing: Routing,
        *,
        between: Between | None = None,
    ) -> Tensor:
        """See `MoERunner.run_experts`; `between` belongs to the first chunk.

        Ranks that exchange tokens take equally many chunks, some of them empty.
        """
        out_TX = torch.empty_like(hidden_TX)
        rows = owner.dispatcher.common_rows(hidden_TX)
        length = owner.dispatcher.agree_least(self.chunk_tokens(owner), hidden_TX.device)
        for start, stop in _chunks(length, rows):
            out_TX[start:stop] = self.run_rows(
                owner,
                hidden_TX[start:stop],
                part_of(routing, start, stop),
                stop - start,
                between if start == 0 else None,
            )
        return out_TX

    def run_monolithic(self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor) -> Tensor:
        """See `MoERunner.run_monolithic`."""
        out_TX = torch.empty_like(hidden_TX)
        for start, stop in _chunks(self.chunk_tokens(layer), hidden_TX.shape[0]):
            out_TX[start:stop] = super().run_monolithic(
                layer, hidden_TX[start:stop], logits_TE[start:stop]
            )
        return out_TX


def _chunks(length: int, rows: int) -> list[tuple[int, int]]:
    """At least one, so that what runs between dispatch and combine runs without a token too."""
    return [(start, min(start + length, rows)) for start in range(0, max(rows, 1), length)]
