"""Shared experts: a dense MLP that sees every token, and when it runs.

Shape letters: T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetor.config import SharedExpertsConfig, SharedExpertsOrder
from moetor.errors import UnsupportedError
from moetor.kernels import rows_apart
from moetor.kernels.activations import activate
from moetor.kernels.invariant import in_fixed_blocks
from moetor.parallel.dispatch import Dispatcher


@functools.cache
def _second_stream(index: int) -> torch.cuda.Stream:
    """One for all layers of a GPU, so that what one of them frees there the next one takes."""
    return torch.cuda.Stream(index)


class GatedMLP(nn.Module):
    """`down(activation(gate(x), up(x)))` with bias-free products: gate_proj, up_proj [I, H],
    down_proj [H, I].
    """

    def __init__(
        self,
        hidden_size: int,
        config: SharedExpertsConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = config.intermediate_size
        self.activation = config.activation
        self.gate_proj = nn.Linear(hidden_size, size, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, size, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(size, hidden_size, bias=False, device=device, dtype=dtype)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        gate_up = torch.cat((self.gate_proj(hidden_TH), self.up_proj(hidden_TH)), dim=-1)
        out: Tensor = self.down_proj(activate(gate_up, self.activation))
        return out


class SharedExperts:
    """The shared experts of a layer and their explicit order.

    Args:
        owner: the layer, which registers the modules; they are looked up at every call, so that a
            module that is replaced (by a quantiser, an adapter) is the one that runs.
        mlp: name of the module `[T, H] -> [T, H]`.
        gate: name of the module `[T, H] -> [T, 1]` whose sigmoid multiplies the MLP's output
            (Qwen2-MoE), or None.
        config: how the result is combined with the routed one, and the order.
        batch_invariant: compute in blocks of fixed size.
    """

    def __init__(
        self,
        owner: nn.Module,
        mlp: str,
        gate: str | None,
        config: SharedExpertsConfig,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.bind(owner)
        self.replicated = False
        """Whether every rank that results are summed over has them whole."""
        self.mlp = mlp
        self.gate = gate
        self.config = config
        self.batch_invariant = batch_invariant

    def bind(self, owner: nn.Module) -> None:
        """Names the layer whose modules these are; a copy of a layer binds its own."""
        # Weak, or the two would keep each other, and the weights, until a garbage collection.
        self._owner: weakref.ref[nn.Module] | None = weakref.ref(owner)

    @property
    def module(self) -> nn.Module:
        """The MLP."""
        return self._module(self.mlp)

    def _module(self, name: str) -> nn.Module:
        owner = None if self._owner is None else self._owner()
        assert owner is not None, "a layer lives while its shared experts are called"
        return owner.get_submodule(name)

    def __call__(self, hidden_TH: Tensor, **inputs: Tensor) -> Tensor:
        """[T, H] to [T, H]; `inputs` [T, ...] are further arguments of the MLP."""
        if not self.batch_invariant:
            return self._run(hidden_TH, inputs)
        if rows_apart.wanted():
            with rows_apart.rows_apart():
                return self._run(hidden_TH, inputs)
        flat = {name: value.flatten(1) for name, value in inputs.items()}
        widths = [hidden_TH.shape[1], *(value.shape[1] for value in flat.values())]

        def run(rows_TX: Tensor) -> Tensor:
            hidden, *more = rows_TX.split(widths, dim=1)
            return self._run(hidden.contiguous(), dict(zip(flat, more, strict=True)))

        width = max(self.config.intermediate_size, sum(widths))
        return in_fixed_blocks(run, torch.cat((hidden_TH, *flat.values()), dim=1), 2 * width)

    def _run(self, hidden_TH: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        out: Tensor = self._module(self.mlp)(hidden_TH, **inputs)
        if self.gate is not None:
            out = F.sigmoid(self._module(self.gate)(hidden_TH)) * out
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}  # an owner is not copied along

    def combine(self, routed_TH: Tensor, shared_TH: Tensor) -> Tensor:
        """Routed and shared results as one."""
        if self.config.add_in_float32:
            total = (routed_TH.float() + shared_TH.float()).to(routed_TH.dtype)
        else:
            total = routed_TH + shared_TH
        return total / 2 if self.config.combine == "mean" else total

    def check_order(self, device: torch.device, dispatcher: Dispatcher) -> None:
        """Refuses an order that this device or dispatcher cannot keep.

        Raises:
            UnsupportedError: says which orders can be kept.
        """
        order = self.config.order
        if order is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED and device.type != "cuda":
            raise UnsupportedError(
                "shared experts in the order 'multi_stream_overlapped' need a CUDA device, not "
                f"{device.type}; use 'no_overlap'"
            )
        if order is SharedExpertsOrder.INTERNAL_OVERLAPPED and not dispatcher.communicates:
            raise UnsupportedError(
                "shared experts in the order 'internal_overlapped' run under a dispatcher's "
                "communication, and this layer has none; use 'no_overlap'"
            )

    def overlap(self) -> None:
        """From now on they run while tokens travel."""
        self.config = replace(self.config, order=SharedExpertsOrder.INTERNAL_OVERLAPPED)

    def order_for(self, hidden_TH: Tensor) -> SharedExpertsOrder:
        """The configured order, with `auto` decided for this call."""
        order = self.config.order
        if order is not SharedExpertsOrder.AUTO:
            return order
        if hidden_TH.is_cuda and 0 < hidden_TH.shape[0] <= self.config.overlap_max_tokens:
            return SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
        return SharedExpertsOrder.NO_OVERLAP

    def start_on_second_stream(self, hidden_TH: Tensor) -> Callable[[], Tensor]:
        """Starts the MLP on a second stream; calling the result joins the streams and gives its
        output.

        The caller keeps `hidden_TH` until it has joined.
        """
        current = torch.cuda.current_stream(hidden_TH.device)
        stream = _second_stream(current.device_index)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = self(hidden_TH)

        def join() -> Tensor:
            current.wait_stream(stream)
            # A captured graph orders every use itself, and holds on to recorded memory to its end.
            if not torch.cuda.is_current_stream_capturing():
                out.record_stream(current)
            return out

        return join
