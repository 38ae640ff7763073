"""The one place that knows the order of a MoE layer.

transform -> pad -> custom op (route, dispatch, experts, combine; shared experts beside them) ->
reduce -> truncate -> transform. Shape letters: T tokens, E router logits, H hidden of the layer, X
hidden of the experts (latent width, padded).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.config import SharedExpertsOrder
from moetor.errors import InputError, UnsupportedError
from moetor.kernels.routing import Routing
from moetor.layer import ops
from moetor.layer.context import get_forward_context
from moetor.layer.routing.router import CustomRouter
from moetor.parallel.collectives import all_reduce
from moetor.parallel.dispatch import Dispatcher
from moetor.quantization.method import MonolithicMethod

if TYPE_CHECKING:
    from moetor.layer.experts import Experts
    from moetor.layer.moe import MoELayer


Between = Callable[[], None]
"""What runs between a dispatch and its combine."""


class ExpertsOwner(Protocol):
    """What a runner and the ops need of whoever holds routed experts."""

    runner: MoERunner

    @property
    def routed_experts(self) -> Experts:
        """The routed experts."""

    @property
    def dispatcher(self) -> Dispatcher:
        """How tokens reach them."""

    @property
    def ranks(self) -> int:
        """How many ranks' results are summed after the experts; 1 for no reduction."""


