"""Which experts each token of a sequence went to, kept beside its place in the paged cache.

A token that a request shares with an earlier one by the prefix cache keeps what was noted then.
Shape letters: T tokens, K top_k, L layers, N slots of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moetor.engine.cache import EngineCache
from moetor.engine.load import ExpertLoad
from moetor.engine.sequence import Sequence
from moetor.errors import ConfigError
from moetor.huggingface.modules import fused_modules
from moetor.layer.context import ForwardContext, forward_context
from moetor.layer.recording import RoutingRecorder


class SequenceRoutes(RoutingRecorder):
    """Notes ids on the device, also inside CUDA graphs.

    Args:
        model: a fused model.
        cache: of the engine, whose calls say which slots their tokens have.
        slots: N.
        block_size: of the cache.
        outer: is told everything, too.

    Raises:
        ConfigError: the model has no fused layer.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: EngineCache,
        *,
        slots: int,
        block_size: int,
        outer: ExpertLoad | None,
    ) -> None:
        super().__init__(outer)
        self._told = outer
        self._cache, self._block_size, self._slots = cache, block_size, slots
        names = [module.name for _, module in fused_modules(model)]
        if not names:
            raise ConfigError("enable_return_routed_experts needs a fused model with experts")
        self._place = {name: layer for layer, name in enumerate(names)}
        self._ids_NLK: Tensor | None = None

    def note(self, layer: str, ids_TK: Tensor, tokens_T: Tensor | None, nothing: int) -> None:
        """Keeps one call's ids; rows that are no tokens have places that nobody reads."""
        if self._told is not None:
            self._told.note(layer, ids_TK, tokens_T, nothing)
        if self._cache.batch is None:
            return
        if self._ids_NLK is None:
            shape = (self._slots, len(self._place), ids_TK.shape[1])
            self._ids_NLK = torch.zeros(shape, dtype=torch.int32, device=ids_TK.device)
        if self._ids_NLK.shape[2] != ids_TK.shape[1]:
            raise ConfigError(
                "enable_return_routed_experts: layers choose different numbers of experts, which "
                "one array cannot hold"
            )
        slots_T = self._cache.batch.slots_T
        self._ids_NLK[:, self._place[layer]].index_copy_(0, slots_T, ids_TK.to(torch.int32))

    def of(self, sequence: Sequence) -> npt.NDArray[np.int32] | None:
        """Ids int32 [T, L, K] of a sequence that still has its blocks: of all its tokens but the
        last one, which was sampled and never computed. None before the model has run.
        """
        if self._ids_NLK is None:
            return None
        places = torch.arange(sequence.known - 1)
        blocks = torch.tensor(sequence.blocks)[places // self._block_size]
        slots = blocks * self._block_size + places % self._block_size
        found = self._ids_NLK[slots.to(self._ids_NLK.device)].cpu()
        return np.asarray(found.numpy(), dtype=np.int32)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Notes the model call inside the `with` block."""
        told = nullcontext() if self._told is None else self._told.recording()
        with told, forward_context(ForwardContext(recorder=self)):
            yield
