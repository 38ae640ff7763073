"""The routed experts as a module: their parameters, their form, and the method that computes with
them.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetor.config import ExpertsConfig, RouterConfig
from moetor.errors import ConfigError
from moetor.kernels.base import ExpertWeights, Weights
from moetor.kernels.routing import Routing
from moetor.kernels.select import KernelChoice
from moetor.parallel.shard import ExpertShard
from moetor.quantization.method import ModularMethod, MonolithicMethod

if TYPE_CHECKING:
    from moetor.layer.offload.layer import OffloadedLayer

POST_NORM_NAME = "post_expert_norm"

TakenShards = dict[tuple[ExpertShard | nn.Parameter | None, ...], tuple[nn.Parameter | None, ...]]
"""Shards by the parameters that they were taken from, so that shared ones stay shared."""


class Experts(nn.Module):
    """Packed expert weights under the names that Transformers gives them.

    Parameters: `gate_up_proj` (`up_proj` when ungated), `down_proj`, and where the form has them
    `<name>_bias` and `post_norm`; shapes as in `moetor.config.ExpertsConfig`.

    Args:
        config: sizes and form.
        method: what computes; it chooses the kernel.
        top_k: K, for the choice of kernel.
        weights: existing tensors to hold without a copy; otherwise new parameters are made and
            drawn from a normal distribution with variance 1 / fan_in, biases zero, norm weights
            one.
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None
    post_norm: nn.Parameter | None
    offload: OffloadedLayer | None = None
    """What computes instead, where the parameters are in host memory for good."""

    def __init__(
        self,
        config: ExpertsConfig,
        method: ModularMethod | MonolithicMethod,
        top_k: int,
        *,
        weights: ExpertWeights | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.method = method
        self.top_k = top_k
        made = weights if weights is not None else self.new_weights(config, device, dtype)
        self.check_shapes(config, made)
        up = self.up_name
        self.register_parameter(up, _as_parameter(made.gate_up))
        self.register_parameter("down_proj", _as_parameter(made.down))
        self.register_parameter(f"{up}_bias", _as_parameter(made.gate_up_bias))
        self.register_parameter("down_proj_bias", _as_parameter(made.down_bias))
        self.register_parameter("post_norm", _as_parameter(made.post_norm))

    @property
    def up_name(self) -> str:
        """Name of the first product's parameter."""
        return "gate_up_proj" if self.config.gated else "up_proj"

    @property
    def weights(self) -> ExpertWeights:
        """The parameters, as a kernel takes them."""
        return ExpertWeights(
            gate_up=getattr(self, self.up_name).detach()[: self.config.num_experts],
            down=self.down_proj.detach(),
            gate_up_bias=_detached(getattr(self, f"{self.up_name}_bias")),
            down_bias=_detached(self.down_proj_bias),
            post_norm=self._post_norm_weight(),
        )

    @property
    def names_by_expert(self) -> tuple[str, ...]:
        """Names of the parameters that hold one expert per row of their first dimension."""
        up = self.up_name
        return (up, "down_proj", f"{up}_bias", "down_proj_bias")

    @property
    def slice_multiple(self) -> int:
        """Slices of the intermediate size begin at multiples of it."""
        return 1

    def check_shard(self, shard: ExpertShard) -> None:
        """Refuses a part that these experts cannot be cut into; any is possible here."""

    def take_shard(self, shard: ExpertShard) -> list[Tensor | None]:
        """Copies of a rank's part of the parameters `names_by_expert`."""
        part = shard.take(self.weights, self.config)
        self.check_shapes(shard.config(self.config), part)
        return [part.gate_up, part.down, part.gate_up_bias, part.down_bias]

    def keep_shard(self, shard: ExpertShard, taken: TakenShards | None = None) -> None:
        """Keeps this rank's part of the parameters, as copies, and forgets the rest.

        Args:
            taken: what layers that share their parameters with this one have kept.

        Raises:
            ConfigError: as `check_shard`.
        """
        self.check_shard(shard)
        taken = {} if taken is None else taken
        names = self.names_by_expert
        key = (shard, *(self._parameters[name] for name in names))
        if key not in taken:
            taken[key] = tuple(_as_parameter(tensor) for tensor in self.take_shard(shard))
        self._parameters.update(zip(names, taken[key], strict=True))
        self.config = shard.config(self.config)

    def expert_tensors(self) -> list[Tensor]:
        """The tensors that hold one expert per row of their first dimension, themselves."""
        held = (self._parameters[name] for name in self.names_by_expert)
        return [parameter.detach() for parameter in held if parameter is not None]

    def adopt_post_norm(self, norm: nn.Module, offset: float) -> None:
        """Takes the weight of the norm after each expert from a module, `norm.weight + offset`,
        which keeps the name that it has in a checkpoint.
        """
        self.register_parameter("post_norm", None)
        self.add_module(POST_NORM_NAME, norm)
        self.post_norm_offset = offset

    def _post_norm_weight(self) -> Tensor | None:
        norm = self._modules.get(POST_NORM_NAME)
        if norm is None:
            return _detached(self.post_norm)
        weight = norm.weight
        assert isinstance(weight, Tensor), "recognised as a norm with a weight"
        return weight.detach() + self.post_norm_offset

    @property
    def kernel_weights(self) -> Weights:
        """The parameters, as the method's kernel takes them."""
        return self.weights

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.down_proj.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states that they expect."""
        return self.down_proj.dtype

    @property
    def kernel_choice(self) -> KernelChoice:
        """The kernel on the present device and dtype, with the refusals before it."""
        return self.method.choice(self.config, self.top_k, self.device, self.dtype)

    @property
    def kernel_name(self) -> str:
        """Name of that kernel."""
        return self.kernel_choice.kernel.name

    def run(self, hidden_TH: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the routed experts, [T, H].

        Raises:
            ConfigError: the method is monolithic: it takes router logits (`run_logits`).
        """
        if not isinstance(self.method, ModularMethod):
            raise ConfigError(
                f"quant method {self.method.name!r} is monolithic: it routes inside its kernel and "
                "cannot take a routing made elsewhere; use a modular method"
            )
        if self.offload is not None:
            return self.offload.run(hidden_TH, routing)
        return self.method.apply(hidden_TH, routing, self.kernel_weights, self.config)

    def run_logits(
        self,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        router: RouterConfig,
        selection_bias: Tensor | None,
    ) -> Tensor:
        """The same from router logits, for a monolithic method."""
        assert isinstance(self.method, MonolithicMethod), "asked by a runner that looked"
        return self.method.apply(
            hidden_TH, logits_TE, router, selection_bias, self.kernel_weights, self.config
        )

    def forward(self, hidden_TH: Tensor, routing: Routing) -> Tensor:
        """See `run`."""
        return self.run(hidden_TH, routing)

    def workspace_bytes_per_token(self) -> int:
        """Temporary memory of a call per token, on the present device and dtype."""
        if self.offload is not None:
            return self.offload.workspace_bytes_per_token()
        kernel = self.kernel_choice.kernel
        return kernel.workspace_bytes_per_token(self.config, self.top_k, self.dtype)

    def tokens_within(self, budget: int) -> int:
        """The most tokens, at least one, of which a call needs at most `budget` bytes of temporary
        memory, on the present device and dtype."""
        if self.offload is not None:
            return max(1, budget // max(1, self.offload.workspace_bytes_per_token()))
        kernel = self.kernel_choice.kernel
        return kernel.tokens_within(self.config, self.top_k, self.dtype, budget)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Experts:
        """Moves and casts; experts in host memory stay there, and are not cast.

        Raises:
            ConfigError: a cast of these.
        """
        if self.offload is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        elif fn(torch.empty(0, dtype=self.dtype)).dtype != self.dtype:
            raise ConfigError(
                f"experts in host memory are {self.dtype} and cannot be cast; load the model in "
                "the dtype that it is to have"
            )
        return self

    @staticmethod
    def new_weights(
        config: ExpertsConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> ExpertWeights:
        """Random weights, as a new module has them."""

        def normal(shape: tuple[int, ...], fan_in: int) -> Tensor:
            drawn: Tensor = torch.randn(shape, device=device, dtype=dtype).mul_(fan_in**-0.5)
            return drawn

        def constant(shape: tuple[int, ...], value: float) -> Tensor:
            return torch.full(shape, value, device=device, dtype=dtype)

        experts = config.num_experts
        return ExpertWeights(
            gate_up=normal(config.gate_up_shape, config.hidden_size),
            down=normal(config.down_shape, config.intermediate_size),
            gate_up_bias=constant((experts, config.up_size), 0.0) if config.has_bias else None,
            down_bias=constant((experts, config.hidden_size), 0.0) if config.has_bias else None,
            post_norm=constant((config.hidden_size,), 1.0) if config.post_norm_eps else None,
        )

    @staticmethod
    def check_shapes(config: ExpertsConfig, weights: ExpertWeights) -> None:
        """Compares tensors with the form.

        Raises:
            ConfigError: a shape that the form does not have.
        """
        expected: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
            "gate_up": (weights.gate_up, config.gate_up_shape),
            "down": (weights.down, config.down_shape),
            "gate_up_bias": (
                weights.gate_up_bias,
                (config.num_experts, config.up_size) if config.has_bias else None,
            ),
            "down_bias": (
                weights.down_bias,
                (config.num_experts, config.hidden_size) if config.has_bias else None,
            ),
            "post_norm": (
                weights.post_norm,
                (config.hidden_size,) if config.post_norm_eps else None,
            ),
        }
        for name, (tensor, shape) in expected.items():
            found = None if tensor is None else tuple(tensor.shape)
            if name == "gate_up" and found is not None and shape is not None:
                # Rows for more experts than there are (LongCat-Flash) are held and not used.
                found = (min(found[0], shape[0]), *found[1:])
            if found != shape:
                raise ConfigError(f"experts: {name} has shape {found}, the form needs {shape}")

    def extra_repr(self) -> str:
        """Sizes and activation, for `print(model)`."""
        config = self.config
        return (
            f"{config.num_experts} experts, hidden_size={config.hidden_size}, "
            f"intermediate_size={config.intermediate_size}, {config.activation.label}"
        )


def _as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def pad_hidden(weights: ExpertWeights, transposed: bool, hidden_size: int) -> ExpertWeights:
    """Copies of the weights with zeros up to `hidden_size`: padded columns in, padded rows out."""

    def pad(tensor: Tensor, axis: int) -> Tensor:
        missing = hidden_size - tensor.shape[axis]
        widths = (0, missing) if axis == tensor.dim() - 1 else (0, 0, 0, missing)
        return F.pad(tensor, widths)

    return replace(
        weights,
        gate_up=pad(weights.gate_up, 1 if transposed else 2),
        down=pad(weights.down, 2 if transposed else 1),
        down_bias=None if weights.down_bias is None else pad(weights.down_bias, 1),
    )
