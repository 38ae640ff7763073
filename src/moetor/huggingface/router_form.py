"""Recognising a Transformers router: a table of descriptions, each tried against what the router
really does.

A description is taken when the formula it stands for gives the router's own ids and weights on
random input. To add a family, add a line to `ROUTER_FORMS` or an attribute name to one of the
tuples. Shape letters: T tokens, K top_k, E router logits, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moetor.config import GroupMask, GroupScore, Precision, RouterConfig, ScoreOrder, Scoring
from moetor.errors import ConfigError
from moetor.huggingface.experts_form import Unrecognised
from moetor.huggingface.router_trial import (
    BIAS_NAMES,
    BIAS_SHIFTS,
    BIAS_STD,
    LOGITS_WEIGHTS_IDS,
    Answer,
    Places,
    Trial,
    lookup,
    random_like,
    random_twin,
    reproduces,
    try_router,
)
from moetor.kernels.gate import gate_product
from moetor.kernels.routing import adjust_logits

AskBlock = Callable[[nn.Module, Tensor | None], Answer | Unrecognised]
"""`(random router, random selection bias of the block) -> what the block's routing is`."""

TOP_K_ATTRIBUTES = ("top_k", "topk", "num_experts_per_tok", "moe_topk")
GROUPS_ATTRIBUTES = ("num_group", "n_group", "num_groups")
GROUP_TOP_K_ATTRIBUTES = ("topk_group", "top_k_group")
SCALE_ATTRIBUTES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
NORM_MIN_ATTRIBUTES = ("norm_min", "moe_norm_min")
SOFTCAP_ATTRIBUTES = ("router_logit_softcapping",)
MULTIPLIER_ATTRIBUTES = ("output_multiplier",)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterForm:
    """One kind of router, as far as it does not follow from the module's attributes.

    Attributes:
        renormalize: `never`, `always`, or `flag` (the module's `norm_topk_prob`).
        eps: added to the sum when renormalising.
        groups: how groups are scored and masked; None: this kind has no groups.
    """

    scoring: Scoring
    order: ScoreOrder = "before_topk"
    renormalize: Literal["never", "always", "flag"] = "flag"
    eps: float = 0.0
    groups: tuple[GroupScore, GroupMask] | None = None


ROUTER_FORMS: tuple[RouterForm, ...] = (
    # Qwen-MoE, OLMoE, Jamba (no renormalisation), Mixtral and MiniMax (always)
    RouterForm(scoring="softmax"),
    RouterForm(scoring="softmax", renormalize="always"),
    RouterForm(scoring="softmax", renormalize="never"),
    # gpt-oss, Granite, Aria
    RouterForm(scoring="softmax", order="after_topk", renormalize="never"),
    # DeepSeek-V2; Mistral 4; Mistral Large 4
    RouterForm(scoring="softmax", renormalize="never", groups=("max", "zero")),
    RouterForm(scoring="softmax", eps=1e-20, groups=("top2_sum", "zero")),
    RouterForm(scoring="softmax", renormalize="always", eps=1e-20, groups=("top2_sum", "zero")),
    # DeepSeek-V3 and its descendants
    RouterForm(scoring="sigmoid", eps=1e-20, groups=("top2_sum", "-inf")),
    RouterForm(scoring="sigmoid", eps=1e-20, groups=("top2_sum", "zero")),
    # Sigmoid routers without groups: MiniMax-M2, HunYuan v3, LFM2, Muse Spark, Flint
    RouterForm(scoring="sigmoid"),
    RouterForm(scoring="sigmoid", renormalize="always"),
    RouterForm(scoring="sigmoid", renormalize="always", eps=1e-20),
    RouterForm(scoring="sigmoid", renormalize="always", eps=1e-15),
    RouterForm(scoring="sigmoid", eps=1e-6),
    # Cohere 2 MoE (sigmoid of the kept), Kolibri
    RouterForm(scoring="sigmoid", order="after_topk"),
    RouterForm(scoring="sigmoid", order="after_topk", renormalize="never"),
    # DeepSeek-V4
    RouterForm(scoring="sqrt_softplus", renormalize="always", eps=1e-20),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptRouter:
    """A router without a known formula that can be called as it is: `hidden -> (logits, weights,
    ids)`.

    Attributes:
        top_k: K, as it answered.
        reason: why its formula is not known.
        batched: whether it takes [B, T, H] only.
        inputs: what else it takes, as (argument of the block, argument of the router).
        answers: how many values it answers with; a fourth is a state that the block passes on
            (Zaya), or weights for its shared experts (Inkling).
        places: which of them are weights and ids.
    """

    top_k: int
    reason: str
    batched: bool = False
    inputs: tuple[tuple[str, str], ...] = ()
    answers: int = 3
    places: Places = LOGITS_WEIGHTS_IDS


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterNames:
    """Where a router's tensors are.

    Attributes:
        weight, bias: names of the gate's parameters below the router module.
        selection_bias: name of the bias tensor below its owner, or None.
        selection_bias_on_block: whether that owner is the block, which passes the bias to the
            router.
    """

    weight: str
    bias: str | None
    selection_bias: str | None = None
    selection_bias_on_block: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RecognisedRouter:
    """A router whose formula is known.

    Attributes:
        config: the formula.
        names: of its tensors.
        logits_precision: of the logits that the module returns (Granite casts them to float32).
        logit_multiplier, logit_softcap: what has been done to the logits that it returns (Muse
            Spark, Laguna); the formula then has neither.
    """

    config: RouterConfig
    names: RouterNames
    logits_precision: Precision
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None


def recognise_router(
    router: nn.Module,
    block: nn.Module,
    *,
    num_experts: int,
    hidden_size: int,
    dtype: torch.dtype,
    hint: RouterConfig | None = None,
    ask: AskBlock | None = None,
) -> RecognisedRouter | KeptRouter | Unrecognised:
    """The formula of `router`; or that it can only be called; or why not even that.

    The trial runs on a copy of the router with random values, so that it says the same for trained,
    for freshly initialised (often all zero) and for meta parameters.

    Args:
        num_experts: E, the experts with weights; a wider gate has identity experts.
        hidden_size: H of the block.
        dtype: of its hidden states.
        hint: tried first; the answer for the block before usually fits.
        ask: asks the block instead, where the router alone does not tell: with a random router and
            a random selection bias of the block.
    """
    if "forward" in router.__dict__:
        return Unrecognised("its router's forward is wrapped by a hook")
    gate = _gate_parameters(router)
    if isinstance(gate, Unrecognised):
        return kept_router(router, hidden_size, dtype, gate.reason)
    weight = lookup(router, gate.weight)
    if weight.shape[0] < num_experts or weight.shape[1] != hidden_size:
        return Unrecognised(
            f"its router {type(router).__name__} has a gate of shape {tuple(weight.shape)}, not "
            f"[{num_experts} or more, {hidden_size}]"
        )
    names = replace(gate, **_selection_bias(router, block))
    trials = _trials(router, block, names, hidden_size, dtype, ask)
    if isinstance(trials, Unrecognised):
        return trials
    biased = names.selection_bias is not None
    zero_experts = weight.shape[0] - num_experts
    answer = trials[0].answer
    owners = (router,) if answer.places is not None else (router, block)
    top_k = answer.ids_TK.shape[1]
    configs = _candidates(owners, top_k, num_experts, zero_experts, biased)
    tried = [
        config
        for config in dict.fromkeys(configs if hint is None else (hint, *configs))
        if config.num_logits == weight.shape[0] and config.selection_bias == biased
    ]
    # To the bit first: in half precision that tells in which dtype a router computes its scores.
    for exact, config in product((True, False), tried):
        if all(reproduces(config, trial, exact=exact) for trial in trials):
            in_float32 = answer.logits_dtype == torch.float32
            told = in_float32 and _tells_adjusted_logits(config, trials[0])
            return RecognisedRouter(
                config=replace(config, logit_multiplier=1.0, logit_softcap=None)
                if told
                else config,
                names=names,
                logits_precision="float32" if in_float32 else "model",
                logit_multiplier=config.logit_multiplier if told else 1.0,
                logit_softcap=config.logit_softcap if told else None,
            )
    why = f"no description reproduces its router {type(router).__name__}"
    return kept_router(router, hidden_size, dtype, why)


def _tells_adjusted_logits(config: RouterConfig, trial: Trial) -> bool:
    """Whether the logits that a router returns have its multiplier and its soft cap in them."""
    answer = trial.answer
    if (config.logit_multiplier, config.logit_softcap) == (1.0, None) or answer.logits_TE is None:
        return False
    logits_TE = gate_product(
        answer.hidden_TH, trial.weight_EH, trial.bias_E, config.gate_precision
    ).float()
    adjusted_TE = adjust_logits(logits_TE, config.logit_multiplier, config.logit_softcap)
    return answer.logits_TE.shape == adjusted_TE.shape and torch.allclose(
        answer.logits_TE, adjusted_TE, rtol=1e-3, atol=1e-4
    )


def _trials(
    router: nn.Module,
    block: nn.Module,
    names: RouterNames,
    hidden_size: int,
    dtype: torch.dtype,
    ask: AskBlock | None,
) -> list[Trial] | Unrecognised:
    """The router's answers with random values, once for each mean of its biases."""
    trials = []
    biased = names.selection_bias is not None
    for shift in BIAS_SHIFTS if biased else BIAS_SHIFTS[:1]:
        twin = random_twin(router, shift)
        selection_bias_E = block_bias = None
        if names.selection_bias is not None and names.selection_bias_on_block:
            own = lookup(block, names.selection_bias).flatten()
            selection_bias_E = block_bias = random_like(own, "selection bias", BIAS_STD, shift)
        elif names.selection_bias is not None:
            selection_bias_E = lookup(twin, names.selection_bias).flatten()
        answer = try_router(twin, hidden_size, dtype, block_bias)
        if isinstance(answer, Unrecognised) and ask is not None:
            failure, answer = answer, ask(twin, block_bias)
            if isinstance(answer, Unrecognised):
                return Unrecognised(f"{failure.reason}, and {answer.reason}")
        if isinstance(answer, Unrecognised):
            return answer
        gate_bias = None if names.bias is None else lookup(twin, names.bias)
        trials.append(Trial(lookup(twin, names.weight), gate_bias, selection_bias_E, answer))
    return trials


def kept_router(
    router: nn.Module, hidden_size: int, dtype: torch.dtype, why: str
) -> KeptRouter | Unrecognised:
    """The router as a callable, when it answers as a router does.

    Args:
        why: it is not more than that.
    """
    answer = try_router(random_twin(router, 0.0), hidden_size, dtype, None)
    if isinstance(answer, Unrecognised):
        return Unrecognised(f"{why}, and {answer.reason}")
    if answer.places is None:
        return Unrecognised(why)
    return KeptRouter(
        top_k=answer.ids_TK.shape[1],
        reason=why,
        batched=answer.batched,
        inputs=answer.inputs,
        answers=answer.answers,
        places=answer.places,
    )


def _gate_parameters(router: nn.Module) -> RouterNames | Unrecognised:
    """Names of the gate's weight [E, H] and of its bias [E]."""
    named = dict(router.named_parameters())
    matrices = [name for name, parameter in named.items() if parameter.dim() == 2]
    matrices = [name for name in matrices if not name.endswith(BIAS_NAMES)]
    if len(matrices) != 1:
        return Unrecognised(
            f"its router {type(router).__name__} holds {len(matrices)} weight matrices where a "
            "gate has one"
        )
    bias = matrices[0].removesuffix("weight") + "bias"
    rest = [
        name for name in named if name not in (matrices[0], bias) and not name.endswith(BIAS_NAMES)
    ]
    if rest:
        return Unrecognised(
            f"its router {type(router).__name__} holds parameters that no gate has: "
            f"{', '.join(rest)}"
        )
    return RouterNames(weight=matrices[0], bias=bias if bias in named else None)


def _selection_bias(router: nn.Module, block: nn.Module) -> dict[str, Any]:
    """Name of the selection bias, and whether the block owns it, as fields of `RouterNames`."""
    for owner, on_block in ((router, False), (block, True)):
        for name in BIAS_NAMES:
            try:
                lookup(owner, name)
            except (AttributeError, AssertionError):
                continue
            return {"selection_bias": name, "selection_bias_on_block": on_block}
    return {}


def _attribute(owners: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if value is not None:
                return value
    return None


def _candidates(
    owners: tuple[nn.Module, ...],
    top_k: int,
    num_experts: int,
    zero_experts: int,
    selection_bias: bool,
) -> Iterator[RouterConfig]:
    """Every formula that the table makes of the attributes of `owners`."""
    groups = _attribute(owners, GROUPS_ATTRIBUTES) or 1
    top_k_groups = _attribute(owners, GROUP_TOP_K_ATTRIBUTES) or 1
    scale = _attribute(owners, SCALE_ATTRIBUTES)
    flag = bool(_attribute(owners, ("norm_topk_prob",)))
    norm_min = _attribute(owners, NORM_MIN_ATTRIBUTES) or 0.0
    softcap = _attribute(owners, SOFTCAP_ATTRIBUTES) or None
    multiplier = _attribute(owners, MULTIPLIER_ATTRIBUTES) or 1.0
    scales = dict.fromkeys((float(1.0 if scale is None else scale), 1.0, 1.0 / top_k))
    precisions: tuple[tuple[Any, Any, Any], ...] = tuple(
        product(("float32", "model"), ("model", "float32"), ("float32", "model"))
    )
    for form, factor, (scores, gate, weights) in product(ROUTER_FORMS, scales, precisions):
        grouped = form.groups is not None and groups > 1
        try:
            yield RouterConfig(
                num_experts=num_experts,
                num_zero_experts=zero_experts,
                top_k=top_k,
                scoring=form.scoring,
                score_order=form.order,
                renormalize=form.renormalize == "always" or (form.renormalize == "flag" and flag),
                renormalize_eps=form.eps,
                renormalize_min=float(norm_min),
                scaling_factor=factor,
                logit_multiplier=float(multiplier),
                logit_softcap=softcap,
                num_groups=groups if grouped else 1,
                top_k_groups=top_k_groups if grouped else 1,
                group_score=form.groups[0] if grouped and form.groups else "max",
                group_mask=form.groups[1] if grouped and form.groups else "zero",
                selection_bias=selection_bias,
                gate_precision=gate,
                score_precision=scores,
                weights_precision=weights,
            )
        except ConfigError:
            continue
