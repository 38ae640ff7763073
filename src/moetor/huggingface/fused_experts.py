"""A Transformers experts module on our kernels, and what is done with an original's tensors.

Shape letters: T tokens, K top_k, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moetor.config import ExpertsConfig, RunnerConfig
from moetor.errors import FusionError
from moetor.huggingface.experts_form import adopt_post_norm, experts_weights
from moetor.layer import ops
from moetor.layer.context import register_layer
from moetor.layer.experts import Experts
from moetor.layer.quantized_experts import QuantizedExperts
from moetor.layer.runner import make_runner
from moetor.parallel.dispatch import Dispatcher, LocalDispatcher
from moetor.parallel.layout import LayerLayout
from moetor.quantization.method import make_method


class FusedExperts(nn.Module):
    """A Transformers experts module whose products run on our kernels; routing stays in
    Transformers.

    It has the parameters of the original under their own names and is called like it: `(hidden [T,
    H], ids [T, K], weights [T, K]) -> [T, H]`.
    """

    def __init__(
        self,
        original: nn.Module,
        config: ExpertsConfig,
        top_k: int,
        runner: RunnerConfig,
        path: str,
    ) -> None:
        super().__init__()
        method = make_method(None, runner.kernel, batch_invariant=runner.batch_invariant)
        experts = Experts(config, method, top_k, weights=experts_weights(original))
        adopt_post_norm(experts, original)
        self._hold(experts)
        self.__dict__["_original"] = original
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.parallel: LayerLayout | None = None
        self.runner = make_runner(runner)
        self.name = register_layer(self, path)
        self.train(original.training)

    @property
    def routed_experts(self) -> Experts:
        """The experts behind this module."""
        experts: Experts = self.__dict__["_experts"]
        return experts

    @property
    def ranks(self) -> int:
        """1: Transformers itself reduces what its experts return."""
        return 1

    @property
    def num_ids(self) -> int:
        """Experts of all ranks."""
        layout = self.parallel
        if layout is None or layout.experts is None:
            return self.routed_experts.config.num_experts
        return layout.experts.placement.num_experts

    @property
    def token_split(self) -> None:
        """None: every rank of a tensor-parallel group has all tokens."""
        return None

    @property
    def num_experts(self) -> int:
        """E, as the original offers it."""
        return self.routed_experts.config.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the original experts module."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        out: Tensor = ops.transformers_moe_forward(hidden_TH, top_k_weights, top_k_index, self.name)
        return out.reshape(hidden_states.shape)

    def forget_original(self) -> None:
        """Lets go of the original module, and of the weights that this rank does not keep."""
        self.__dict__["_original"] = None

    def take_quantized(self, experts: QuantizedExperts) -> None:
        """Puts quantised experts in the place of the present ones, and lets go of the original
        module and its weights.
        """
        self.let_go_of_weights()
        self._hold(experts)

    def let_go_of_weights(self) -> None:
        """Lets go of the original module and of its weights, which are elsewhere now."""
        if self.__dict__["_original"] is not None:
            release(self.__dict__["_original"])
        self.forget_original()

    def _hold(self, experts: Experts) -> None:
        # In __dict__, not as a submodule: the parameters are registered here, without a prefix.
        self.__dict__["_experts"] = experts
        self._parameters = experts._parameters
        self._modules = experts._modules

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedExperts:
        """Moves and casts as the experts do, whose parameters these are."""
        self.routed_experts._apply(fn, recurse)
        return self

    def restore(self) -> nn.Module:
        """The original module, with the tensors that this one holds now."""
        original: nn.Module = kept_original(self.__dict__["_original"])
        hand_back_tensors(self, original)
        return original.train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.name = register_layer(self, self.name)

    def extra_repr(self) -> str:
        """As `Experts`."""
        return self.routed_experts.extra_repr()


def kept_original(original: nn.Module | None) -> nn.Module:
    """The original, where it was kept.

    Raises:
        FusionError: it was not.
    """
    if original is None:
        raise FusionError(
            "the original weights are gone: the model is spread over ranks, or its experts are in "
            "host memory. Load it again to have it unfused"
        )
    return original


def release(original: nn.Module) -> None:
    """Frees the parameters of an experts module that quantised ones have replaced."""
    for name in original._parameters:
        original._parameters[name] = None


def hand_back_tensors(holder: nn.Module, original: nn.Module) -> None:
    """Puts the tensors that `holder` has now (moved, cast or loaded meanwhile) into the
    original.
    """
    for name in original._parameters:
        original._parameters[name] = holder._parameters[name]
