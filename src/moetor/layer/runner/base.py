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
from moetor.layer.recording import choice_of_tokens
from moetor.layer.routing.router import CustomRouter
from moetor.parallel.collectives import all_reduce
from moetor.parallel.dispatch import Dispatcher
from moetor.quantization.method import MonolithicMethod

if TYPE_CHECKING:
    from moetor.layer.experts import Experts
    from moetor.layer.moe import MoELayer
    from moetor.layer.token_split import TokenSplit
    from moetor.parallel.layout import LayerLayout


Between = Callable[[], None]
"""What runs between a dispatch and its combine."""


class ExpertsOwner(Protocol):
    """What a runner and the ops need of whoever holds routed experts."""

    runner: MoERunner

    @property
    def name(self) -> str:
        """Under which it is filed."""

    @property
    def routed_experts(self) -> Experts:
        """The routed experts."""

    @property
    def dispatcher(self) -> Dispatcher:
        """How tokens reach them."""

    @property
    def ranks(self) -> int:
        """How many ranks' results are summed after the experts; 1 for no reduction."""

    @property
    def num_ids(self) -> int:
        """Ids below it are experts, or identity experts; it is the one of a dropped slot."""

    @property
    def parallel(self) -> LayerLayout | None:
        """Where experts and tokens are among ranks; None on one device."""

    @property
    def token_split(self) -> TokenSplit | None:
        """How tokens are split over ranks before they come here, under sequence parallelism."""


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
            hidden_TH = layer.token_split.own(hidden_TH)  # logits are split in the op
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
        tokens = logits_TE.shape[0]
        if layer.token_split is not None:
            logits_TE = layer.token_split.own(logits_TE)
        if isinstance(layer.routed_experts.method, MonolithicMethod):
            context = get_forward_context()
            if context.recorder is not None or context.replay is not None:
                raise UnsupportedError(
                    f"layer {layer.name!r} routes inside its kernel, where nothing can be recorded "
                    "or replayed; use a modular quant method"
                )
            return self.run_monolithic(layer, hidden_TX, logits_TE)
        routing = layer.route(logits_TE, hidden_TX.dtype)
        own = tokens if layer.token_split is None else layer.token_split.num_own(tokens)
        self.note_choice(layer, routing, filling=hidden_TX.shape[0] - own)
        return self.run_experts(layer, hidden_TX, routing, between=between)

    @staticmethod
    def note_choice(owner: ExpertsOwner, routing: Routing, *, filling: int = 0) -> None:
        """Tells the recorder, and under EPLB the counters, which experts a call's tokens chose.

        Args:
            filling: rows at the end that are no tokens, where the routing does not drop them.
        """
        recorder = get_forward_context().recorder
        load = None if owner.parallel is None else owner.parallel.load
        tokens_T = get_forward_context().tokens
        if tokens_T is not None:  # also says which rows fill up a part
            filling = 0
            if owner.token_split is not None:
                tokens_T = owner.token_split.own(tokens_T)
        if recorder is not None:
            chosen = routing.topk_ids if routing.chosen_ids is None else routing.chosen_ids
            nothing = owner.num_ids
            recorder.note(owner.name, _filled(chosen, filling, nothing), tokens_T, nothing)
        if load is not None:
            nothing = load.num_experts
            chosen = _filled(routing.topk_ids, filling, nothing)
            load.count(choice_of_tokens(chosen, tokens_T, nothing))

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
        reduces = layer.config.runner.reduce_results and layer.sums
        group = layer.process_group if reduces else None
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


def _filled(ids_TK: Tensor, filling: int, nothing: int) -> Tensor:
    """Ids [T, K] in which the last `filling` rows have chosen `nothing`."""
    if not filling:
        return ids_TK
    return F.pad(ids_TK[: ids_TK.shape[0] - filling], (0, 0, 0, filling), value=nothing)


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