class MoERunner(ABC):
    """The shared flow. A concrete runner says how the routed experts are run."""

    def forward(self, layer: MoELayer, hidden_TH: Tensor, logits_TE: Tensor | None) -> Tensor:
        """The layer's output [T, H].

        Args:
            hidden_TH: never written to.
            logits_TE: None only where a callable routes by the hidden states alone.
        """
        if isinstance(layer.token_router, CustomRouter):
            # A callable is Python that the op must not hide from a compiler: it routes outside.
            routing = layer.token_router.route(hidden_TH, logits_TE)
            return self.forward_routed(layer, hidden_TH, routing)
        if logits_TE is None:
            raise InputError(
                f"layer {layer.name!r} has no gate (internal_gate=False); pass router_logits"
            )
        tokens = hidden_TH.shape[0]
        if layer.token_split is not None:
            hidden_TH, logits_TE = (
                layer.token_split.own(hidden_TH),
                layer.token_split.own(logits_TE),
            )
        hidden_TX = self._prepare(layer, hidden_TH)
        shared_TH: Tensor | None = None
        if layer.shared is None:
            routed_TX = ops.moe_forward(hidden_TX, logits_TE, layer.name)
        else:
            shared_TH, routed_TX = ops.moe_forward_shared(
                hidden_TX, hidden_TH, logits_TE, layer.name
            )
        return self._finish(layer, routed_TX, shared_TH, tokens)

    def forward_routed(
        self, layer: MoELayer, hidden_TH: Tensor, routing: Routing, **shared_inputs: Tensor
    ) -> Tensor:
        """The layer's output [T, H] for a routing made outside.

        Args:
            shared_inputs: further arguments of the shared experts.
        """
        tokens = hidden_TH.shape[0]
        if layer.token_split is not None:
            hidden_TH = layer.token_split.own(hidden_TH)
            routing = layer.token_split.own_routing(routing, layer.config.router.num_experts)
            shared_inputs = {
                name: layer.token_split.own(value) for name, value in shared_inputs.items()
            }
        hidden_TX = self._prepare(layer, hidden_TH)
        shared_TH = None if layer.shared is None else layer.shared(hidden_TH, **shared_inputs)
        routed_TX = ops.transformers_moe_forward(
            hidden_TX, routing.topk_weights, routing.topk_ids, layer.name
        )
        routed_TX = add_identity(routed_TX, hidden_TX, routing, layer.ranks)
        return self._finish(layer, routed_TX, shared_TH, tokens)

    def run_routed(self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor) -> Tensor:
        """Body of `moetor::moe_forward`."""
        return self._run(layer, hidden_TX, logits_TE, None)

    def run_both(
        self, layer: MoELayer, hidden_TX: Tensor, shared_TH: Tensor, logits_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Body of `moetor::moe_forward_shared`: the shared experts in their configured order."""
        shared = layer.shared
        assert shared is not None, "the op for layers with shared experts"
        match shared.order_for(shared_TH):
            case SharedExpertsOrder.INTERNAL_OVERLAPPED:
                made: list[Tensor] = []
                routed = self._run(
                    layer, hidden_TX, logits_TE, lambda: made.append(shared(shared_TH))
                )
                return made[0], routed
            case SharedExpertsOrder.MULTI_STREAM_OVERLAPPED:
                join = shared.start_on_second_stream(shared_TH)
                routed = self._run(layer, hidden_TX, logits_TE, None)
                return join(), routed
            case _:
                return shared(shared_TH), self._run(layer, hidden_TX, logits_TE, None)

    def _run(
        self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor, between: Between | None
    ) -> Tensor:
        context = get_forward_context()
        if isinstance(layer.routed_experts.method, MonolithicMethod):
            if context.recorder is not None or context.replay is not None:
                raise UnsupportedError(
                    f"layer {layer.name!r} routes inside its kernel, where nothing can be recorded "
                    "or replayed; use a modular quant method"
                )
            return self.run_monolithic(layer, hidden_TX, logits_TE)
        routing = layer.route(logits_TE, hidden_TX.dtype)
        if context.recorder is not None:
            chosen = routing.topk_ids if routing.chosen_ids is None else routing.chosen_ids
            if layer.token_split is not None:
                experts = layer.config.router.num_experts
                chosen = layer.token_split.without_filling(chosen, logits_TE, experts)
            context.recorder.note(layer.name, chosen)
        return self.run_experts(layer, hidden_TX, routing, between=between)

    @abstractmethod
    def run_experts(
        self,
        owner: ExpertsOwner,
        hidden_TX: Tensor,
        routing: Routing,
        *,
        between: Between | None = None,
    ) -> Tensor:
        """Dispatch, routed experts, combine: [T, X]. Body of `moetor::transformers_moe_forward`.

        Args:
            between: called once, after the dispatch has begun and before the combine.
        """

    @abstractmethod
    def run_monolithic(self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor) -> Tensor:
        """The same where the kernel routes inside."""

    @staticmethod
    def _prepare(layer: MoELayer, hidden_TH: Tensor) -> Tensor:
        """Latent projection and padding of the experts' input."""
        transform = layer.input_transform
        hidden_TX = hidden_TH
        if transform is not None:
            hidden_TX = layer.by_rows("input_transform", hidden_TH, layer.inner_size)
        missing = layer.routed_experts.config.hidden_size - hidden_TX.shape[-1]
        return F.pad(hidden_TX, (0, missing)) if missing else hidden_TX.contiguous()

    @staticmethod
    def _finish(
        layer: MoELayer, routed_TX: Tensor, shared_TH: Tensor | None, tokens: int
    ) -> Tensor:
        """One reduction, at the latent width where there is one: of routed and shared results
        together, or of the routed ones alone where every rank has the whole shared experts.

        Args:
            tokens: of the call, before they were split over ranks.
        """
        group = layer.process_group if layer.config.runner.reduce_results else None
        partial = layer.shared is not None and not layer.shared.replicated
        routed_TX = routed_TX[:, : layer.inner_size]
        latent = layer.output_transform
        if group is not None and (latent is not None or not partial):
            if partial:
                routed_TX, shared_TH = _reduce_together(routed_TX, shared_TH, group)
            else:
                routed_TX = all_reduce(routed_TX, group)
            group = None
        if latent is not None:
            routed_TX = layer.by_rows("output_transform", routed_TX, layer.config.hidden_size)
        if shared_TH is not None:
            assert layer.shared is not None, "there is a shared result"
            routed_TX = layer.shared.combine(routed_TX, shared_TH)
        if group is not None:
            routed_TX = all_reduce(routed_TX, group)
        if layer.token_split is not None:
            routed_TX = layer.token_split.gather(routed_TX, tokens)
        return routed_TX


def _reduce_together(
    routed_TX: Tensor, shared_TH: Tensor | None, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """One collective for two results of different width."""
    assert shared_TH is not None, "there are shared experts"
    both = all_reduce(torch.cat((routed_TX, shared_TH), dim=-1), group)
    routed, shared = both.split((routed_TX.shape[-1], shared_TH.shape[-1]), dim=-1)
    return routed, shared


def add_identity(out_TX: Tensor, hidden_TX: Tensor, routing: Routing, ranks: int) -> Tensor:
    """Adds the share of the identity experts, which return their input (LongCat-Flash).

    Every rank knows it whole: it adds its part alone, so that the reduction counts it once.
    """
    if routing.identity_weights is None:
        return out_TX
    share = hidden_TX.float() * (routing.identity_weights / ranks).unsqueeze(-1)
    return (out_TX.float() + share).to(out_TX.dtype)
