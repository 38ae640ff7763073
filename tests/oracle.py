"""What a MoE layer computes, in float64, from the formulas in the docstrings of `moetor.config`.

Loops over tokens, slots and experts, Python floats where that is bearable, and nothing of
`moetor.kernels` or `moetor.layer`: it shares no line with what it judges.

Shape letters: T tokens, K top_k, E experts (N with identity experts), H hidden, I intermediate,
J rows of the first product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetor.config import Activation, ExpertsConfig, RouterConfig, SharedExpertsConfig

# --- routing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OracleRouting:
    """Each token's experts.

    Attributes:
        ids: per token the chosen ids, best first; identity experts are E, E + 1, ...
        weights: the same slots' weights, rounded to float32 as the contract says.
        margin: per token, by how much the last choice was ahead of the first one left out; a test
            with rounded logits may not judge a token whose margin is within the rounding.
    """

    ids: list[list[int]]
    weights: list[list[float]]
    margin: list[float]

    def dense(self, width: int) -> Tensor:
        """[T, width]: the weight of each expert for each token."""
        dense = torch.zeros(len(self.ids), width, dtype=torch.float64)
        for token, (ids, weights) in enumerate(zip(self.ids, self.weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                dense[token, expert] += weight
        return dense


def _scores(x: list[float], scoring: str) -> list[float]:
    if scoring == "softmax":
        powers = [math.exp(value - max(x)) for value in x]
        return [power / sum(powers) for power in powers]
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in x]
    if scoring == "sqrt_softplus":
        return [math.sqrt(math.log1p(math.exp(value))) for value in x]
    raise AssertionError(scoring)


def _best(values: list[float], count: int) -> tuple[list[int], float]:
    """Places of the `count` largest values, and their margin over the rest."""
    order = sorted(range(len(values)), key=lambda place: -values[place])
    if count == len(values):
        return order, math.inf
    return order[:count], values[order[count - 1]] - values[order[count]]


def _limit_groups(choice: list[float], config: RouterConfig) -> tuple[list[float], float]:
    size = len(choice) // config.num_groups
    groups = [choice[start : start + size] for start in range(0, len(choice), size)]
    if config.group_score == "max":
        group_scores = [max(group) for group in groups]
    else:
        group_scores = [sum(sorted(group)[-2:]) for group in groups]
    kept, margin = _best(group_scores, config.top_k_groups)
    masked = 0.0 if config.group_mask == "zero" else -math.inf
    limited = [value if place // size in kept else masked for place, value in enumerate(choice)]
    return limited, margin


def _route_token(
    x: list[float], bias: list[float], config: RouterConfig
) -> tuple[list[int], list[float], float]:
    x = [value * config.logit_multiplier for value in x]
    if config.logit_softcap is not None:
        cap = config.logit_softcap
        x = [cap * math.tanh(value / cap) for value in x]
    scores = _scores(x, config.scoring) if config.score_order == "before_topk" else x
    choice = [score + extra for score, extra in zip(scores, bias, strict=True)]
    group_margin = math.inf
    if config.num_groups > 1:
        choice, group_margin = _limit_groups(choice, config)
    ids, margin = _best(choice, config.top_k)
    weights = [scores[place] for place in ids]
    if config.score_order == "after_topk":
        weights = _scores(weights, config.scoring)
    if config.renormalize:
        total = max(sum(weights), config.renormalize_min) + config.renormalize_eps
        weights = [weight / total for weight in weights]
    weights = [weight * config.scaling_factor for weight in weights]
    return ids, weights, min(margin, group_margin)


def route(
    logits_TN: Tensor, config: RouterConfig, bias_N: Tensor | None, dtype: torch.dtype
) -> OracleRouting:
    """The formula of `RouterConfig`, token by token. `dtype` is that of the hidden states."""
    width = config.num_experts + config.num_zero_experts
    bias = [0.0] * width if bias_N is None else bias_N.double().tolist()
    rounded = dtype if config.weights_precision == "model" else torch.float64
    result = OracleRouting([], [], [])
    for x in logits_TN.double().tolist():
        ids, weights, margin = _route_token(x, bias, config)
        result.ids.append(ids)
        result.weights.append(
            torch.tensor(weights, dtype=torch.float64).to(rounded).float().tolist()
        )
        result.margin.append(margin)
    return result


def gate(
    hidden_TH: Tensor, weight_NH: Tensor, bias_N: Tensor | None, config: RouterConfig
) -> Tensor:
    """Router logits in float64, rounded to the dtype that `gate_precision` asks for."""
    logits_TN = hidden_TH.double() @ weight_NH.double().T
    if bias_N is not None:
        logits_TN = logits_TN + bias_N.double()
    rounded = torch.float32 if config.gate_precision == "float32" else hidden_TH.dtype
    return logits_TN.to(rounded).double()


# --- experts -------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A result, and how far rounding may move it.

    Attributes:
        value: float64.
        spread: root of the sum of the squared terms that were added up to make each element: the
            size that the element would have if its terms had random signs. Independent relative
            errors u of the terms move the sum by about u * spread, however much it cancels.
    """

    value: Tensor
    spread: Tensor


