"""The recognised routers, as one formula, and the way in for any other callable.

Shape letters: T tokens, K top_k, E logits (experts and identity experts), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moetor.config import RouterConfig
from moetor.errors import InputError
from moetor.kernels.routing import Routing, route

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
        self, logits_TE: Tensor, selection_bias: Tensor | None, dtype: torch.dtype
    ) -> Routing:
        """See `moetor.kernels.routing.route`.

        Raises:
            InputError: the logits are not [T, E].
        """
        width = self.config.num_logits
        if logits_TE.dim() != 2 or logits_TE.shape[1] != width:
            raise InputError(
                f"router logits of shape {tuple(logits_TE.shape)} were given; this router takes "
                f"[tokens, {width}]"
            )
        return route(logits_TE, self.config, selection_bias, dtype)


class CustomRouter:
    """Any callable as a router: a family's own router module, a research idea, a replay of recorded
    ids.

    Its ids may use `num_experts` for a dropped slot; the weight of such a slot is taken as 0.
    """

    def __init__(self, function: RouterFunction, num_experts: int) -> None:
        self.function = function
        self.num_experts = num_experts

    @property
    def label(self) -> str:
        """Short description for tables."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"callable {name}"

    def route(self, hidden_TH: Tensor, logits_TE: Tensor | None) -> Routing:
        """Calls the function and brings its answer into the form of `Routing`."""
        weights, ids = self.function(hidden_TH, logits_TE)
        return as_routing(weights, ids, self.num_experts)


def as_routing(weights_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Routing:
    """Any router's answer in the form of `Routing`: an id from `num_experts` on is a dropped
    slot.
    """
    weights = torch.where(ids_TK >= num_experts, 0.0, weights_TK.to(torch.float32))
    return Routing(weights, ids_TK.clamp(max=num_experts).to(torch.int32))
