"""How often each expert was chosen, counted while the engine runs.

Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from moetor.errors import ConfigError
from moetor.huggingface.modules import fused_modules
from moetor.layer.context import ForwardContext, forward_context
from moetor.layer.recording import RoutingRecorder


class ExpertLoad(RoutingRecorder):
    """Counts on the device, also inside CUDA graphs. Identity experts do not count.

    Args:
        model: a fused model.
        device: of its layers.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._paths: dict[str, str] = {}
        self._counts: dict[str, Tensor] = {}
        self._split: set[str] = set()
        for path, module in fused_modules(model):
            spread = module.parallel
            size = module.routed_experts.config.num_experts
            if spread is not None and spread.experts is not None:
                size = spread.experts.placement.num_experts  # of all ranks: ids are the router's
            if spread is not None and spread.split_group is not None:
                self._split.add(path)
            self._paths[module.name] = path
            # One place more for dropped slots, whose id is the number of experts.
            self._counts[module.name] = torch.zeros(size + 1, dtype=torch.int64, device=device)

    def note(self, layer: str, ids_TK: Tensor) -> None:
        """Adds one call's ids."""
        counts_E = self._counts[layer]
        ids = ids_TK.reshape(-1).long().clamp(max=counts_E.numel() - 1)
        counts_E.index_add_(0, ids, torch.ones_like(ids))

    def counts(self) -> dict[str, list[int]]:
        """Tokens of each expert, by the layer's path in the model."""
        # One copy to the host: each waits for the device.
        whole = iter(torch.cat([self._counts[name] for name in self._paths]).tolist())
        return {
            path: list(islice(whole, self._counts[name].numel()))[:-1]
            for name, path in self._paths.items()
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
        """Counts the calls inside the `with` block."""
        with forward_context(ForwardContext(recorder=self)):
            yield


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
