"""Which experts a forward pass chose, noted or prescribed.

Shape letters: T tokens, K top_k, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moetor.errors import InputError, UnsupportedError
from moetor.kernels.routing import Routing


class RoutingRecorder:
    """Collects the ids that layers chose, call by call.

    Args:
        outer: a recorder that is told everything, too.
    """

    def __init__(self, outer: RoutingRecorder | None = None) -> None:
        self._outer = outer
        self._ids: dict[str, list[Tensor]] = {}

    def note(self, layer: str, ids_TK: Tensor, tokens_T: Tensor | None, nothing: int) -> None:
        """Keeps a copy of one call's ids, in which rows that are no tokens have chosen nothing.

        Args:
            tokens_T: bool, which rows are tokens; None for all.
            nothing: the id of a slot that is dropped.
        """
        if self._outer is not None:
            self._outer.note(layer, ids_TK, tokens_T, nothing)
        chosen_TK = choice_of_tokens(ids_TK, tokens_T, nothing)
        self._ids.setdefault(layer, []).append(chosen_TK.detach().clone())

    def has(self, layer: str) -> bool:
        """Whether the layer was called."""
        return layer in self._ids

    def ids(self, layers: Sequence[str], sequences: int = 1) -> Tensor:
        """Ids int32 [T, L, K] of all calls so far, for `layers` in this order.

        Args:
            sequences: B: every call had as many tokens of each of B sequences, sequence by
                sequence, and so has the result.

        Raises:
            InputError: a layer was not called, or layers saw different tokens or have different K,
                or calls do not divide into `sequences`.
        """
        silent = [layer for layer in layers if layer not in self._ids]
        if silent:
            raise InputError(f"no routing was recorded for {', '.join(silent)}")
        per_layer = [_by_sequence(self._ids[layer], sequences) for layer in layers]
        shapes = {tuple(ids.shape) for ids in per_layer}
        if len(shapes) > 1:
            raise InputError(
                f"the layers recorded ids of different shapes, {sorted(shapes)}; ask for them one "
                "by one"
            )
        return torch.stack(per_layer, dim=1)


def _by_sequence(calls: list[Tensor], sequences: int) -> Tensor:
    """The calls' ids [T, K], those of each sequence together."""
    if sequences == 1:
        return torch.cat(calls)
    if any(ids_TK.shape[0] % sequences for ids_TK in calls):
        raise InputError(f"not every call had as many tokens of each of {sequences} sequences")
    return torch.cat([ids.unflatten(0, (sequences, -1)) for ids in calls], dim=1).flatten(0, 1)


def choice_of_tokens(ids_TK: Tensor, tokens_T: Tensor | None, nothing: int) -> Tensor:
    """Ids [T, K] in which rows outside of `tokens_T`, bool [T], have chosen `nothing`."""
    return ids_TK if tokens_T is None else ids_TK.masked_fill(~tokens_T.unsqueeze(1), nothing)


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


def replay_choice(layer: str, ids_TK: Tensor, routing: Routing) -> Routing:
    """A routing that was made outside of Moetor, with prescribed ids [T, K].

    Only the router itself, which is not known as a formula, could weigh experts that it did not
    choose: each token's ids must be those that it chose, in any order.

    Raises:
        InputError: another K.
        UnsupportedError: other experts.
    """
    chosen_TK, weights_TK = routing.topk_ids, routing.topk_weights
    if ids_TK.shape != chosen_TK.shape:
        raise InputError(
            f"layer {layer!r} cannot replay ids {list(ids_TK.shape)}: it chooses "
            f"{chosen_TK.shape[1]} experts"
        )
    ids_TK = ids_TK.to(chosen_TK.device, chosen_TK.dtype)
    order_TK, theirs_TK = (ids.argsort(dim=-1, stable=True) for ids in (ids_TK, chosen_TK))
    if not torch.equal(ids_TK.gather(1, order_TK), chosen_TK.gather(1, theirs_TK)):
        raise UnsupportedError(
            f"layer {layer!r} is routed outside of Moetor, by a router without a known formula: it "
            "can replay its own choice alone"
        )
    weights_TK = torch.empty_like(weights_TK).scatter_(1, order_TK, weights_TK.gather(1, theirs_TK))
    return routing._replace(topk_weights=weights_TK, topk_ids=ids_TK)
