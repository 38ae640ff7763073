"""What a MoE layer is, as data: frozen, keyword-only dataclasses that are checked when they are
made.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from moetor.errors import ConfigError
from moetor.quant_config import QuantConfig

Scoring = Literal["softmax", "sigmoid", "sqrt_softplus"]
ScoreOrder = Literal["before_topk", "after_topk"]
GroupScore = Literal["max", "top2_sum"]
GroupMask = Literal["zero", "-inf"]
Precision = Literal["float32", "model"]
ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ClampPlace = Literal["before", "after"]
PostNormOrder = Literal["normalise_first", "scale_first"]
SharedCombine = Literal["sum", "mean"]
RunnerName = Literal["default", "chunked", "dual_batch"]


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


def _check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{owner}: {name}={value!r} is not one of {', '.join(choices)}")


def _check_positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{owner}: {name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How router logits [T, E + num_zero_experts] become weights and ids [T, K].

    The formula, in order (each step is skipped at its default): logits * `logit_multiplier`; soft
    cap c * tanh(logits / c) (Gemma 2); scores; `selection_bias` added for the choice only
    (DeepSeek-V3, arXiv:2412.19437); group limit (DeepSeek-V2, arXiv:2405.04434); top-k; weights are
    the scores without the bias; renormalise; `scaling_factor`.

    Attributes:
        num_experts: E, the experts that have weights.
        top_k: K, slots per token.
        scoring: softmax, sigmoid, or sqrt(softplus(x)) (DeepSeek-V4).
        score_order: `before_topk` scores all experts and then chooses; `after_topk` chooses by
            logit and scores the K kept logits alone (gpt-oss, Granite).
        renormalize: divide a token's K weights by their sum.
        renormalize_eps: added to that sum (DeepSeek-V3: 1e-20).
        renormalize_min: lower bound of that sum (Ernie 4.5), 0 for none.
        scaling_factor: multiplies the final weights.
        num_groups, top_k_groups: groups of equal size, of which a token may use `top_k_groups`; 1
            and 1: no limit.
        group_score: a group's score, its best expert or the sum of its best two.
        group_mask: what an expert outside the chosen groups scores, 0 or -inf. With 0 and negative
            biased scores such an expert can still win, as in the families that use it.
        selection_bias: whether the router holds a bias vector [E + num_zero_experts] used for the
            choice alone.
        logit_multiplier, logit_softcap: applied to the logits first.
        num_zero_experts: identity experts with ids E.. (LongCat-Flash): they return their input.
        gate_precision: dtype of the gate product, float32 or that of the hidden states.
        score_precision: dtype of the scores and of all that follows, float32 or that of the logits
            (Mistral 4), in which scores may tie.
        weights_precision: `model` rounds the weights to the hidden states' dtype, as many families
            do.
    """

    num_experts: int
    top_k: int
    scoring: Scoring = "softmax"
    score_order: ScoreOrder = "before_topk"
    renormalize: bool = False
    renormalize_eps: float = 0.0
    renormalize_min: float = 0.0
    scaling_factor: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: GroupScore = "max"
    group_mask: GroupMask = "zero"
    selection_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    num_zero_experts: int = 0
    gate_precision: Precision = "model"
    score_precision: Precision = "float32"
    weights_precision: Precision = "float32"

    def __post_init__(self) -> None:
        me = "RouterConfig"
        _check_positive(
            me,
            num_experts=self.num_experts,
            top_k=self.top_k,
            num_groups=self.num_groups,
            top_k_groups=self.top_k_groups,
        )
        _check_choice(me, "scoring", self.scoring, ("softmax", "sigmoid", "sqrt_softplus"))
        _check_choice(me, "score_order", self.score_order, ("before_topk", "after_topk"))
        _check_choice(me, "group_score", self.group_score, ("max", "top2_sum"))
        _check_choice(me, "group_mask", self.group_mask, ("zero", "-inf"))
        _check_choice(me, "gate_precision", self.gate_precision, ("float32", "model"))
        _check_choice(me, "score_precision", self.score_precision, ("float32", "model"))
        _check_choice(me, "weights_precision", self.weights_precision, ("float32", "model"))
        if self.num_zero_experts < 0:
            raise ConfigError(
                f"{me}: num_zero_experts={self.num_zero_experts} must not be negative"
            )
        if self.top_k > self.num_logits:
            raise ConfigError(
                f"{me}: top_k={self.top_k} exceeds the {self.num_logits} experts there are to "
                "choose from; lower top_k or raise num_experts"
            )
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            raise ConfigError(
                f"{me}: logit_softcap={self.logit_softcap} must be positive (None turns it off)"
            )
        if self.renormalize_eps < 0 or self.renormalize_min < 0:
            raise ConfigError(f"{me}: renormalize_eps and renormalize_min must not be negative")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.num_groups == 1:
            if self.top_k_groups != 1:
                raise ConfigError(
                    f"RouterConfig: top_k_groups={self.top_k_groups} exceeds num_groups=1"
                )
            return
        if self.num_logits % self.num_groups:
            raise ConfigError(
                f"RouterConfig: {self.num_logits} experts do not divide into "
                f"num_groups={self.num_groups} groups"
            )
        if self.top_k_groups > self.num_groups:
            raise ConfigError(
                f"RouterConfig: top_k_groups={self.top_k_groups} exceeds "
                f"num_groups={self.num_groups}"
            )
        if self.score_order == "after_topk":
            raise ConfigError("RouterConfig: a group limit needs score_order='before_topk'")
        size = self.num_logits // self.num_groups
        if self.group_score == "top2_sum" and size < 2:
            raise ConfigError(
                "RouterConfig: group_score='top2_sum' needs groups of at least two experts"
            )
        if self.top_k > size * self.top_k_groups:
            raise ConfigError(
                f"RouterConfig: top_k={self.top_k} exceeds the {size * self.top_k_groups} experts "
                f"of top_k_groups={self.top_k_groups} groups"
            )

    @property
    def num_logits(self) -> int:
        """Width of the router logits: experts with weights and identity experts."""
        return self.num_experts + self.num_zero_experts


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
        _check_choice(me, "name", self.name, ("silu", "gelu", "gelu_tanh", "relu", "relu2"))
        _check_choice(me, "limit_place", self.limit_place, ("before", "after"))
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
        _check_positive(
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
        _check_choice(
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
        _check_positive(me, intermediate_size=self.intermediate_size)
        if self.overlap_max_tokens < 0:
            raise ConfigError(
                f"{me}: overlap_max_tokens={self.overlap_max_tokens} must not be negative"
            )
        _check_choice(me, "combine", self.combine, ("sum", "mean"))
        _check_choice(me, "order", self.order, tuple(SharedExpertsOrder))
        object.__setattr__(self, "order", SharedExpertsOrder(self.order))


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
        _check_choice("RunnerConfig", "name", self.name, ("default", "chunked", "dual_batch"))
        _check_positive(
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
        _check_positive("MoEConfig", hidden_size=self.hidden_size)
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
