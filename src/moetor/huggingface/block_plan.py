"""A block as it was recognised, and the layer that will take its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from moetor.config import MoEConfig
from moetor.huggingface.experts_form import experts_weights
from moetor.huggingface.router_form import KeptRouter, RecognisedRouter
from moetor.huggingface.split_experts import SplitExperts
from moetor.kernels.base import ExpertWeights

Returns = Literal["hidden", "hidden_and_weights", "hidden_and_logits", "hidden_and_state"]
"""What a family's block returns beside its hidden states."""
Layout = Literal["same", "rows", "flat"]
"""The shape in which it returns them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockChildren:
    """Names of a block's children by their part in the layer.

    Attributes:
        inputs, outputs: applied around the routed experts alone, in this order (latent MoE).
        final: applied to the block's output.
        idle: with parameters of size zero, such as shared experts of width 0: held for their names.
        replaced: children that the packed experts stand for.
        output_bias: parameter [H] of the block that is added to its output (JetMoE).
    """

    router: str
    experts: str
    shared: str | None = None
    shared_gate: str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    final: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    output_bias: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """Of all children that the fused block has."""
        single = (self.router, self.experts, self.shared, self.shared_gate)
        some = (name for name in single if name is not None)
        return frozenset((*some, *self.inputs, *self.outputs, *self.final, *self.idle))


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """A recognised block, and the layer that will take its place.

    Attributes:
        path: of the block in the model.
        block: the original.
        router: the recognised routing, or that the router is kept as a callable.
        children: which child is what.
        config: the layer.
        split: its experts, where they are not packed.
        returns: what the block returns.
        block_scale: factor that the block, not its router, applies to the routed output; it is part
            of `config.router.scaling_factor`.
        layout: whether its results have the input's shape, [T, ...], or one dimension.
        shared_weights: argument of its shared experts that takes the router's fourth answer.
        inputs: names of the block's arguments beside the hidden states.
    """

    path: str
    block: nn.Module
    router: RecognisedRouter | KeptRouter
    children: BlockChildren
    config: MoEConfig
    split: SplitExperts | None = None
    returns: Returns = "hidden"
    block_scale: float = 1.0
    layout: Layout = "same"
    shared_weights: str | None = None
    inputs: tuple[str, ...] = ()

    @property
    def router_module(self) -> nn.Module:
        """The block's router."""
        return self.block.get_submodule(self.children.router)

    def experts_weights(self) -> ExpertWeights:
        """The block's experts, packed: its own tensors where it holds them so."""
        if self.split is not None:
            return self.split.pack(self.block)
        return experts_weights(self.block.get_submodule(self.children.experts))
