"""`MoELayer`: a whole MoE block behind one call.

Shape letters: T tokens, E router logits, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetor.config import MoEConfig, Precision, SharedExpertsOrder
from moetor.errors import ConfigError, InputError, UnsupportedError
from moetor.kernels import rows_apart
from moetor.kernels.base import Weights, unquantized
from moetor.kernels.invariant import in_fixed_blocks
from moetor.kernels.routing import Routing
from moetor.layer import ops
from moetor.layer.context import get_forward_context, register_layer
from moetor.layer.experts import Experts, pad_hidden
from moetor.layer.gate import Gate
from moetor.layer.parts import ChildNames, LayerParts, RowPart
from moetor.layer.quantized_experts import make_experts
from moetor.layer.routing.router import CustomRouter, Router, RouterFunction
from moetor.layer.runner import make_runner
from moetor.layer.shared_experts import GatedMLP, SharedExperts
from moetor.layer.token_split import TokenSplit
from moetor.parallel.dispatch import Dispatcher, LocalDispatcher
from moetor.parallel.layout import LayerLayout
from moetor.quantization.method import MonolithicMethod

_ORDERS_OF_THE_OP = (
    SharedExpertsOrder.INTERNAL_OVERLAPPED,
    SharedExpertsOrder.MULTI_STREAM_OVERLAPPED,
)


class MoELayer(nn.Module):
    """Gate, routing, routed experts, shared experts and reductions as one module for inference.

    Args:
        config: what the layer is.
        router: a callable `(hidden [T, H], logits [T, E] or None) -> (weights [T, K], ids [T, K])`
            to route with instead of `config.router`'s formula.
        parts: modules and tensors to hold without a copy.
        name: under which the custom ops find the layer; made unique among living layers.
        names: of the registered children.
        process_group: over which `config.runner.reduce_results` sums.
        dispatcher: how tokens reach their experts.
        device, dtype: of parameters that are made here.

    Attributes:
        sums: false while a caller sums the ranks' results itself, where `last_sum` allows it.

    Raises:
        ConfigError: parts that contradict the configuration.
        KernelRefusedError: the kernel that was named refuses.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        router: RouterFunction | None = None,
        parts: LayerParts | None = None,
        name: str = "moe",
        names: ChildNames | None = None,
        process_group: dist.ProcessGroup | None = None,
        dispatcher: Dispatcher | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parts = parts or LayerParts()
        self.config = config
        self.names = names or ChildNames()
        self.process_group = process_group
        self.dispatcher = dispatcher or LocalDispatcher()
        self.sums = True
        self.token_split: TokenSplit | None = None
        self.parallel: LayerLayout | None = None
        self.inner_size = config.experts.hidden_size
        self.runner = make_runner(config.runner)
        self.token_router: Router | CustomRouter = (
            Router(config.router) if router is None else CustomRouter(router, config.router)
        )
        made = {"device": device, "dtype": dtype}
        self._add_gate(parts.gate, made)
        self._add_experts(parts.experts, made)
        self._add_transforms(parts, made)
        self.shared = self._add_shared(parts, made)
        if config.runner.reduce_results and process_group is None:
            raise ConfigError("reduce_results=True needs a process_group to sum over")
        self.name = register_layer(self, name)

    def forward(self, hidden_states: Tensor, router_logits: Tensor | None = None) -> Tensor:
        """The block's output for `hidden_states` [..., H], in the same shape and dtype.

        Args:
            router_logits: [..., E], for a layer built with `internal_gate=False`.

        Raises:
            InputError: wrong width, logits missing or superfluous.
            UnsupportedError: in training mode with gradients enabled.
        """
        self.check_input(hidden_states)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = self.logits(hidden_TH, router_logits)
        return self.runner.forward(self, hidden_TH, logits_TE).reshape(hidden_states.shape)

    def check_input(self, hidden_states: Tensor) -> None:
        """Refuses what `forward` cannot take.

        Raises:
            InputError: wrong width.
            UnsupportedError: in training mode with gradients enabled.
        """
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise InputError(
                f"layer {self.name!r} takes hidden states [..., {self.config.hidden_size}], not "
                f"{tuple(hidden_states.shape)}"
            )
        if self.training and torch.is_grad_enabled():
            raise UnsupportedError(
                f"layer {self.name!r} is for inference and gives no gradients; call model.eval(), "
                "use torch.no_grad(), or moetor.unfuse(model) to train"
            )

    def logits(self, hidden_TH: Tensor, router_logits: Tensor | None = None) -> Tensor | None:
        """Router logits [T, E]: the gate's, or the given ones; None where there are neither."""
        if self.gate_module is None:
            return None if router_logits is None else self._given_logits(hidden_TH, router_logits)
        if router_logits is not None:
            raise InputError(
                f"layer {self.name!r} has a gate of its own; router_logits would be ignored. Build "
                "it with internal_gate=False to pass them"
            )
        return self.by_rows("gate", hidden_TH, self.config.router.num_logits)

    def _given_logits(self, hidden_TH: Tensor, router_logits: Tensor) -> Tensor:
        logits_TE = router_logits.reshape(-1, router_logits.shape[-1])
        wanted = (hidden_TH.shape[0], self.config.router.num_logits)
        if tuple(logits_TE.shape) != wanted:
            raise InputError(
                f"layer {self.name!r} was given router_logits of shape "
                f"{tuple(router_logits.shape)} for {wanted[0]} tokens; it takes "
                f"[tokens, {wanted[1]}]"
            )
        return logits_TE

    def by_rows(self, part: RowPart, rows_TX: Tensor, width: int) -> Tensor:
        """What a part makes of rows [T, X]; under batch_invariant in blocks of fixed size, unless
        whoever calls the layer keeps rows apart anyway.

        Args:
            width: of the rows that it makes.
        """
        if not self.config.runner.batch_invariant or rows_apart.watched():
            return self._row_part(part)(rows_TX)
        if torch.compiler.is_compiling():
            # The number of blocks is the token count, for which a graph must not be made anew.
            in_float32 = part == "gate" and self.logits_precision == "float32"
            dtype = torch.float32 if in_float32 else rows_TX.dtype
            made: Tensor = ops.rows_forward(rows_TX, part, width, dtype, self.name)
            return made
        return self.in_blocks(part, rows_TX, width)

    def in_blocks(self, part: RowPart, rows_TX: Tensor, width: int) -> Tensor:
        """The same in blocks of fixed size. Body of `moetor::rows_forward`."""
        return in_fixed_blocks(self._row_part(part), rows_TX, max(width, rows_TX.shape[1]))

    def _row_part(self, part: RowPart) -> Callable[[Tensor], Tensor]:
        parts = {
            "gate": self.gate_module,
            "input_transform": self.input_transform,
            "output_transform": self.output_transform,
        }
        found = parts[part]
        assert found is not None, f"a layer without {part} does not ask for it"
        return found

    @property
    def logits_precision(self) -> Precision:
        """Whether the gate's logits are float32 or in the hidden states' dtype."""
        return self.config.router.gate_precision

    @property
    def gate_module(self) -> nn.Module | None:
        """The gate product, or None where logits come from outside."""
        return self._modules.get(self.names.gate) if self.config.internal_gate else None

    @property
    def routed_experts(self) -> Experts:
        """The routed experts."""
        found = self._modules[self.names.experts]
        assert isinstance(found, Experts), "set in __init__"
        return found

    @property
    def ranks(self) -> int:
        """How many ranks' results `reduce_results` sums; 1 without it."""
        if self.process_group is None or not self.config.runner.reduce_results:
            return 1
        return dist.get_world_size(self.process_group)

    @property
    def last_sum(self) -> dist.ProcessGroup | None:
        """The group over which the layer sums as the last thing it does; None where it does not."""
        last = self.output_transform is None and self.token_split is None
        partial = self.shared is None or not self.shared.replicated
        reduces = self.config.runner.reduce_results
        return self.process_group if last and partial and reduces else None

    @property
    def input_transform(self) -> Callable[[Tensor], Tensor] | None:
        """Projection to the latent width, before the routed experts alone."""
        return self._modules.get(self.names.input_transform)

    @property
    def output_transform(self) -> Callable[[Tensor], Tensor] | None:
        """Projection back from the latent width."""
        return self._modules.get(self.names.output_transform)

    @property
    def num_ids(self) -> int:
        """Experts and identity experts that the router chooses among."""
        return self.config.router.num_logits

    @property
    def selection_bias(self) -> Tensor | None:
        """The router's selection bias [E], wherever it lives."""
        owner = self if self.gate_module is None else self.gate_module
        bias: Tensor | None = getattr(
            owner, "_selection_bias" if owner is self else "selection_bias", None
        )
        return bias

    def route(self, logits_TE: Tensor, dtype: torch.dtype) -> Routing:
        """The routing of `logits_TE` by the formula, or as the forward context prescribes.

        Only inside an op: a compiler cannot follow the forward context.
        """
        forced_ids = self._forced_ids(logits_TE.shape[0])
        recorded = (
            get_forward_context().recorder is not None and self.config.router.num_zero_experts
        )
        if forced_ids is not None or recorded:  # launches do not tell identity experts apart
            return self.formula_routing(logits_TE, dtype, forced_ids)
        assert isinstance(self.token_router, Router), "a callable router has no formula"
        return self.token_router.launch(logits_TE, self.selection_bias, dtype)

    def formula_routing(
        self, logits_TE: Tensor, dtype: torch.dtype, forced_ids: Tensor | None = None
    ) -> Routing:
        """The routing of `logits_TE` by the configured formula, in torch operations."""
        assert isinstance(self.token_router, Router), "a callable router has no formula"
        return self.token_router.route(
            logits_TE,
            self.selection_bias,
            dtype,
            forced_ids=forced_ids,
        )

    def _forced_ids(self, tokens: int) -> Tensor | None:
        """The ids that the forward context prescribes for this call."""
        replay = get_forward_context().replay
        if replay is None:
            return None
        ids_TK = replay.take(self.name, tokens)
        config = self.config.router
        if ids_TK.shape[1] != config.top_k:
            raise InputError(
                f"layer {self.name!r} cannot replay ids {list(ids_TK.shape)}: it chooses "
                f"{config.top_k} of {config.num_experts} experts"
            )
        if tokens and not 0 <= int(ids_TK.min()) <= int(ids_TK.max()) < config.num_logits:
            raise InputError(
                f"layer {self.name!r} cannot replay ids from {int(ids_TK.min())} to "
                f"{int(ids_TK.max())}: they are 0 to {config.num_logits - 1}"
            )
        return ids_TK

    def _add_gate(self, gate: nn.Module | None, made: dict[str, Any]) -> None:
        config = self.config
        if not config.internal_gate:
            if gate is not None:
                raise ConfigError("a gate was given to a layer with internal_gate=False")
            if config.router.selection_bias:
                zeros = torch.zeros(config.router.num_logits, device=made["device"])
                self.register_buffer("_selection_bias", zeros)
            return
        self.add_module(
            self.names.gate,
            gate or Gate(config.hidden_size, config.router, bias=config.gate_bias, **made),
        )

    def _add_experts(self, weights: Weights | None, made: dict[str, Any]) -> None:
        config, runner = self.config, self.config.runner
        form = config.experts
        multiple = runner.hidden_multiple
        padded = -(-form.hidden_size // multiple) * multiple
        if padded != form.hidden_size:
            if form.post_norm_eps is not None:
                raise ConfigError("a post-expert norm cannot run on a padded hidden size")
            plain = unquantized(weights or Experts.new_weights(form, **made))
            weights = pad_hidden(plain, form.transposed, padded)
            form = replace(form, hidden_size=padded)
        experts = make_experts(
            form,
            config.quantization,
            config.router.top_k,
            kernel=runner.kernel,
            batch_invariant=runner.batch_invariant,
            weights=weights,
            **made,
        )
        method = experts.method
        if isinstance(method, MonolithicMethod):
            if isinstance(self.token_router, CustomRouter) or config.router.num_zero_experts:
                raise ConfigError(
                    f"quant method {method.name!r} routes inside its kernel; it cannot serve a "
                    "callable router or identity experts. Use a modular method"
                )
            if self.dispatcher.communicates:
                raise ConfigError(f"quant method {method.name!r} cannot be dispatched over ranks")
        self.add_module(self.names.experts, experts)
        if runner.kernel != "auto":
            _ = experts.kernel_name  # refuses now, not at the first token

    def _add_transforms(self, parts: LayerParts, made: dict[str, Any]) -> None:
        latent, hidden = self.config.latent_size, self.config.hidden_size
        before, after = parts.input_transform, parts.output_transform
        if latent is None:
            if before is not None or after is not None:
                raise ConfigError("latent projections were given to a layer without latent_size")
            return
        self.add_module(
            self.names.input_transform, before or nn.Linear(hidden, latent, bias=False, **made)
        )
        self.add_module(
            self.names.output_transform, after or nn.Linear(latent, hidden, bias=False, **made)
        )

    def _add_shared(self, parts: LayerParts, made: dict[str, Any]) -> SharedExperts | None:
        config = self.config.shared
        if config is None:
            if parts.shared is not None or parts.shared_gate is not None:
                raise ConfigError("shared experts were given to a layer configured without them")
            return None
        hidden = self.config.hidden_size
        self.add_module(self.names.shared, parts.shared or GatedMLP(hidden, config, **made))
        gate = parts.shared_gate
        if config.sigmoid_gate:
            gate = gate or nn.Linear(hidden, 1, bias=False, **made)
            self.add_module(self.names.shared_gate, gate)
        elif gate is not None:
            raise ConfigError("a shared gate was given, but shared.sigmoid_gate is False")
        if isinstance(self.token_router, CustomRouter) and config.order in _ORDERS_OF_THE_OP:
            raise ConfigError(
                f"shared experts in the order {str(config.order)!r} run inside the op that routes "
                "by the formula; a callable routes outside of it. Use 'no_overlap' or 'auto'"
            )
        shared = SharedExperts(
            self,
            self.names.shared,
            self.names.shared_gate if config.sigmoid_gate else None,
            config,
            batch_invariant=self.config.runner.batch_invariant,
        )
        shared.check_order(next(self.parameters()).device, self.dispatcher)
        return shared

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy or an unpickled layer is another layer: the ops must find it, not its model.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.name = register_layer(self, self.name)
        if self.shared is not None:
            self.shared = copy.copy(self.shared)  # a shallow copy came with the original's
            self.shared.bind(self)
