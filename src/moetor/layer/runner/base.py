"""The one place that knows the order of a MoE layer.

transform -> pad -> gate -> custom op (route, dispatch, experts, combine; shared experts beside
them) -> reduce ->
truncate -> transform. Shape letters: T tokens, E router logits, H hidden of the layer, X hidden of
the experts
(latent width, padded).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.errors import InputError
from moetor.kernels.routing import Routing
from moetor.layer import ops
from moetor.layer.routing.router import CustomRouter
from moetor.layer.shared_experts import OVERLAP_MAX_TOKENS
from moetor.parallel.dispatch import Dispatcher, all_reduce
from moetor.quantization.method import MonolithicMethod

if TYPE_CHECKING:
    from moetor.layer.experts import Experts
    from moetor.layer.moe import MoELayer


class ExpertsOwner(Protocol):
    """What a runner needs of whoever holds routed experts."""

    @property
    def routed_experts(self) -> Experts:
        """The routed experts."""

    @property
    def dispatcher(self) -> Dispatcher:
        """How tokens reach them."""


class MoERunner(ABC):
    """The shared flow. A concrete runner says how the routed experts are run."""

    def forward(self, layer: MoELayer, hidden: Tensor, router_logits: Tensor | None) -> Tensor:
        """The layer's output, in the shape of `hidden`.

        Args:
            hidden: [..., H]; never written to.
            router_logits: [T, E] where the layer has no gate of its own, else None.
        """
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        routed_TX = self._prepare(layer, hidden_TH)
        if isinstance(layer.router, CustomRouter):
            shared_TH, routed_TX = self._run_custom(
                layer, layer.router, hidden_TH, routed_TX, router_logits
            )
        else:
            logits_TE = self._logits(layer, hidden_TH, router_logits)
            if layer.shared is None:
                shared_TH = None
                routed_TX = ops.moe_forward(routed_TX, logits_TE, layer.name)
            else:
                shared_TH, routed_TX = ops.moe_forward_shared(
                    routed_TX, hidden_TH, logits_TE, layer.name
                )
        return self._finish(layer, routed_TX, shared_TH).reshape(hidden.shape)

    def run_routed(self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor) -> Tensor:
        """Body of `moetor::moe_forward`."""
        if isinstance(layer.routed_experts.method, MonolithicMethod):
            return self.run_monolithic(layer, hidden_TX, logits_TE)
        routing = layer.route(logits_TE, hidden_TX.dtype)
        return self.run_experts(layer, hidden_TX, routing)

    def run_both(
        self, layer: MoELayer, hidden_TX: Tensor, shared_TH: Tensor, logits_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Body of `moetor::moe_forward_shared`: the shared experts in their configured order."""
        shared = layer.shared
        assert shared is not None, "the op for layers with shared experts"
        overlap = shared.config.order == "multi_stream_overlapped"
        if overlap and hidden_TX.shape[0] <= OVERLAP_MAX_TOKENS:
            join = shared.start_on_second_stream(shared_TH)
            routed = self.run_routed(layer, hidden_TX, logits_TE)
            return join(), routed
        return shared(shared_TH), self.run_routed(layer, hidden_TX, logits_TE)

    @abstractmethod
    def run_experts(self, owner: ExpertsOwner, hidden_TX: Tensor, routing: Routing) -> Tensor:
        """Dispatch, routed experts, combine: [T, X]. Body of `moetor::transformers_moe_forward`."""

    @abstractmethod
    def run_monolithic(self, layer: MoELayer, hidden_TX: Tensor, logits_TE: Tensor) -> Tensor:
        """The same where the kernel routes inside."""

    @staticmethod
    def _logits(layer: MoELayer, hidden_TH: Tensor, router_logits: Tensor | None) -> Tensor:
        if router_logits is None:
            if layer.gate_module is None:
                raise InputError(
                    f"layer {layer.name!r} has no gate (internal_gate=False); pass router_logits"
                )
            logits: Tensor = layer.gate_module(hidden_TH)
            return logits
        if layer.gate_module is not None:
            raise InputError(
                f"layer {layer.name!r} has a gate of its own; router_logits would be ignored. "
                f"Build it with "
                f"internal_gate=False to pass them"
            )
        return router_logits.reshape(-1, router_logits.shape[-1])

    @staticmethod
    def _prepare(layer: MoELayer, hidden_TH: Tensor) -> Tensor:
        """Latent projection and padding of the experts' input."""
        transform = layer.input_transform
        hidden_TX: Tensor = hidden_TH if transform is None else transform(hidden_TH)
        missing = layer.routed_experts.config.hidden_size - hidden_TX.shape[-1]
        return F.pad(hidden_TX, (0, missing)) if missing else hidden_TX.contiguous()

    def _run_custom(
        self,
        layer: MoELayer,
        router: CustomRouter,
        hidden_TH: Tensor,
        hidden_TX: Tensor,
        router_logits: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        """A callable routes on the layer's input, outside the op."""
        needs_gate = layer.gate_module is not None or router_logits is not None
        logits = self._logits(layer, hidden_TH, router_logits) if needs_gate else None
        routing = router.route(hidden_TH, logits)
        shared = None if layer.shared is None else layer.shared(hidden_TH)
        routed = ops.transformers_moe_forward(
            hidden_TX, routing.topk_weights, routing.topk_ids, layer.name
        )
        return shared, routed

    @staticmethod
    def _finish(layer: MoELayer, routed_TX: Tensor, shared_TH: Tensor | None) -> Tensor:
        """One reduction for routed and shared together, at the latent width where there is one."""
        group = layer.process_group if layer.config.runner.reduce_results else None
        routed_TX = routed_TX[:, : layer.inner_size]
        latent = layer.output_transform
        if latent is not None:
            if group is not None:
                routed_TX, shared_TH = _reduce_together(routed_TX, shared_TH, group)
            routed_TX = latent(routed_TX)
        if shared_TH is not None:
            assert layer.shared is not None, "there is a shared result"
            routed_TX = layer.shared.combine(routed_TX, shared_TH)
        if group is not None and latent is None:
            routed_TX = all_reduce(routed_TX, group)
        return routed_TX


def _reduce_together(
    routed_TX: Tensor, shared_TH: Tensor | None, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """One collective for two results of different width."""
    if shared_TH is None:
        return all_reduce(routed_TX, group), None
    both = all_reduce(torch.cat((routed_TX, shared_TH), dim=-1), group)
    routed, shared = both.split((routed_TX.shape[-1], shared_TH.shape[-1]), dim=-1)
    return routed, shared
