"""How a fused block calls its Transformers router: for its logits alone, or as it is.

Shape letters: T tokens, K top_k, E router logits, H hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from moetor.config import Precision
from moetor.huggingface.router_form import RecognisedRouter
from moetor.huggingface.router_trial import Places, lookup
from moetor.kernels.gate import gate_product
from moetor.kernels.routing import adjust_logits


class GateForward:
    """The forward of a Transformers router inside a fused block: its logits alone.

    The router stays the module that it was, so that its parameters keep their names and the hooks
    by which Transformers records `router_logits` still see them.
    """

    def __init__(self, router: nn.Module, recognised: RecognisedRouter) -> None:
        self.router = router
        self.weight = recognised.names.weight
        self.bias = recognised.names.bias
        self.precision: Precision = recognised.config.gate_precision
        self.logits_precision: Precision = recognised.logits_precision
        self.multiplier = recognised.logit_multiplier
        self.softcap = recognised.logit_softcap

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Router logits [T, E] for hidden states [..., H]."""
        bias = None if self.bias is None else lookup(self.router, self.bias)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = gate_product(hidden_TH, lookup(self.router, self.weight), bias, self.precision)
        if self.logits_precision == "float32":
            logits_TE = logits_TE.float()
        return adjust_logits(logits_TE, self.multiplier, self.softcap)


def remove_gate(router: nn.Module) -> None:
    """Gives the router its own forward again."""
    router.__dict__.pop("forward", None)


class RouterCall:
    """A Transformers router as the callable of a `CustomRouter`: its own forward decides."""

    def __init__(self, router: nn.Module, places: Places) -> None:
        self.router = router
        self.places = places
        self.__name__ = type(router).__name__

    def __call__(self, hidden_TH: Tensor, logits_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, K]."""
        return self.places.read(self.router(hidden_TH))
