"""State slots: what linear-attention, state-space and convolution layers keep of a sequence.

Each stateful layer of the cache has tensors [S, ...] for the sequences of a call. They are taken
out of pools [rows, ...] before the call and put back after it; a sequence's slot is its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetor.engine.cache import own_layers

# Attributes of Transformers' layers that hold states: a tensor, or tensors by index.
_STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True, slots=True)
class StatePlace:
    """One state tensor of one layer; `index` is None where the attribute is the tensor itself."""

    layer: int
    attribute: str
    index: int | None


def state_tensors(layers: list[Any]) -> Iterator[tuple[StatePlace, Tensor]]:
    """The states of cache layers, [S, ...] each."""
    for number, layer in enumerate(layers):
        for attribute in _STATES:
            held = getattr(layer, attribute, None)
            if isinstance(held, Tensor):
                yield StatePlace(number, attribute, None), held
            elif isinstance(held, dict):
                for index, tensor in held.items():
                    if tensor is not None:
                        yield StatePlace(number, attribute, index), tensor


def state_bytes(layers: list[Any]) -> int:
    """Of one sequence's states, from cache layers that hold those of one or more."""
    return sum(held[0].numel() * held.element_size() for _, held in state_tensors(layers))


class StateSlots:
    """Pools of states, and how they come into a cache's layers and out of them.

    Args:
        config: of the language model, for fresh layers.
        layers: of the engine's cache.
        example: layers of a cache that the model has filled, for the shapes.
        rows: slots, with the spare one of padded rows.
    """

    def __init__(self, config: Any, layers: list[Any], example: list[Any], rows: int) -> None:
        self.layers = layers
        self.pools = {
            place: torch.zeros((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
            for place, tensor in state_tensors(example)
        }
        stateful = {place.layer for place in self.pools}
        fresh, filled = own_layers(config, len(layers)), example
        # What else a layer notes about its states (flags, kernel sizes), before and after a call.
        self._fresh = {n: _notes(fresh[n]) for n in stateful}
        self._filled = {n: _notes(filled[n]) for n in stateful}

    def clear(self) -> None:
        """Makes the layers those of a sequence without a past."""
        for number, notes in self._fresh.items():
            _restore(self.layers[number], notes)
        for place in self.pools:
            self._put(place, None)

    def load(self, rows_S: Tensor) -> None:
        """Gives the layers the states of these rows."""
        for number, notes in self._filled.items():
            _restore(self.layers[number], notes)
        for place, pool in self.pools.items():
            self._put(place, pool.index_select(0, rows_S))

    def store(self, rows_S: Tensor) -> None:
        """Keeps the layers' states as those of these rows."""
        for place, tensor in state_tensors(self.layers):
            self.pools[place].index_copy_(0, rows_S, tensor)

    def _put(self, place: StatePlace, tensor: Tensor | None) -> None:
        layer = self.layers[place.layer]
        if place.index is None:
            setattr(layer, place.attribute, tensor)
        else:
            getattr(layer, place.attribute)[place.index] = tensor


def _notes(layer: Any) -> dict[str, Any]:
    """What a layer knows beside tensors and what it is called."""
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(layer).items()
        if name not in (*_STATES, "keys", "values", "owner", "layer_idx")
        and not isinstance(value, Tensor)
    }


def _restore(layer: Any, notes: dict[str, Any]) -> None:
    for name, value in notes.items():
        setattr(layer, name, dict(value) if isinstance(value, dict) else value)
