"""Quantised routed experts as a module.

Shape letters: E experts, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetor.config import ExpertsConfig
from moetor.errors import ConfigError
from moetor.kernels.base import ExpertWeights
from moetor.kernels.formats import QuantizedExpertWeights, QuantizedMatrix, canonical
from moetor.layer.experts import Experts, TakenShards
from moetor.parallel.quantized_shard import check_quantized, slice_multiple, take_quantized
from moetor.parallel.shard import ExpertShard
from moetor.quant_config import QuantConfig
from moetor.quantization.method import (
    ModularMethod,
    MonolithicMethod,
    QuantizedMethod,
    make_method,
    quant_config,
)
from moetor.quantization.sink import quantize_experts

_FIELDS = ("values", "scales", "zero_points", "row_scales", "input_scales")


class QuantizedExperts(Experts):
    """Expert weights in a quantised format, in canonical form whatever form they came in.

    Parameters: the codes under the names of `Experts` (`gate_up_proj` or `up_proj`, `down_proj`),
    beside them `<name>_scales`, `_zero_points`, `_row_scales` and `_input_scales` as far as the
    format has them, and biases and `post_norm` as in `Experts`. Casting the module
    (`module.to(dtype)`) casts biases and the norm and leaves codes and scales as they are.

    Args:
        config: sizes and form; its storage form is replaced by the canonical one.
        method: its format must be that of `weights`.
        top_k: K, for the choice of kernel.
        weights: held without a copy.
        dtype: of the hidden states.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        method: ModularMethod | MonolithicMethod,
        top_k: int,
        *,
        weights: QuantizedExpertWeights,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)
        self.config = canonical(config)
        self.method = method
        self.top_k = top_k
        self._dtype = dtype
        self._activation_format = weights.activation_format
        found = (weights.weight_format, weights.activation_format)
        if found != (method.weight_format, method.activation_format):
            raise ConfigError(
                f"quant method {method.name!r} computes with {method.weight_format} weights and "
                f"{method.activation_format} activations, and was given {' and '.join(found)}"
            )
        self._forms: dict[str, QuantizedMatrix] = {}
        up = self.up_name
        self._add_matrix(up, weights.gate_up, self.config.up_size, self.config.hidden_size)
        down_shape = (self.config.hidden_size, self.config.intermediate_size)
        self._add_matrix("down_proj", weights.down, *down_shape)
        others = {
            f"{up}_bias": (weights.gate_up_bias, self.config.up_size, self.config.has_bias),
            "down_proj_bias": (weights.down_bias, self.config.hidden_size, self.config.has_bias),
        }
        for name, (bias, size, wanted) in others.items():
            shape = None if bias is None else tuple(bias.shape)
            if shape != ((self.config.num_experts, size) if wanted else None):
                raise ConfigError(f"experts: {name} has shape {shape}, has_bias={wanted}")
            self.register_parameter(name, _frozen(bias))
        self.register_parameter("post_norm", _frozen(weights.post_norm))

    def _add_matrix(self, name: str, matrix: QuantizedMatrix, rows: int, depth: int) -> None:
        kind, experts = matrix.format, self.config.num_experts
        wanted = {
            "values": (experts, *kind.value_shape(rows, depth)),
            "scales": (experts, *kind.scale_shape(rows, depth)),
            "zero_points": (experts, *kind.scale_shape(rows, depth)),
            "row_scales": (experts, rows),
            "input_scales": (experts,),
        }
        for field, tensor in matrix.tensors.items():
            if tuple(tensor.shape) != wanted[field]:
                raise ConfigError(
                    f"experts: {field} of {name} have shape {list(tensor.shape)}, format "
                    f"{kind.name} needs {list(wanted[field])}"
                )
        for field in _FIELDS:
            self.register_parameter(_parameter_name(name, field), _frozen(getattr(matrix, field)))
        # What a matrix is besides its tensors, which are the module's parameters.
        empty = torch.empty(0)
        self._forms[name] = QuantizedMatrix(
            format=kind, depth=matrix.depth, values=empty, scales=empty
        )

    def _matrix(self, name: str) -> QuantizedMatrix:
        parameters = {f: self._parameters[_parameter_name(name, f)] for f in _FIELDS}
        tensors: dict[str, Any] = {
            field: None if tensor is None else tensor.detach()
            for field, tensor in parameters.items()
        }
        return replace(self._forms[name], **tensors)

    @property
    def names_by_expert(self) -> tuple[str, ...]:
        """See `Experts.names_by_expert`."""
        up = self.up_name
        matrices = (_parameter_name(n, field) for n in (up, "down_proj") for field in _FIELDS)
        return (*matrices, f"{up}_bias", "down_proj_bias")

    @property
    def slice_multiple(self) -> int:
        """See `Experts.slice_multiple`."""
        up, down = (self._forms[name].format for name in (self.up_name, "down_proj"))
        return slice_multiple(up, down, self.config) or 1

    def check_shard(self, shard: ExpertShard) -> None:
        """Refuses a slice that would cut a group that shares a scale.

        Raises:
            ConfigError: says what is possible.
        """
        check_quantized(self.quantized_weights, self.config, shard)

    def take_shard(self, shard: ExpertShard) -> list[Tensor | None]:
        """See `Experts.take_shard`."""
        part = take_quantized(self.quantized_weights, self.config, shard)
        matrices = (part.gate_up, part.down)
        fields = [getattr(matrix, field) for matrix in matrices for field in _FIELDS]
        return [*fields, part.gate_up_bias, part.down_bias]

    def keep_shard(self, shard: ExpertShard, taken: TakenShards | None = None) -> None:
        """See `Experts.keep_shard`."""
        super().keep_shard(shard, taken)
        depth = self.config.intermediate_size
        self._forms["down_proj"] = replace(self._forms["down_proj"], depth=depth)

    @property
    def quantized_weights(self) -> QuantizedExpertWeights:
        """The parameters, as a kernel takes them."""
        up_bias, down_bias = (
            self._parameters[f"{name}_bias"] for name in (self.up_name, "down_proj")
        )
        return QuantizedExpertWeights(
            gate_up=self._matrix(self.up_name),
            down=self._matrix("down_proj"),
            gate_up_bias=None if up_bias is None else up_bias.detach(),
            down_bias=None if down_bias is None else down_bias.detach(),
            post_norm=self._post_norm_weight(),
            activation_format=self._activation_format,
        )

    @property
    def kernel_weights(self) -> QuantizedExpertWeights:
        """See `Experts.kernel_weights`."""
        return self.quantized_weights

    @property
    def weights(self) -> ExpertWeights:
        """Refused: there are no unquantised weights.

        Raises:
            ConfigError: always; `quantized_weights` has what there is.
        """
        raise ConfigError(f"these experts are quantised ({self.method.name})")

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states that they expect."""
        return self._dtype

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedExperts:
        """Moves everything, and casts what is not part of a format."""
        if self.offload is not None:
            super()._apply(fn, recurse)
            return self
        exact = {
            id(self._parameters[_parameter_name(name, field)])
            for name in self._forms
            for field in _FIELDS
        }

        def move(tensor: Tensor) -> Any:
            moved = fn(tensor)
            if id(tensor) not in exact or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(move, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype
        return self

    def extra_repr(self) -> str:
        """As `Experts`, with the quantisation."""
        return f"{super().extra_repr()}, {self.method.name}"


def _parameter_name(name: str, field: str) -> str:
    return name if field == "values" else f"{name}_{field}"


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def method_for(
    weights: QuantizedExpertWeights, kernel: str, *, batch_invariant: bool
) -> QuantizedMethod:
    """The method that computes with weights as they are, such as a checkpoint's."""
    return QuantizedMethod(
        weights.weight_format, weights.activation_format, kernel, batch_invariant=batch_invariant
    )


