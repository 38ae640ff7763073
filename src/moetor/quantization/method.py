"""Quant methods: how the experts' weights are stored and which kernel reads them.

A *modular* method is given a routing; a *monolithic* one is given the router logits and routes
inside its kernel. Shape letters: T tokens, K top_k, E experts, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from moetor.config import ExpertsConfig, RouterConfig
from moetor.errors import ConfigError
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.routing import Routing
from moetor.kernels.select import KernelChoice, select_kernel, select_router


class QuantMethod(ABC):
    """What both kinds share: a weight format and a choice of kernel."""

    name: ClassVar[str]
    weight_format: ClassVar[str]

    def __init__(self, kernel: str = "auto", *, batch_invariant: bool = False) -> None:
        self.requested_kernel = kernel
        self.batch_invariant = batch_invariant
        self._choices: dict[KernelQuery, KernelChoice] = {}

    def query(
        self, config: ExpertsConfig, top_k: int, device: torch.device, dtype: torch.dtype
    ) -> KernelQuery:
        """The question that this method asks of `select_kernel`."""
        return KernelQuery(
            device=device.type,
            dtype=dtype,
            experts=config,
            top_k=top_k,
            weight_format=self.weight_format,
            batch_invariant=self.batch_invariant,
        )

    def choice(
        self, config: ExpertsConfig, top_k: int, device: torch.device, dtype: torch.dtype
    ) -> KernelChoice:
        """The kernel for this device and dtype, asked once.

        Raises:
            KernelRefusedError: the requested kernel, or every kernel, refuses.
        """
        query = self.query(config, top_k, device, dtype)
        if query not in self._choices:
            self._choices[query] = select_kernel(query, self.requested_kernel)
        return self._choices[query]


class ModularMethod(QuantMethod):
    """The router has routed; the kernel gets weights and ids."""

    @abstractmethod
    def apply(
        self, hidden_TH: Tensor, routing: Routing, weights: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """Weighted sum of the chosen experts, [T, H] in the dtype of `hidden_TH`."""


class MonolithicMethod(QuantMethod):
    """The kernel gets the router logits and routes inside."""

    @abstractmethod
    def apply(
        self,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        router: RouterConfig,
        selection_bias: Tensor | None,
        weights: ExpertWeights,
        config: ExpertsConfig,
    ) -> Tensor:
        """Weighted sum of the experts that `router` chooses, [T, H] in the dtype of `hidden_TH`."""


class UnquantizedMethod(ModularMethod):
    """Weights in the hidden states' dtype."""

    name = "unquantized"
    weight_format = "unquantized"

    def apply(
        self, hidden_TH: Tensor, routing: Routing, weights: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """See `ModularMethod.apply`."""
        top_k = routing.topk_ids.shape[1]
        kernel = self.choice(config, top_k, hidden_TH.device, hidden_TH.dtype).kernel
        return kernel(
            hidden_TH,
            routing.topk_weights,
            routing.topk_ids,
            weights,
            config,
            batch_invariant=self.batch_invariant,
        )


class UnquantizedMonolithicMethod(MonolithicMethod):
    """The same arithmetic behind one call that takes router logits: on a GPU a routing launch and
    the experts' launches, with nothing between them."""

    name = "unquantized_monolithic"
    weight_format = "unquantized"

    def apply(
        self,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        router: RouterConfig,
        selection_bias: Tensor | None,
        weights: ExpertWeights,
        config: ExpertsConfig,
    ) -> Tensor:
        """See `MonolithicMethod.apply`."""
        kernel = self.choice(config, router.top_k, hidden_TH.device, hidden_TH.dtype).kernel
        routes = select_router(router, logits_TE.device.type, logits_TE.dtype)
        routing = routes.route(logits_TE, router, selection_bias, hidden_TH.dtype)
        return kernel(
            hidden_TH,
            routing.topk_weights,
            routing.topk_ids,
            weights,
            config,
            batch_invariant=self.batch_invariant,
        )


METHODS: dict[str, type[UnquantizedMethod] | type[UnquantizedMonolithicMethod]] = {
    method.name: method for method in (UnquantizedMethod, UnquantizedMonolithicMethod)
}


def make_method(
    quantization: str | None, kernel: str, *, batch_invariant: bool
) -> ModularMethod | MonolithicMethod:
    """The method named `quantization` (None: unquantized).

    Raises:
        ConfigError: no method has this name.
    """
    name = quantization or UnquantizedMethod.name
    if name not in METHODS:
        raise ConfigError(
            f"quantization={quantization!r} is not known; possible: None, {', '.join(METHODS)}"
        )
    return METHODS[name](kernel, batch_invariant=batch_invariant)
