"""The fused block, and what else stands in a Transformers model after fusing. Parameter names are
those of the original.

Shape letters: T tokens, K top_k, E router logits, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moetor.config import Precision
from moetor.huggingface.block_plan import BlockPlan
from moetor.huggingface.experts_form import adopt_post_norm
from moetor.huggingface.fused_experts import (
    FusedExperts,
    hand_back_tensors,
    kept_original,
    release,
)
from moetor.huggingface.own_names import keep_own_names
from moetor.huggingface.router_calls import GateForward, RouterCall, remove_gate
from moetor.huggingface.router_form import KeptRouter, RecognisedRouter
from moetor.huggingface.router_trial import lookup
from moetor.kernels.base import ExpertWeights
from moetor.layer.moe import MoELayer
from moetor.layer.parts import ChildNames, LayerParts
from moetor.layer.quantized_experts import QuantizedExperts
from moetor.layer.routing.router import as_routing


class Chain:
    """Modules applied one after the other, without being registered a second time."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The last one's output."""
        for module in self.modules:
            hidden = module(hidden)
        return hidden


class FusedMoEBlock(MoELayer):
    """A Transformers MoE block as one `MoELayer`, with the original's parameter names and return
    value.

    Where the routing is a recognised formula, the router module's own forward must be replaced by
    `install_gate` before the block is called.

    Args:
        weights: the block's experts, where they were packed before.
    """

    def __init__(self, plan: BlockPlan, weights: ExpertWeights | None = None) -> None:
        block, children = plan.block, plan.children
        kept: RouterCall | None = None
        if isinstance(plan.router, KeptRouter):
            kept = RouterCall(plan.router_module, plan.router.places)

        def child(name: str | None) -> nn.Module | None:
            return None if name is None else block.get_submodule(name)

        first, last = next(iter(children.inputs), None), next(iter(children.outputs), None)
        super().__init__(
            plan.config,
            router=kept,
            parts=LayerParts(
                gate=None if kept is not None else plan.router_module,
                experts=plan.experts_weights() if weights is None else weights,
                shared=child(children.shared),
                shared_gate=child(children.shared_gate),
                input_transform=child(first),
                output_transform=child(last),
            ),
            name=plan.path,
            names=ChildNames(
                gate=children.router,
                experts=children.experts,
                shared=children.shared or ChildNames.shared,
                shared_gate=children.shared_gate or ChildNames.shared_gate,
                input_transform=first or ChildNames.input_transform,
                output_transform=last or ChildNames.output_transform,
            ),
        )
        if plan.split is None:
            adopt_post_norm(self.routed_experts, block.get_submodule(children.experts))
        else:
            keep_own_names(self, plan.split, children.experts)
        self.split = plan.split
        self.plan_router = plan.router
        self.children_names = children
        self.returns = plan.returns
        self.block_scale = plan.block_scale
        self.layout = plan.layout
        self.shared_weights = plan.shared_weights
        self.inputs = plan.inputs
        for name in children.names:
            if name not in self._modules:
                self.add_module(name, block.get_submodule(name))
        for name, parameter in block._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in block._buffers.items():
            persistent = name not in block._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        # In __dict__, not as a submodule: its parameters are this module's own.
        self.__dict__["_original"] = block
        self.train(block.training)

    @property
    def logits_precision(self) -> Precision:
        """As the family's router gives them."""
        router = self.plan_router
        if isinstance(router, RecognisedRouter) and router.logits_precision == "float32":
            return "float32"
        return super().logits_precision

    @property
    def input_transform(self) -> Chain | None:
        """The modules before the routed experts, where there are any."""
        return self._chain(self.children_names.inputs)

    @property
    def output_transform(self) -> Chain | None:
        """The modules after the routed experts, where there are any."""
        return self._chain(self.children_names.outputs)

    def _chain(self, names: tuple[str, ...]) -> Chain | None:
        return Chain([self.get_submodule(name) for name in names]) if names else None

    @property
    def router_module(self) -> nn.Module:
        """The Transformers router."""
        return self.get_submodule(self.names.gate)

    @property
    def selection_bias(self) -> Tensor | None:
        """The family's own bias tensor, on its router or on its block."""
        router = self.plan_router
        if isinstance(router, KeptRouter) or router.names.selection_bias is None:
            return None
        owner = self if router.names.selection_bias_on_block else self.router_module
        return lookup(owner, router.names.selection_bias).flatten()

    # A family's block takes no router logits, but what its router needs, and may return more.
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original block."""
        extra = self._bind(args, kwargs)
        if self.layout == "flat":  # Ernie 4.5 VL selects tokens by a mask, which flattens them
            hidden_states = hidden_states.reshape(-1, self.config.hidden_size)
        self.check_input(hidden_states)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        second: Tensor | None = None
        if isinstance(self.plan_router, KeptRouter):
            answer = self._ask_router(self.plan_router, hidden_states, hidden_TH, extra)
            routing = as_routing(*self.plan_router.places.read(answer), self.config.router)
            more = {} if self.shared_weights is None else {self.shared_weights: answer[3]}
            out = self.runner.forward_routed(self, hidden_TH, routing, **more)
            second = answer[{"hidden_and_logits": 0, "hidden_and_weights": 1}.get(self.returns, -1)]
        else:
            logits = self.logits(hidden_TH)
            out = self.runner.forward(self, hidden_TH, logits)
            if self.returns == "hidden_and_weights":
                assert logits is not None, "a recognised router has a gate"
                # Outside of the op, so the model's own choice even while another one is replayed;
                # the families that return these weights do not use them.
                routing = self.formula_routing(logits, hidden_states.dtype)
                second = (routing.topk_weights / self.block_scale).to(hidden_states.dtype)
            else:
                second = logits
        if self.children_names.output_bias is not None:
            out = out + getattr(self, self.children_names.output_bias)
        for name in self.children_names.final:
            out = self.get_submodule(name)(out)
        if self.layout == "same":
            out = out.reshape(hidden_states.shape)
        elif self.layout == "flat":
            out, second = out.flatten(), None if second is None else second.flatten()
        return out if self.returns == "hidden" else (out, second)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The block's further arguments by name."""
        extra = dict(zip(self.inputs, args, strict=False)) | kwargs
        unknown = [name for name in extra if name not in self.inputs]
        if unknown or len(args) > len(self.inputs):
            raise TypeError(
                f"block {self.name!r} takes hidden_states{''.join(f', {n}' for n in self.inputs)}; "
                f"it was given {len(args)} more by position and {', '.join(kwargs) or 'none'} by "
                "name"
            )
        return extra

    def _ask_router(
        self, kept: KeptRouter, hidden_states: Tensor, hidden_TH: Tensor, extra: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """The kept router's answer: logits, weights, ids, and for some a state."""
        named = {inner: extra.get(outer) for outer, inner in kept.inputs}
        answer: tuple[Tensor, ...] = self.router_module(
            hidden_states if kept.batched else hidden_TH, **named
        )
        return answer

    def forget_original(self) -> None:
        """Lets go of the original block, and of the weights that this rank does not keep."""
        self.__dict__["_original"] = None

    def take_quantized(self, experts: QuantizedExperts) -> None:
        """Puts quantised experts in the place of the present ones, and lets go of the original
        block and its weights. `config` goes on describing the layer as it was built.
        """
        self.let_go_of_weights()
        self.add_module(self.names.experts, experts)

    def let_go_of_weights(self) -> None:
        """Lets go of the original block and of its experts' weights, which are elsewhere now."""
        original: nn.Module | None = self.__dict__["_original"]
        if original is not None and self.split is None:
            release(original.get_submodule(self.names.experts))
        self.forget_original()

    def release_original(self) -> None:
        """Lets go of tensors of the original of which this block has packed copies."""
        if self.split is not None:
            self.split.release(self.__dict__["_original"])

    def restore(self) -> nn.Module:
        """The original block, with the tensors that this one holds now."""
        original: nn.Module = kept_original(self.__dict__["_original"])
        remove_gate(self.router_module)
        if self.split is not None:
            self.split.hand_back(original, self.routed_experts)
        else:
            original_experts = original.get_submodule(self.names.experts)
            hand_back_tensors(self.routed_experts, original_experts)
        for name in original._parameters:
            original._parameters[name] = self._parameters[name]
        for name in original._buffers:
            original._buffers[name] = self._buffers[name]
        return original.train(self.training)


@contextmanager
def gate_forward(fused: FusedMoEBlock) -> Iterator[None]:
    """Gives a fused block's router its fused forward for the time of a trial."""
    install_gate(fused)
    try:
        yield
    finally:
        remove_gate(fused.router_module)


def install_gate(fused: FusedMoEBlock) -> None:
    """Gives the block's router its fused forward; a router that is kept needs none."""
    if isinstance(fused.plan_router, RecognisedRouter):
        router = fused.router_module
        router.forward = GateForward(router, fused.plan_router)


def fused_modules(model: nn.Module) -> list[tuple[str, FusedMoEBlock | FusedExperts]]:
    """Path and module of everything that `fuse` put into the model."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, FusedMoEBlock | FusedExperts)
    ]