def make_experts(
    config: ExpertsConfig,
    quantization: str | QuantConfig | None,
    top_k: int,
    *,
    kernel: str,
    batch_invariant: bool,
    weights: ExpertWeights | QuantizedExpertWeights | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Experts:
    """Routed experts in the form that `quantization` asks for.

    Args:
        weights: quantised here where they are not yet; made where there are none.
        dtype: of the hidden states, for quantised weights; torch's default where None.

    Raises:
        ConfigError: weights that are quantised otherwise than `quantization` says.
        InputError: a weight that is not finite.
    """
    if isinstance(weights, QuantizedExpertWeights):
        given = method_for(weights, kernel, batch_invariant=batch_invariant)
        if quantization is not None:
            given = _same(make_method(quantization, kernel, batch_invariant=batch_invariant), given)
        wide = dtype or torch.get_default_dtype()
        return QuantizedExperts(config, given, top_k, weights=weights, dtype=wide)
    method = make_method(quantization, kernel, batch_invariant=batch_invariant)
    quant = quant_config(quantization)
    if quant is None:
        return Experts(config, method, top_k, weights=weights, device=device, dtype=dtype)
    plain = weights or Experts.new_weights(config, device, dtype)
    Experts.check_shapes(config, plain)
    return QuantizedExperts(
        config,
        method,
        top_k,
        weights=quantize_experts(plain, config, quant),
        dtype=plain.down.dtype,
    )


def _same(asked: ModularMethod | MonolithicMethod, given: QuantizedMethod) -> QuantizedMethod:
    """The method asked for, where it computes with the weights that are given."""
    formats = (asked.weight_format, asked.activation_format)
    if formats != (given.weight_format, given.activation_format) or not isinstance(
        asked, QuantizedMethod
    ):
        raise ConfigError(
            f"quantization={asked.name!r} was asked for, and the weights are quantised already: "
            f"{given.weight_format} with {given.activation_format} activations. Leave "
            "quantization out to use them as they are"
        )
    return asked
