"""Where a text's tokens go: how often each expert of each layer is chosen.

Shape letters: T tokens, L layers, E experts, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetor.errors import InputError
from moetor.huggingface.modules import fused_modules
from moetor.huggingface.routed_experts import record_routing


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLoad:
    """One layer's load.

    Attributes:
        layer: path of the layer.
        counts: slots that went to each expert, [E]; dropped slots are in none.
        dropped: slots without an expert.
    """

    layer: str
    counts: tuple[int, ...]
    dropped: int

    @property
    def slots(self) -> int:
        """Slots that went to an expert."""
        return sum(self.counts)

    @property
    def busiest_share(self) -> float:
        """Share of the slots that the busiest expert got; 1 / E when all are equal."""
        return max(self.counts) / self.slots if self.slots else 0.0

    @property
    def balancedness(self) -> float:
        """Mean load over the largest: 1 when all are equal, 1 / E when one expert gets all."""
        return self.slots / len(self.counts) / max(self.counts) if self.slots else 1.0

    @property
    def entropy(self) -> float:
        """Entropy of the shares over its largest value, log E: 1 when all are equal."""
        if self.slots == 0 or len(self.counts) == 1:
            return 1.0
        shares = [count / self.slots for count in self.counts if count]
        return -sum(share * math.log(share) for share in shares) / math.log(len(self.counts))

    @property
    def unused(self) -> int:
        """Experts that no token chose."""
        return sum(count == 0 for count in self.counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """The load of all layers for one text.

    Attributes:
        tokens: T, tokens of the text.
    """

    tokens: int
    layers: tuple[LayerLoad, ...]

    def to_dict(self) -> dict[str, Any]:
        """The load as plain data, for JSON."""
        derived = ("busiest_share", "balancedness", "entropy", "unused")
        return {
            "tokens": self.tokens,
            "layers": [
                {**asdict(layer), **{name: getattr(layer, name) for name in derived}}
                for layer in self.layers
            ],
        }


@torch.no_grad()
def expert_load(
    model: nn.Module,
    ids_T: Tensor,
    *,
    window: int,
    progress: Callable[[int, int], None] | None = None,
) -> ExpertLoad:
    """Runs a text through a fused model and counts where its tokens go.

    Args:
        ids_T: token ids of the text.
        window: tokens per forward pass; passes do not see each other.
        progress: called with (done, total) tokens.

    Raises:
        FusionError: the model is not fused.
        InputError: no tokens, or a window below 1.
    """
    tokens = ids_T.numel()
    if tokens == 0 or window < 1:
        raise InputError(f"{tokens} tokens in windows of {window}: both must be at least 1")
    totals: dict[str, Tensor] = {}
    sizes = {path: m.routed_experts.config.num_experts for path, m in fused_modules(model)}
    for start in range(0, tokens, window):
        with record_routing(model) as record:
            model(input_ids=ids_T[None, start : start + window])
        for layer in record.layers:
            ids = (
                record.ids_of(layer).flatten().clamp(max=sizes[layer])
            )  # identity experts, dropped
            counts = torch.bincount(ids, minlength=sizes[layer] + 1)
            totals[layer] = totals.get(layer, torch.zeros_like(counts)) + counts
        if progress is not None:
            progress(min(start + window, tokens), tokens)
    return ExpertLoad(tokens=tokens, layers=tuple(_layer_loads(totals.items())))


def _layer_loads(totals: Iterable[tuple[str, Tensor]]) -> Iterable[LayerLoad]:
    for layer, counts in totals:
        *experts, dropped = counts.tolist()
        yield LayerLoad(layer=layer, counts=tuple(experts), dropped=dropped)
