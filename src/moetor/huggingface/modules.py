"""What stands in a Transformers model after fusing. Parameter names are those of the original.

Shape letters: T tokens, K top_k, E router logits, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from moetor.config import ExpertsConfig, MoEConfig, Precision, RunnerConfig
from moetor.huggingface.experts_form import experts_weights
from moetor.huggingface.router_form import RecognisedRouter, lookup
from moetor.kernels.gate import gate_product
from moetor.layer import ops
from moetor.layer.context import register_layer
from moetor.layer.experts import Experts
from moetor.layer.moe import ChildNames, LayerParts, MoELayer
from moetor.layer.runner import make_runner
from moetor.parallel.dispatch import LocalDispatcher
from moetor.quantization.method import make_method

Returns = Literal["hidden", "hidden_and_weights", "hidden_and_logits"]
"""What a family's block returns beside its hidden states."""


class GateForward:
    """The forward of a Transformers router inside a fused block: the gate product alone.

    The router stays the module that it was, so that its parameters keep their names and the hooks
    by which
    Transformers records `router_logits` still see them.
    """

    def __init__(self, router: nn.Module, recognised: RecognisedRouter) -> None:
        self.router = router
        self.weight = recognised.weight
        self.bias = recognised.bias
        self.precision: Precision = recognised.config.gate_precision
        self.logits_precision: Precision = recognised.logits_precision

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Router logits [T, E] for hidden states [..., H]."""
        bias = None if self.bias is None else lookup(self.router, self.bias)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = gate_product(hidden_TH, lookup(self.router, self.weight), bias, self.precision)
        return logits_TE.float() if self.logits_precision == "float32" else logits_TE


@contextmanager
def gate_forward(router: nn.Module, recognised: RecognisedRouter) -> Iterator[None]:
    """Gives the router its fused forward for the time of a trial."""
    install_gate(router, recognised)
    try:
        yield
    finally:
        remove_gate(router)


def install_gate(router: nn.Module, recognised: RecognisedRouter) -> None:
    """Gives the router its fused forward."""
    router.forward = GateForward(router, recognised)


def remove_gate(router: nn.Module) -> None:
    """Gives the router its own forward again."""
    router.__dict__.pop("forward", None)


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """A recognised block, and the layer that will take its place.

    Attributes:
        path: of the block in the model.
        block: the original.
        router: the recognised routing.
        names: of the block's children.
        config: the layer.
        returns: what the block returns.
    """

    path: str
    block: nn.Module
    router: RecognisedRouter
    names: ChildNames
    config: MoEConfig
    returns: Returns = "hidden"

    @property
    def router_module(self) -> nn.Module:
        """The block's router."""
        return self.block.get_submodule(self.names.gate)


class FusedMoEBlock(MoELayer):
    """A Transformers MoE block as one `MoELayer`, with the original's parameter names and return
    value.

    The router module's own forward must be replaced by `install_gate` before the block is called.
    """

    def __init__(self, plan: BlockPlan) -> None:
        block, names = plan.block, plan.names
        super().__init__(
            plan.config,
            parts=LayerParts(
                gate=plan.router_module,
                experts=experts_weights(block.get_submodule(names.experts)),
                shared=block._modules.get(names.shared),
                shared_gate=block._modules.get(names.shared_gate),
            ),
            name=plan.path,
            names=names,
        )
        self.recognised = plan.router
        self.returns = plan.returns
        for name, parameter in block._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in block._buffers.items():
            persistent = name not in block._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        # In __dict__, not as a submodule: its parameters are this module's own.
        self.__dict__["_original"] = block
        self.train(block.training)

    @property
    def selection_bias(self) -> Tensor | None:
        """The family's own bias tensor, on its router or on its block."""
        name = self.recognised.selection_bias
        if name is None:
            return None
        owner = self if self.recognised.selection_bias_on_block else self.gate_module
        assert owner is not None, "a fused block has a router"
        return lookup(owner, name).flatten()

    # A family's block takes no router logits, and may return more than its hidden states.
    def forward(self, hidden_states: Tensor) -> Any:  # type: ignore[override]
        """As the original block."""
        out = super().forward(hidden_states)
        if self.returns == "hidden":
            return out
        logits = self.logits(hidden_states.reshape(-1, hidden_states.shape[-1]))
        assert logits is not None, "a fused block has a router"
        if self.returns == "hidden_and_logits":
            return out, logits
        return out, self.route(logits, hidden_states.dtype).topk_weights.to(hidden_states.dtype)

    def restore(self) -> nn.Module:
        """The original block, with the tensors that this one holds now."""
        original: nn.Module = self.__dict__["_original"]
        router = self.gate_module
        assert router is not None, "a fused block has a router"
        remove_gate(router)
        original_experts = original.get_submodule(self.names.experts)
        hand_back_tensors(self.routed_experts, original_experts)
        for name in original._parameters:
            original._parameters[name] = self._parameters[name]
        for name in original._buffers:
            original._buffers[name] = self._buffers[name]
        return original.train(self.training)


class FusedExperts(nn.Module):
    """A Transformers experts module whose products run on our kernels; routing stays in
    Transformers.

    It has the parameters of the original under their own names and is called like it:
    `(hidden [T, H], ids [T, K], weights [T, K]) -> [T, H]`.
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
        # In __dict__, not as a submodule: the parameters are registered here, without a prefix.
        self.__dict__["_experts"] = experts
        self.__dict__["_original"] = original
        self._parameters = experts._parameters
        self.dispatcher = LocalDispatcher()
        self.runner = make_runner(runner)
        self.name = register_layer(self, path)
        self.train(original.training)

    @property
    def routed_experts(self) -> Experts:
        """The experts behind this module."""
        experts: Experts = self.__dict__["_experts"]
        return experts

    @property
    def num_experts(self) -> int:
        """E, as the original offers it."""
        return self.routed_experts.config.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the original experts module."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        out: Tensor = ops.transformers_moe_forward(hidden_TH, top_k_weights, top_k_index, self.name)
        return out.reshape(hidden_states.shape)

    def restore(self) -> nn.Module:
        """The original module, with the tensors that this one holds now."""
        original: nn.Module = self.__dict__["_original"]
        hand_back_tensors(self, original)
        return original.train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.name = register_layer(self, self.name)

    def extra_repr(self) -> str:
        """As `Experts`."""
        return self.routed_experts.extra_repr()


def hand_back_tensors(holder: nn.Module, original: nn.Module) -> None:
    """Puts the tensors that `holder` has now (moved, cast or loaded meanwhile) into the
    original."""
    for name in original._parameters:
        original._parameters[name] = holder._parameters[name]
