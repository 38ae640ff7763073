"""A whole layer, and how it is driven.

Shape letters: E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moetor.config.checks import check_choice, check_positive
from moetor.config.experts import ExpertsConfig, SharedExpertsConfig
from moetor.config.router import RouterConfig
from moetor.errors import ConfigError
from moetor.quant_config import QuantConfig

RunnerName = Literal["default", "chunked", "dual_batch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerConfig:
    """How a layer is driven.

    Attributes:
        name: `default`, `chunked` (workspace bounded by `workspace_bytes`), or `dual_batch` (two
            halves of the tokens, one's communication under the other's computation).
        dual_batch_min_tokens: fewer tokens than this, on the rank with the most, are not halved.
        workspace_bytes: upper bound of the routed experts' temporary memory per chunk, in bytes.
        kernel: a kernel's name, honoured or refused; only `auto` may choose.
        batch_invariant: a token's bits do not depend on what else is in the batch.
        reduce_results: sum the output over the layer's process group, once for routed and shared
            together.
        hidden_multiple: pad the hidden size of the experts' input to a multiple of this (1: no
            padding).
    """

    name: RunnerName = "default"
    workspace_bytes: int = 256 * 2**20
    dual_batch_min_tokens: int = 16384
    kernel: str = "auto"
    batch_invariant: bool = False
    reduce_results: bool = False
    hidden_multiple: int = 1

    def __post_init__(self) -> None:
        check_choice("RunnerConfig", "name", self.name, ("default", "chunked", "dual_batch"))
        check_positive(
            "RunnerConfig",
            workspace_bytes=self.workspace_bytes,
            dual_batch_min_tokens=self.dual_batch_min_tokens,
            hidden_multiple=self.hidden_multiple,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """A whole MoE layer.

    Attributes:
        hidden_size: H, width of the layer's input and output.
        router, experts, shared: the parts; `shared` is None where there are no shared experts.
        internal_gate: the layer owns the gate product; otherwise the caller passes router logits.
        gate_bias: whether that gate has a bias [E].
        latent_size: width of the routed experts where it differs from H (latent MoE): the layer
            then has an input and an output projection around them, and `experts.hidden_size` equals
            it.
        quantization: name of a quant method or of a quantisation, a `QuantConfig`, or None.
    """

    hidden_size: int
    router: RouterConfig
    experts: ExpertsConfig
    shared: SharedExpertsConfig | None = None
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    internal_gate: bool = True
    gate_bias: bool = False
    latent_size: int | None = None
    quantization: str | QuantConfig | None = None

    def __post_init__(self) -> None:
        check_positive("MoEConfig", hidden_size=self.hidden_size)
        if self.router.num_experts != self.experts.num_experts:
            raise ConfigError(
                f"MoEConfig: the router chooses among {self.router.num_experts} experts, but there "
                f"are {self.experts.num_experts}"
            )
        inner = self.hidden_size if self.latent_size is None else self.latent_size
        if self.experts.hidden_size != inner:
            raise ConfigError(
                f"MoEConfig: experts.hidden_size={self.experts.hidden_size} must equal "
                f"{'hidden_size' if self.latent_size is None else 'latent_size'}={inner}"
            )
        if self.router.num_zero_experts and self.experts.weight_on_input:
            raise ConfigError(
                "MoEConfig: identity experts are not defined with weight_on_input=True"
            )

    def with_runner(self, **changes: Any) -> MoEConfig:
        """This configuration with some fields of `runner` changed."""
        return replace(self, runner=replace(self.runner, **changes))
