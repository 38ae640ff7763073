"""How a router chooses experts.

Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moetor.config.checks import check_choice, check_positive
from moetor.errors import ConfigError

Scoring = Literal["softmax", "sigmoid", "sqrt_softplus"]
ScoreOrder = Literal["before_topk", "after_topk"]
GroupScore = Literal["max", "top2_sum"]
GroupMask = Literal["zero", "-inf"]
Precision = Literal["float32", "model"]


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
        check_positive(
            me,
            num_experts=self.num_experts,
            top_k=self.top_k,
            num_groups=self.num_groups,
            top_k_groups=self.top_k_groups,
        )
        check_choice(me, "scoring", self.scoring, ("softmax", "sigmoid", "sqrt_softplus"))
        check_choice(me, "score_order", self.score_order, ("before_topk", "after_topk"))
        check_choice(me, "group_score", self.group_score, ("max", "top2_sum"))
        check_choice(me, "group_mask", self.group_mask, ("zero", "-inf"))
        check_choice(me, "gate_precision", self.gate_precision, ("float32", "model"))
        check_choice(me, "score_precision", self.score_precision, ("float32", "model"))
        check_choice(me, "weights_precision", self.weights_precision, ("float32", "model"))
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
