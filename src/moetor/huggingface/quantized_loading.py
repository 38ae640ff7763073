"""Experts that are quantised while a checkpoint is read: no more than a few of them are held
unquantised at a time.

Shape letters: E experts, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moetor.config import ExpertsConfig
from moetor.errors import CheckpointError, InputError
from moetor.huggingface.block_form import find_packed
from moetor.huggingface.experts_form import UP_NAMES, Unrecognised, recognise_experts
from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.load_steps import LoadPlan, Streamed
from moetor.huggingface.modules import FusedMoEBlock
from moetor.huggingface.streaming import PlainSink, stand_in
from moetor.kernels.formats import QuantizedExpertWeights
from moetor.quant_config import QuantConfig
from moetor.quantization.sink import QuantizedSink

# Experts of a stand-in differ by a shift of this many elements, a whole number of cache lines.
_SHIFT = 4160
_HELD = "_moetor_held_experts"


def quantizable_experts(model: nn.Module, plan: LoadPlan) -> dict[str, ExpertsConfig]:
    """Forms of the experts modules whose weights the plan streams, by path."""
    streamed = {item.name for item in plan.streamed}
    forms: dict[str, ExpertsConfig] = {}
    for path, block, child in find_packed(model):
        module = f"{path}.{child}" if path else child
        form = recognise_experts(block.get_submodule(child))
        if isinstance(form, Unrecognised):
            continue
        up = "gate_up_proj" if form.gated else "up_proj"
        if {f"{module}.{up}", f"{module}.down_proj"} <= streamed:
            forms[module] = form
    return forms


class QuantizingSink(PlainSink):
    """Quantises the experts of `forms`, one matrix after the other; the rest is as in `PlainSink`.

    Args:
        forms: by path of the experts module.
        host: as for `PlainSink`.
    """

    def __init__(
        self,
        shapes: Mapping[str, Tensor],
        device: torch.device,
        forms: Mapping[str, ExpertsConfig],
        quant: QuantConfig,
        host: Collection[str] = (),
    ) -> None:
        super().__init__(shapes, device, host)
        self._layers = {
            path: QuantizedSink(form, quant, device="cpu" if path in self._host else device)
            for path, form in forms.items()
        }
        self._scratch: dict[tuple[str, int], Tensor] = {}
        self._scratch_lock = threading.Lock()
        self._placeholders: dict[str, Tensor] = {}

    def _layer(self, item: Streamed) -> tuple[QuantizedSink, str] | None:
        path, _, name = item.name.rpartition(".")
        layer = self._layers.get(path)
        return None if layer is None or name not in (*UP_NAMES, "down_proj") else (layer, name)

    def by_expert(self, item: Streamed) -> bool:
        """See `WeightSink.by_expert`."""
        return self._layer(item) is not None or super().by_expert(item)

    def place(self, item: Streamed, expert: int | None) -> Tensor:
        """Memory for one expert's matrix, until it is quantised."""
        if self._layer(item) is None:
            return super().place(item, expert)
        assert expert is not None, "asked for by expert"
        device = "cpu" if self.stays_on_host(item.name) else self._device
        scratch = torch.empty((1, *item.layout.shape[1:]), dtype=item.dtype, device=device)
        with self._scratch_lock:
            self._scratch[item.name, expert] = scratch
        return scratch

    def done(self, item: Streamed, expert: int | None) -> None:
        """Quantises what was read.

        Raises:
            CheckpointError: a value is not finite.
        """
        found = self._layer(item)
        if found is None:
            super().done(item, expert)
            return
        assert expert is not None, "asked for by expert"
        layer, name = found
        with self._scratch_lock:
            weight = self._scratch.pop((item.name, expert))[0]
        try:
            if name == "down_proj":
                layer.put_down(expert, weight)
            else:
                layer.put_gate_up(expert, weight)
        except InputError as error:
            raise CheckpointError(f"{item.name}, expert {expert}: {error}") from error
        with self._scratch_lock:
            if item.name not in self._placeholders:
                shape = self._shapes[item.name].shape
                self._placeholders[item.name] = stand_in(shape, item.dtype, self._device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The finished tensors; for quantised weights one that has their shape and no memory."""
        yield from super().tensors()
        yield from self._placeholders.items()

    def quantized(self) -> dict[str, QuantizedExpertWeights]:
        """The quantised weights by path of their module, without biases and norms."""
        return {path: layer.finish() for path, layer in self._layers.items()}


def hold_experts(model: nn.Module, quantized: Mapping[str, QuantizedExpertWeights]) -> None:
    """Leaves with a model the experts that were loaded quantised, for `fuse` to put into place.

    Args:
        quantized: by path of the experts module, whose own parameters are stand-ins.
    """
    if quantized:
        model.__dict__[_HELD] = dict(quantized)


def held_experts(model: nn.Module) -> Mapping[str, QuantizedExpertWeights]:
    """What `hold_experts` left with the model."""
    found: Mapping[str, QuantizedExpertWeights] = model.__dict__.get(_HELD, {})
    return found


def forget_held(model: nn.Module) -> None:
    """Forgets it: the experts are in their places."""
    model.__dict__.pop(_HELD, None)


def has_stand_ins(experts: nn.Module) -> bool:
    """Whether the matrices of an experts module are stand-ins."""
    down = experts._parameters.get("down_proj")
    return down is not None and down.numel() > 1 and not any(down.stride())


def share_parameters(module: FusedMoEBlock | FusedExperts, original: nn.Module) -> None:
    """Gives a fused module's experts the matrices that the original has now."""
    experts = module.routed_experts
    for name in (experts.up_name, "down_proj"):
        experts._parameters[name] = original._parameters[name]


@contextmanager
def random_weights(experts: nn.Module) -> Iterator[None]:
    """Gives an experts module, whose weights are stand-ins, random ones for the time of a trial.

    They take little more memory than one expert: expert e's matrix begins e * `_SHIFT` elements
    into a common one, so that no two are equal.
    """
    before = dict(experts._parameters)
    for name in (*UP_NAMES, "down_proj"):
        parameter = before.get(name)
        if parameter is None:
            continue
        count, *matrix = parameter.shape
        size = matrix[0] * matrix[1]
        generator = torch.Generator().manual_seed(size)
        drawn = torch.randn(size + count * _SHIFT, generator=generator) * min(matrix) ** -0.5
        shared = drawn.to(dtype=parameter.dtype, device=parameter.device)
        view = shared.as_strided(parameter.shape, (_SHIFT, matrix[1], 1))
        experts._parameters[name] = nn.Parameter(view, requires_grad=False)
    try:
        yield
    finally:
        for name in before:
            if experts._parameters.get(name) is not None:
                experts._parameters[name] = before[name]
