"""Where quantised experts are collected, one after the other, so that no more than one is held
unquantised.

Shape letters: E experts, H hidden, I intermediate, J rows of the first product (2 I when gated).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import InputError
from moetor.kernels.base import ExpertWeights
from moetor.kernels.formats import (
    ActivationFormat,
    QuantizedExpertWeights,
    canonical,
    find_format,
)
from moetor.quant_config import QuantConfig
from moetor.quantization.quantize import empty_matrix, put_expert, quantize


def deinterleaved(rows_J: Tensor, config: ExpertsConfig) -> Tensor:
    """Rows of the first product ([J, ...]), all gate rows before all up rows."""
    return torch.cat((rows_J[0::2], rows_J[1::2])) if config.interleaved else rows_J


class QuantizedSink:
    """Buffers for all experts of a layer, filled one expert at a time.

    Args:
        config: the experts; of a form other than the canonical one, in whose layout `put` and
            `put_form` then take weights.
        quant: how they are quantised.
        device: of the buffers; weights may come from elsewhere.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        quant: QuantConfig,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config
        self.quant = quant
        self._format = find_format(quant.weight_format)
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self._gate_up = empty_matrix(self._format, experts, config.up_size, hidden, device=device)
        self._down = empty_matrix(self._format, experts, hidden, inner, device=device)
        self._missing = {(name, e) for name in ("gate_up", "down") for e in range(experts)}

    def put_gate_up(self, expert: int, weight: Tensor) -> None:
        """Quantises one expert's first product, stored as the form says: [J, H] or [H, J].

        Raises:
            InputError: wrong shape, or a value that is not finite.
        """
        rows_JH = self._oriented(weight, (self.config.up_size, self.config.hidden_size), "gate_up")
        parts = 2 if self.config.gated else 1
        codes = quantize(
            deinterleaved(rows_JH, self.config), self._format, per_tensor=self._per_tensor(parts)
        )
        put_expert(self._gate_up, expert, codes)
        self._missing.discard(("gate_up", expert))

    def put_down(self, expert: int, weight: Tensor) -> None:
        """Quantises one expert's second product, stored as the form says: [H, I] or [I, H].

        Raises:
            InputError: wrong shape, or a value that is not finite.
        """
        rows_HI = self._oriented(
            weight, (self.config.hidden_size, self.config.intermediate_size), "down"
        )
        put_expert(
            self._down, expert, quantize(rows_HI, self._format, per_tensor=self._per_tensor(1))
        )
        self._missing.discard(("down", expert))

    def finish(
        self,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        post_norm: Tensor | None = None,
    ) -> QuantizedExpertWeights:
        """The layer's weights.

        Args:
            gate_up_bias: [E, J], its rows as the form says.

        Raises:
            InputError: an expert was never put.
        """
        if self._missing:
            name, expert = min(self._missing)
            raise InputError(f"{len(self._missing)} matrices are missing: {name} of {expert}")
        if gate_up_bias is not None:
            gate_up_bias = deinterleaved(gate_up_bias.T, self.config).T.contiguous()
        return QuantizedExpertWeights(
            gate_up=self._gate_up,
            down=self._down,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            post_norm=post_norm,
            activation_format=cast(ActivationFormat, self.quant.activation_format),
        )

    def _per_tensor(self, parts: int) -> int:
        return parts if self.quant.granularity == "tensor" else 0

    def _oriented(self, weight: Tensor, shape: tuple[int, int], name: str) -> Tensor:
        rows = weight.T if self.config.transposed else weight
        if tuple(rows.shape) != shape:
            wanted = shape[::-1] if self.config.transposed else shape
            raise InputError(f"{name} has shape {list(weight.shape)}, it must be {list(wanted)}")
        return rows


def quantize_experts(
    weights: ExpertWeights, config: ExpertsConfig, quant: QuantConfig
) -> QuantizedExpertWeights:
    """All experts of a layer, quantised one at a time; the originals are read only.

    Raises:
        InputError: a weight that is not finite, with the expert's number.
    """
    sink = QuantizedSink(config, quant, device=weights.down.device)
    for expert in range(config.num_experts):
        try:
            sink.put_gate_up(expert, weights.gate_up[expert])
            sink.put_down(expert, weights.down[expert])
        except InputError as error:
            raise InputError(f"expert {expert}: {error}") from error
    return sink.finish(
        gate_up_bias=weights.gate_up_bias,
        down_bias=weights.down_bias,
        post_norm=weights.post_norm,
    )


def quantized_bytes(config: ExpertsConfig, quant: QuantConfig) -> int:
    """Bytes of a layer's two products, with their scales, once quantised."""
    form, kind = canonical(config), find_format(quant.weight_format)
    up = kind.bytes_of(form.up_size, form.hidden_size)
    down = kind.bytes_of(form.hidden_size, form.intermediate_size)
    return form.num_experts * (up + down)
