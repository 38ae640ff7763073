"""How often each expert was chosen, counted while the engine runs.

Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from moetor.errors import ConfigError
from moetor.huggingface.modules import fused_modules
from moetor.layer.context import ForwardContext, forward_context
from moetor.layer.recording import RoutingRecorder


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's place among the counts.

    Attributes:
        number: in the order of the model.
        first: of its counts.
        experts: how many count; identity experts and dropped slots behind them do not.
        ids: that a slot may have: experts, identity experts, and that of nothing.
    """

    path: str
    number: int
    first: int
    experts: int
    ids: int


class ExpertLoad(RoutingRecorder):
    """Counts on the device, also inside CUDA graphs. Identity experts do not count.

    What layers note is counted when the model call is over, all layers together: a few launches
    for each layer would cost a decoding step of few tokens a tenth of its time.

    Args:
        model: a fused model.
        device: of its layers.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._layers: dict[str, _Layer] = {}
        self._split: set[str] = set()
        first = 0
        for number, (path, module) in enumerate(fused_modules(model)):
            spread = module.parallel
            size = module.routed_experts.config.num_experts
            if spread is not None and spread.experts is not None:
                size = spread.experts.placement.num_experts  # of all ranks: ids are the router's
            if spread is not None and spread.split_group is not None:
                self._split.add(path)
            self._layers[module.name] = _Layer(path, number, first, size, module.num_ids + 1)
            first += module.num_ids + 1
        self._counts = torch.zeros(first, dtype=torch.int64, device=device)
        self._firsts_L = torch.tensor(
            [layer.first for layer in self._layers.values()], dtype=torch.int64, device=device
        )
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._noted: list[tuple[_Layer, Tensor, Tensor | None]] = []

    def note(self, layer: str, ids_TK: Tensor, tokens_T: Tensor | None, nothing: int) -> None:
        """One call's ids, to be counted."""
        self._noted.append((self._layers[layer], ids_TK, tokens_T))

    def count(self) -> None:
        """Adds what was noted."""
        noted, self._noted = self._noted, []
        # Neighbours with ids of one shape are counted together: most models are one group.
        keyed = enumerate(noted)
        for _, group in groupby(keyed, lambda one: _group_key(one[0], *one[1])):
            calls = [call for _, call in group]
            layer, _, tokens_T = calls[0]
            ids_LTK = torch.stack([ids for _, ids, _ in calls])
            if tokens_T is not None:
                ids_LTK = torch.where(tokens_T.unsqueeze(1), ids_LTK, layer.ids - 1)
            firsts_L = self._firsts_L[layer.number : layer.number + len(calls)]
            places = (ids_LTK + firsts_L.view(-1, 1, 1)).flatten()
            self._counts.index_add_(0, places, self._one.expand(places.shape))

    def counts(self) -> dict[str, list[int]]:
        """Tokens of each expert, by the layer's path in the model."""
        # One copy to the host: each waits for the device.
        whole = self._counts.tolist()
        return {
            layer.path: whole[layer.first : layer.first + layer.experts]
            for layer in self._layers.values()
        }

    def own_counts(self, rank: int) -> dict[str, list[int]]:
        """The same, of tokens that no other rank of a tensor-parallel group counts.

        Args:
            rank: in this group.
        """
        return {
            path: found if rank == 0 or path in self._split else [0] * len(found)
            for path, found in self.counts().items()
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Counts the model call inside the `with` block; one that fails does not count."""
        try:
            with forward_context(ForwardContext(recorder=self)):
                yield
            self.count()
        finally:
            self._noted.clear()


def _group_key(
    place: int, layer: _Layer, ids_TK: Tensor, tokens_T: Tensor | None
) -> tuple[int, int, torch.Size, int]:
    """Equal for calls, `place` in their order, that are counted together."""
    return layer.number - place, layer.ids, ids_TK.shape, id(tokens_T)


def summed(counts: Sequence[dict[str, list[int]]]) -> dict[str, list[int]]:
    """The sum of several ranks' counts."""
    return {
        path: [sum(one) for one in zip(*(rank[path] for rank in counts), strict=True)]
        for path in counts[0]
    }


def expert_counts(load: ExpertLoad | None) -> dict[str, list[int]]:
    """What `load` has counted.

    Raises:
        ConfigError: nothing is counted.
    """
    if load is None:
        raise ConfigError("no expert load is counted; set record_expert_load=True")
    return load.counts()
