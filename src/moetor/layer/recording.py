"""Which experts a forward pass chose, noted or prescribed.

Shape letters: T tokens, K top_k, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moetor.errors import InputError


class RoutingRecorder:
    """Collects the ids that layers chose, call by call."""

    def __init__(self) -> None:
        self._ids: dict[str, list[Tensor]] = {}

    def note(self, layer: str, ids_TK: Tensor) -> None:
        """Keeps a copy of one call's ids."""
        self._ids.setdefault(layer, []).append(ids_TK.detach().clone())

    def ids(self, layers: Sequence[str]) -> Tensor:
        """Ids int32 [T, L, K] of all calls so far, for `layers` in this order.

        Raises:
            InputError: a layer was not called, or layers saw different tokens or have different K.
        """
        silent = [layer for layer in layers if layer not in self._ids]
        if silent:
            raise InputError(f"no routing was recorded for {', '.join(silent)}")
        per_layer = [torch.cat(self._ids[layer]) for layer in layers]
        shapes = {tuple(ids.shape) for ids in per_layer}
        if len(shapes) > 1:
            raise InputError(
                f"the layers recorded ids of different shapes, {sorted(shapes)}; ask for them one "
                "by one"
            )
        return torch.stack(per_layer, dim=1)


class RoutingReplay:
    """Hands out prescribed ids, call by call, in the order in which they were recorded."""

    def __init__(self, ids: Mapping[str, Tensor]) -> None:
        self._ids = dict(ids)
        self._next = dict.fromkeys(self._ids, 0)

    def take(self, layer: str, tokens: int) -> Tensor:
        """The next `tokens` rows [T, K] of this layer.

        Raises:
            InputError: the layer has none, or not enough are left.
        """
        if layer not in self._ids:
            raise InputError(f"there are no ids to replay for layer {layer!r}")
        start = self._next[layer]
        stop = start + tokens
        ids = self._ids[layer]
        if stop > ids.shape[0]:
            raise InputError(
                f"layer {layer!r} was asked for tokens {start} to {stop}; the ids to replay end at "
                f"{ids.shape[0]}"
            )
        self._next[layer] = stop
        return ids[start:stop]
