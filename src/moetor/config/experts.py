"""What routed and shared experts compute.

Shape letters: T tokens, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from moetor.config.checks import check_choice, check_positive
from moetor.errors import ConfigError

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ClampPlace = Literal["before", "after"]
PostNormOrder = Literal["normalise_first", "scale_first"]
SharedCombine = Literal["sum", "mean"]


class SharedExpertsOrder(StrEnum):
    """When the shared experts run.

    AUTO: MULTI_STREAM_OVERLAPPED for a call on a GPU of at most `overlap_max_tokens` tokens, else
    NO_OVERLAP. NO_OVERLAP: before the routed ones, on the same stream. INTERNAL_OVERLAPPED: by the
    dispatcher, between dispatch and combine. MULTI_STREAM_OVERLAPPED: on a second stream.
    """

    AUTO = "auto"
    NO_OVERLAP = "no_overlap"
    INTERNAL_OVERLAPPED = "internal_overlapped"
    MULTI_STREAM_OVERLAPPED = "multi_stream_overlapped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """What stands between the up and the down product.

    Gated: `f(gate) * (up + up_shift)`, ungated: `f(up)`, with f one of the named functions.

    Attributes:
        alpha: turns silu into x * sigmoid(alpha * x) (gpt-oss: 1.702).
        limit, limit_place: clamps gate to at most limit and up to [-limit, limit] before f
            (DeepSeek-V4, gpt-oss), or clamps f(gate) and up after it (Step-3.7).
        softcap: with softcap(x) = c * tanh(x / c), replaces f(gate) * up by softcap(gate) *
            sigmoid(gate) * softcap(up) (Inkling 2).
        up_softcap: the c of up where it has one of its own.
        function: any elementwise callable in the place of f; it runs between the two products.
    """

    name: ActivationName = "silu"
    alpha: float = 1.0
    limit: float | None = None
    limit_place: ClampPlace = "before"
    up_shift: float = 0.0
    softcap: float | None = None
    up_softcap: float | None = None
    function: Callable[[Any], Any] | None = field(default=None, compare=True)

    def __post_init__(self) -> None:
        me = "Activation"
        check_choice(me, "name", self.name, ("silu", "gelu", "gelu_tanh", "relu", "relu2"))
        check_choice(me, "limit_place", self.limit_place, ("before", "after"))
        if self.alpha != 1.0 and self.name != "silu":
            raise ConfigError(
                f"{me}: alpha={self.alpha} is defined for silu alone, not for {self.name}"
            )
        if self.softcap is not None and self.name != "silu":
            raise ConfigError(f"{me}: softcap is defined for silu alone, not for {self.name}")
        self._check_combination()
        caps = (("limit", self.limit), ("softcap", self.softcap), ("up_softcap", self.up_softcap))
        for name, value in caps:
            if value is not None and not value > 0:
                raise ConfigError(f"{me}: {name}={value} must be positive (None turns it off)")

    def _check_combination(self) -> None:
        """Refuses options of which one would be ignored."""
        if self.up_softcap is not None and self.softcap is None:
            raise ConfigError("Activation: up_softcap needs softcap, the cap of the gate")
        clash = []
        if self.softcap is not None or self.function is not None:
            clash += ["alpha"] if self.alpha != 1.0 else []
        if self.softcap is not None:
            clash += ["up_shift"] if self.up_shift else []
            clash += ["function"] if self.function is not None else []
            after = self.limit is not None and self.limit_place == "after"
            clash += ["limit_place='after'"] if after else []
        if clash:
            owner = "softcap" if self.softcap is not None else "function"
            raise ConfigError(f"Activation: {owner} cannot be combined with {', '.join(clash)}")

    @property
    def label(self) -> str:
        """Short name for tables."""
        if self.function is not None:
            return str(getattr(self.function, "__name__", type(self.function).__name__))
        parts: list[str] = [self.name]
        if self.alpha != 1.0:
            parts.append(f"alpha={self.alpha:g}")
        if self.limit is not None:
            parts.append(f"limit={self.limit:g} {self.limit_place}")
        if self.up_shift:
            parts.append(f"up+{self.up_shift:g}")
        if self.softcap is not None:
            parts.append(f"softcap={self.softcap:g}")
        if self.up_softcap is not None:
            parts.append(f"up_softcap={self.up_softcap:g}")
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """The routed experts: sizes, storage form and arithmetic.

    Storage: `gate_up_proj` [E, J, H] and `down_proj` [E, H, I], with J = 2 I when gated (gate rows
    then up rows, or alternating when `interleaved`) and J = I when not. `transposed` swaps the last
    two axes of both ([E, H, J] and [E, I, H]: gpt-oss, Aria). Biases, when there are any, are
    [E, J] and [E, H].

    Attributes:
        post_norm_eps: epsilon of an RMS norm [H] on each expert's output before it is weighted, or
            None.
        post_norm_order: whether that norm multiplies by its weight last, or first (Muse Spark).
        weight_on_input: the routing weight multiplies the expert's input, not its output (Llama 4).
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = field(default_factory=Activation)
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    has_bias: bool = False
    post_norm_eps: float | None = None
    post_norm_order: PostNormOrder = "normalise_first"
    weight_on_input: bool = False

    def __post_init__(self) -> None:
        check_positive(
            "ExpertsConfig",
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
        )
        if self.interleaved and not self.gated:
            raise ConfigError(
                "ExpertsConfig: interleaved=True orders gate and up rows; it needs gated=True"
            )
        if not self.gated and (self.activation.up_shift or self.activation.softcap):
            raise ConfigError("ExpertsConfig: up_shift and softcap need gated=True")
        check_choice(
            "ExpertsConfig",
            "post_norm_order",
            self.post_norm_order,
            ("normalise_first", "scale_first"),
        )
        if self.post_norm_eps is not None and not self.post_norm_eps > 0:
            raise ConfigError(f"ExpertsConfig: post_norm_eps={self.post_norm_eps} must be positive")

    @property
    def up_size(self) -> int:
        """J: rows of the first product."""
        return 2 * self.intermediate_size if self.gated else self.intermediate_size

    @property
    def gate_up_shape(self) -> tuple[int, int, int]:
        """Shape of `gate_up_proj` as stored."""
        rows, cols = self.up_size, self.hidden_size
        return (self.num_experts, cols, rows) if self.transposed else (self.num_experts, rows, cols)

    @property
    def down_shape(self) -> tuple[int, int, int]:
        """Shape of `down_proj` as stored."""
        rows, cols = self.hidden_size, self.intermediate_size
        return (self.num_experts, cols, rows) if self.transposed else (self.num_experts, rows, cols)

    @property
    def params_per_expert(self) -> int:
        """Weights of one expert, without biases."""
        return (self.up_size + self.intermediate_size) * self.hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedExpertsConfig:
    """Experts that see every token, computed as one dense gated MLP.

    Attributes:
        intermediate_size: of that MLP (sum over the shared experts).
        activation: as for the routed experts.
        sigmoid_gate: multiply by sigmoid(x @ w), w [1, H] (Qwen2-MoE).
        combine: routed + shared, or their mean (Cohere 2 MoE).
        add_in_float32: add in float32 and cast once (HunYuan v3).
        order: when the shared experts run; a member's value as a string is taken too.
        overlap_max_tokens: T up to which `auto` takes a second stream; 0: never. With more tokens
            the routed experts fill the GPU and a second stream only competes with them. The default
            is measured, by `moetor bench shared`.
    """

    intermediate_size: int
    activation: Activation = field(default_factory=Activation)
    sigmoid_gate: bool = False
    combine: SharedCombine = "sum"
    add_in_float32: bool = False
    order: SharedExpertsOrder = SharedExpertsOrder.AUTO
    overlap_max_tokens: int = 1024

    def __post_init__(self) -> None:
        me = "SharedExpertsConfig"
        check_positive(me, intermediate_size=self.intermediate_size)
        if self.overlap_max_tokens < 0:
            raise ConfigError(
                f"{me}: overlap_max_tokens={self.overlap_max_tokens} must not be negative"
            )
        check_choice(me, "combine", self.combine, ("sum", "mean"))
        check_choice(me, "order", self.order, tuple(SharedExpertsOrder))
        object.__setattr__(self, "order", SharedExpertsOrder(self.order))