class Tensors(NamedTuple):
    """An expert form's weights, under the names of `ExpertsConfig`'s docstring."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _pointwise(x: float, activation: Activation) -> float:
    if activation.function is not None:
        return float(activation.function(torch.tensor(x, dtype=torch.float64)))
    match activation.name:
        case "silu":
            return x * _sigmoid(activation.alpha * x)
        case "gelu":
            return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "relu":
            return max(x, 0.0)
        case "relu2":
            return max(x, 0.0) ** 2


def activate_gated(gate: float, up: float, activation: Activation) -> float:
    """One element of a gated activation."""
    limit, cap = activation.limit, activation.softcap
    if limit is not None and activation.limit_place == "before":
        gate, up = min(gate, limit), max(-limit, min(up, limit))
    if cap is not None:
        out = cap * math.tanh(gate / cap) * _sigmoid(activation.alpha * gate)
        up_cap = cap if activation.up_softcap is None else activation.up_softcap
        up = up_cap * math.tanh(up / up_cap)
    else:
        out = _pointwise(gate, activation)
    if limit is not None and activation.limit_place == "after":
        out, up = min(out, limit), max(-limit, min(up, limit))
    return out * (up + activation.up_shift)


def activate_ungated(x: float, activation: Activation) -> float:
    """One element of an activation without a gate."""
    limit = activation.limit
    if limit is not None and activation.limit_place == "before":
        x = min(x, limit)
    out = _pointwise(x, activation)
    if limit is not None and activation.limit_place == "after":
        out = min(out, limit)
    return out


def _activate(up_J: Tensor, config: ExpertsConfig) -> Tensor:
    rows, size = up_J.tolist(), config.intermediate_size
    if not config.gated:
        out = [activate_ungated(x, config.activation) for x in rows]
    elif config.interleaved:
        out = [activate_gated(rows[2 * i], rows[2 * i + 1], config.activation) for i in range(size)]
    else:
        out = [activate_gated(rows[i], rows[size + i], config.activation) for i in range(size)]
    return torch.tensor(out, dtype=torch.float64)


def one_expert(x_H: Tensor, expert: int, tensors: Tensors, config: ExpertsConfig) -> Estimate:
    """One expert on one token, unweighted."""
    gate_up_JH, down_HI = tensors.gate_up[expert].double(), tensors.down[expert].double()
    if config.transposed:
        gate_up_JH, down_HI = gate_up_JH.T, down_HI.T
    up_J = (gate_up_JH * x_H).sum(dim=1)
    if tensors.gate_up_bias is not None:
        up_J = up_J + tensors.gate_up_bias[expert].double()
    act_I = _activate(up_J, config)
    value_H = (down_HI * act_I).sum(dim=1)
    # An activation near a zero is known no better than its neighbours: all count as their mean.
    variance_H = (down_HI**2).sum(dim=1) * (act_I**2).mean()
    if tensors.down_bias is not None:
        bias_H = tensors.down_bias[expert].double()
        value_H, variance_H = value_H + bias_H, variance_H + bias_H**2
    if config.post_norm_eps is not None:
        assert tensors.post_norm is not None
        weight_H = tensors.post_norm.double()
        normed_H = value_H * weight_H if config.post_norm_order == "scale_first" else value_H
        scale_H = weight_H / math.sqrt(float((normed_H**2).mean()) + config.post_norm_eps)
        value_H, variance_H = value_H * scale_H, variance_H * scale_H**2
    return Estimate(value_H, variance_H.sqrt())


def experts(
    hidden_TH: Tensor,
    weights: list[list[float]],
    ids: list[list[int]],
    tensors: Tensors,
    config: ExpertsConfig,
) -> Estimate:
    """Routed experts; ids from E on are identity experts, a slot of weight 0 is a dropped one."""
    value_TH = torch.zeros(hidden_TH.shape, dtype=torch.float64)
    variance_TH = torch.zeros_like(value_TH)
    for token, x_H in enumerate(hidden_TH.double()):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            if expert >= config.num_experts:
                out, outside = Estimate(x_H, x_H.abs()), weight
            elif config.weight_on_input:
                out, outside = one_expert(x_H * weight, expert, tensors, config), 1.0
            else:
                out, outside = one_expert(x_H, expert, tensors, config), weight
            value_TH[token] += outside * out.value
            variance_TH[token] += (outside * out.spread) ** 2
    return Estimate(value_TH, variance_TH.sqrt())


def shared_experts(
    hidden_TH: Tensor, gate_up_JH: Tensor, down_HI: Tensor, gate_H: Tensor | None, config: Any
) -> Estimate:
    """The dense gated MLP that every token passes, times sigmoid(x @ gate) where there is one."""
    assert isinstance(config, SharedExpertsConfig)
    form = ExpertsConfig(
        num_experts=1,
        hidden_size=hidden_TH.shape[1],
        intermediate_size=config.intermediate_size,
        activation=config.activation,
    )
    tensors = Tensors(gate_up_JH[None], down_HI[None])
    factors = [[1.0]] * len(hidden_TH)
    if gate_H is not None:
        factors = [[_sigmoid(float(x_H @ gate_H.double()))] for x_H in hidden_TH.double()]
    return experts(hidden_TH, factors, [[0]] * len(hidden_TH), tensors, form)


def product(x: Estimate, weight_YX: Tensor) -> Estimate:
    """`x @ weight.T` of something that is itself an estimate."""
    weight = weight_YX.double()
    variance = (x.spread**2 + x.value**2) @ (weight**2).T
    return Estimate(x.value @ weight.T, variance.sqrt())


def add(a: Estimate, b: Estimate, *, mean: bool = False) -> Estimate:
    """The sum of two results, or their mean."""
    share = 0.5 if mean else 1.0
    spread = (a.spread**2 + b.spread**2).sqrt()
    return Estimate(share * (a.value + b.value), share * spread)


# --- comparison ----------------------------------------------------------------------------------


def tolerance(expected: Estimate, dtype: torch.dtype) -> Tensor:
    """How far a right result in `dtype` may lie from `expected`, element by element.

    Let u = eps(dtype) / 2. A result is a sum of terms weight * activation * down, rounded once
    more at its end: u * |value|. Each term carries a few roundings (gate, up, activation, slot
    output), each of at most u relative to a term's size, independent of the others: by Hoeffding
    their sum leaves 6 * u * spread, for one rounding per term, with a probability below 1e-7.
    With bfloat16 and float16 all products accumulate in float32, so those few roundings are all:
    16 u covers them. In float32 and float64 the accumulation itself rounds: n additions of partial
    sums move the result by up to about sqrt(n) u * spread, n being below 100 in these tests,
    and exp, tanh and erf are good to a few units only: 128 u.
    """
    unit = torch.finfo(dtype).eps / 2
    factor = 16 if dtype in (torch.bfloat16, torch.float16) else 128
    tiny = torch.finfo(dtype).tiny  # below the smallest normal number, relative errors mean nothing
    return factor * unit * (expected.spread + expected.value.abs()) + tiny


def assert_close(actual: Tensor, expected: Estimate, dtype: torch.dtype | None = None) -> None:
    """`actual` is `expected` within the tolerance of `dtype` (its own by default)."""
    assert actual.shape == expected.value.shape
    assert actual.isfinite().all()
    excess = (actual.double() - expected.value).abs() / tolerance(expected, dtype or actual.dtype)
    assert not (excess > 1).any(), f"off by {float(excess.max()):.3g} tolerances"
