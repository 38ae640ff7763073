"""Quant methods: how the experts' weights are stored and which kernel reads them.

A *modular* method is given a routing; a *monolithic* one is given the router logits and routes
inside its kernel. Shape letters: T tokens, K top_k, E experts, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moetor.config import ExpertsConfig, RouterConfig
from moetor.kernels.base import KernelQuery, Weights
from moetor.kernels.formats import canonical
from moetor.kernels.routing import Routing
from moetor.kernels.select import KernelChoice, select_kernel, select_router
from moetor.quant_config import QuantConfig, find_quantization, quantization_name


class QuantMethod(ABC):
    """What both kinds share: a weight format and a choice of kernel.

    Attributes:
        name: how reports call it.
        weight_format, activation_format: as in a `KernelQuery`.
    """

    name: str
    weight_format: str = "unquantized"
    activation_format: str = "unquantized"

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
            activation_format=self.activation_format,
            batch_invariant=self.batch_invariant,
        )

    def stored_form(self, config: ExpertsConfig) -> ExpertsConfig:
        """The form in which this method keeps experts of `config`."""
        return config

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

    def apply(
        self, hidden_TH: Tensor, routing: Routing, weights: Weights, config: ExpertsConfig
    ) -> Tensor:
        """Weighted sum of the chosen experts, [T, H] in the dtype of `hidden_TH`."""
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


class MonolithicMethod(QuantMethod):
    """The kernel gets the router logits and routes inside."""

    @abstractmethod
    def apply(
        self,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        router: RouterConfig,
        selection_bias: Tensor | None,
        weights: Weights,
        config: ExpertsConfig,
    ) -> Tensor:
        """Weighted sum of the experts that `router` chooses, [T, H] in the dtype of `hidden_TH`."""


class UnquantizedMethod(ModularMethod):
    """Weights in the hidden states' dtype."""

    name = "unquantized"


class QuantizedMethod(ModularMethod):
    """Weights in one of the formats of `moetor.kernels.formats`.

    Args:
        weight_format, activation_format: as in a `KernelQuery`.
        name: how reports call it; by default the preset with these formats.
    """

    def __init__(
        self,
        weight_format: str,
        activation_format: str,
        kernel: str = "auto",
        *,
        name: str | None = None,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(kernel, batch_invariant=batch_invariant)
        self.weight_format = weight_format
        self.activation_format = activation_format
        self.name = name or quantization_name(weight_format, activation_format)

    def stored_form(self, config: ExpertsConfig) -> ExpertsConfig:
        """See `QuantMethod.stored_form`."""
        return canonical(config)


class UnquantizedMonolithicMethod(MonolithicMethod):
    """The same arithmetic behind one call that takes router logits: on a GPU a routing launch and
    the experts' launches, with nothing between them."""

    name = "unquantized_monolithic"

    def apply(
        self,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        router: RouterConfig,
        selection_bias: Tensor | None,
        weights: Weights,
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
"""Methods that leave weights as they are, by name."""


def quant_config(quantization: str | QuantConfig | None) -> QuantConfig | None:
    """The quantisation that is asked for; None where weights stay as they are.

    Raises:
        ConfigError: unknown name.
    """
    if quantization is None or (isinstance(quantization, str) and quantization in METHODS):
        return None
    return find_quantization(quantization)


def make_method(
    quantization: str | QuantConfig | None, kernel: str, *, batch_invariant: bool
) -> ModularMethod | MonolithicMethod:
    """The method for `quantization` (None: unquantized).

    Raises:
        ConfigError: no method and no quantisation has this name.
    """
    config = quant_config(quantization)
    if config is not None:
        return QuantizedMethod(
            config.weight_format,
            config.activation_format,
            kernel,
            name=config.name,
            batch_invariant=batch_invariant,
        )
    name = UnquantizedMethod.name if quantization is None else str(quantization)
    return METHODS[name](kernel, batch_invariant=batch_invariant)
