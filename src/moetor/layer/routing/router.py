"""The recognised routers, as one formula, and the way in for any other callable.

Shape letters: T tokens, K top_k, E logits (experts and identity experts), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moetor.config import RouterConfig
from moetor.errors import InputError
from moetor.kernels.routing import Routing, route, split_identity
from moetor.kernels.select import select_router

RouterFunction = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""`(hidden [T, H], logits [T, E] or None) -> (weights [T, K], ids [T, K])`."""


class Router:
    """Routes by the formula of a `RouterConfig`."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config

    @property
    def label(self) -> str:
        """Short description for tables, such as `sigmoid top-8 of 256, groups 4/8, bias`."""
        config = self.config
        scoring = config.scoring.replace("_", "-")
        order = f"{scoring} top-{config.top_k}"
        if config.score_order == "after_topk":
            order = f"top-{config.top_k} {scoring}"
        parts = [f"{order} of {config.num_experts}"]
        if config.num_zero_experts:
            parts[0] += f"+{config.num_zero_experts} identity"
        if config.num_groups > 1:
            parts.append(f"groups {config.top_k_groups}/{config.num_groups}")
        if config.selection_bias:
            parts.append("bias")
        if config.renormalize:
            parts.append("renormalised")
        if config.scaling_factor != 1.0:
            parts.append(f"x {config.scaling_factor:g}")
        return ", ".join(parts)

    def route(
        self,
        logits_TE: Tensor,
        selection_bias: Tensor | None,
        dtype: torch.dtype,
        *,
        forced_ids: Tensor | None = None,
    ) -> Routing:
        """See `moetor.kernels.routing.route`: in torch operations, which a compiler can follow.

        Raises:
            InputError: the logits are not [T, E].
        """
        self._check(logits_TE)
        return route(logits_TE, self.config, selection_bias, dtype, forced_ids)

    def launch(
        self, logits_TE: Tensor, selection_bias: Tensor | None, dtype: torch.dtype
    ) -> Routing:
        """The same formula by the fastest way that there is on this device, inside an op.

        Raises:
            InputError: the logits are not [T, E].
        """
        self._check(logits_TE)
        choice = select_router(self.config, logits_TE.device.type, logits_TE.dtype)
        return choice.route(logits_TE, self.config, selection_bias, dtype)

    def _check(self, logits_TE: Tensor) -> None:
        width = self.config.num_logits
        if logits_TE.dim() != 2 or logits_TE.shape[1] != width:
            raise InputError(
                f"router logits of shape {tuple(logits_TE.shape)} were given; this router takes "
                f"[tokens, {width}]"
            )


class CustomRouter:
    """Any callable as a router: a family's own router module, a research idea, a replay of recorded
    ids.

    Its ids may use `num_experts` for a dropped slot; the weight of such a slot is taken as 0.
    """

    def __init__(self, function: RouterFunction, config: RouterConfig) -> None:
        self.function = function
        self.config = config

    @property
    def label(self) -> str:
        """Short description for tables."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"callable {name}"

    def route(self, hidden_TH: Tensor, logits_TE: Tensor | None) -> Routing:
        """Calls the function and brings its answer into the form of `Routing`."""
        weights, ids = self.function(hidden_TH, logits_TE)
        return as_routing(weights, ids, self.config)


def as_routing(weights_TK: Tensor, ids_TK: Tensor, config: RouterConfig) -> Routing:
    """Any router's answer in the form of `Routing`.

    Ids below `num_experts` are experts, the next `num_zero_experts` are identity experts, and any
    id from there on is a dropped slot.
    """
    dropped_TK = ids_TK >= config.num_logits
    weights_TK = torch.where(dropped_TK, 0.0, weights_TK.to(torch.float32))
    ids_TK = ids_TK.clamp(max=config.num_logits).to(torch.int32)
    return Routing(*split_identity(weights_TK, ids_TK, config))
