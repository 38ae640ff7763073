"""Reading the form of a Transformers experts module: from its parameters' shapes and from how its
activation acts.

Shape letters: E experts, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moetor.config import Activation, ActivationName, ExpertsConfig, PostNormOrder
from moetor.kernels.activations import activate
from moetor.kernels.base import ExpertWeights
from moetor.kernels.norm import post_expert_norm
from moetor.layer.experts import POST_NORM_NAME, Experts

UP_NAMES = ("gate_up_proj", "up_proj")
ACTIVATION_NAMES: tuple[ActivationName, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
ALPHA_ATTRIBUTES = ("alpha", "swiglu_alpha")
SOFTCAP_ATTRIBUTES = ("softcap",)
ACTIVATION_ATTRIBUTES = ("act_fn", "activation_fn", "activation", "act")
LIMIT_ATTRIBUTES = ("limit", "swiglu_limit", "limits", "clamp_limit")

# Far enough out that every clamp and soft cap of a real family is met, and dense around zero.
_PROBE = torch.cat((torch.linspace(-30, 30, 257), torch.linspace(-2, 2, 256))).to(torch.float64)


@dataclass(frozen=True, slots=True)
class Unrecognised:
    """A module that the descriptions do not cover, and why, as half a sentence."""

    reason: str


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds packed expert weights: a 3-D up or gate_up parameter and a 3-D down
    parameter.
    """
    down = module._parameters.get("down_proj")
    return (
        down is not None
        and down.dim() == 3
        and any(
            (up := module._parameters.get(name)) is not None and up.dim() == 3 for name in UP_NAMES
        )
    )


def experts_weights(module: nn.Module) -> ExpertWeights:
    """The module's own tensors, not copied."""
    up = next(name for name in UP_NAMES if module._parameters.get(name) is not None)
    parameters = module._parameters
    gate_up, down = parameters[up], parameters["down_proj"]
    assert gate_up is not None, "asked after is_experts"
    assert down is not None, "asked after is_experts"
    return ExpertWeights(
        gate_up=gate_up,
        down=down,
        gate_up_bias=parameters.get(f"{up}_bias"),
        down_bias=parameters.get("down_proj_bias"),
        post_norm=_post_norm_weight(module),
    )


def _post_norm_weight(module: nn.Module) -> Tensor | None:
    norm = recognise_post_norm(module)
    if not isinstance(norm, PostNorm):
        return None
    weight = module.get_submodule(POST_NORM_NAME).weight
    assert isinstance(weight, Tensor), "recognised as a norm with a weight"
    return weight.detach() + norm.offset


def adopt_post_norm(experts: Experts, original: nn.Module) -> None:
    """Gives fused experts the norm of the experts module they replace, where it has one."""
    norm = recognise_post_norm(original)
    if isinstance(norm, PostNorm):
        experts.adopt_post_norm(original.get_submodule(POST_NORM_NAME), norm.offset)


def recognise_experts(module: nn.Module) -> ExpertsConfig | Unrecognised:
    """The form of a packed experts module, or why it has none that we know.

    The storage form follows from the decorator's flags and must agree with the shapes; the
    activation is found by trying: a candidate is taken when it reproduces the module's own
    activation in float64.
    """
    weights = experts_weights(module)
    known = {"gate_up_proj", "up_proj", "down_proj"}
    known |= {f"{name}_bias" for name in known}
    norm = recognise_post_norm(module)
    if isinstance(norm, Unrecognised):
        return norm
    if norm is not None:
        known.add(f"{POST_NORM_NAME}.weight")
    others = [name for name, _ in module.named_parameters() if name not in known]
    if others:
        return Unrecognised(f"its experts hold parameters that no form has: {', '.join(others)}")
    gated = "gate_up_proj" in module._parameters
    transposed = _is_transposed(module, weights)
    _, first, second = weights.gate_up.shape
    experts = weights.down.shape[0]  # LongCat allots gate_up_proj rows to identity experts too
    hidden, up_size = (first, second) if transposed else (second, first)
    form = ExpertsConfig(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=up_size // 2 if gated else up_size,
        gated=gated,
        transposed=transposed,
        has_bias=weights.gate_up_bias is not None,
        interleaved=gated and not getattr(module, "is_concatenated", True),
        post_norm_eps=None if norm is None else norm.eps,
        post_norm_order="normalise_first" if norm is None else norm.order,
    )
    if tuple(weights.down.shape) != form.down_shape:
        return Unrecognised(
            f"its down_proj has shape {tuple(weights.down.shape)} where gate_up_proj asks for "
            f"{form.down_shape}"
        )
    if (weights.gate_up_bias is None) != (weights.down_bias is None):
        return Unrecognised("only one of its two products has a bias")
    function = _own_activation(module, form)
    activation = None if function is None else find_activation(module, form, function)
    if activation is None:
        return Unrecognised("its activation matches none of the known ones")
    return replace(form, activation=activation)


@dataclass(frozen=True, slots=True)
class PostNorm:
    """A norm after each expert: its weight is `module.weight + offset`."""

    eps: float
    order: PostNormOrder
    offset: float


def recognise_post_norm(module: nn.Module) -> PostNorm | Unrecognised | None:
    """The norm that the experts module applies to each expert's output; None where it has none.

    Found by trying, on a copy with a random weight.
    """
    norm = module._modules.get(POST_NORM_NAME)
    if norm is None:
        return None
    weight = norm._parameters.get("weight")
    stranger = Unrecognised(f"its experts' {POST_NORM_NAME} is not a known RMS norm")
    epsilons = [getattr(norm, name, None) for name in ("eps", "variance_epsilon")]
    eps = next((value for value in epsilons if isinstance(value, float)), None)
    if weight is None or eps is None or len(list(norm.parameters())) != 1:
        return stranger
    size = weight.numel()
    generator = torch.Generator().manual_seed(size)
    twin = copy.deepcopy(norm)
    drawn = torch.randn(size, generator=generator)
    twin._parameters["weight"] = nn.Parameter(drawn, requires_grad=False)
    rows = torch.randn((8, size), generator=generator)
    expected = twin(rows)
    orders: tuple[PostNormOrder, ...] = ("normalise_first", "scale_first")
    for order, offset in product(orders, (0.0, 1.0)):
        form = ExpertsConfig(
            num_experts=1,
            hidden_size=size,
            intermediate_size=1,
            post_norm_eps=eps,
            post_norm_order=order,
        )
        if torch.allclose(post_expert_norm(rows, drawn + offset, form), expected, rtol=1e-5):
            return PostNorm(eps, order, offset)
    return stranger


def _is_transposed(module: nn.Module, weights: ExpertWeights) -> bool:
    """The decorator's flag; without one, what the shapes say (Llama 4)."""
    flag = getattr(module, "is_transposed", None)
    if flag is not None:
        return bool(flag)
    # [E, J, H] with [E, H, I], or [E, H, J] with [E, I, H]: where both fit, the trial decides.
    return weights.gate_up.shape[2] != weights.down.shape[1]


def find_activation(
    module: nn.Module, form: ExpertsConfig, function: Callable[[Tensor], Tensor]
) -> Activation | None:
    """The activation that acts as `function` does, on a wide grid; None where none does.

    Args:
        module: whose attributes hold limits, caps and an `act_fn` without a name here.
        function: gate and up [..., 2] to [..., 1]; ungated [..., 1] to [..., 1].
    """
    gate = _PROBE.repeat_interleave(7)
    up = torch.tensor([-20.0, -3.0, -0.5, 0.1, 0.7, 4.0, 25.0], dtype=torch.float64).repeat(
        len(_PROBE)
    )
    if not form.gated:
        packed = gate.unsqueeze(-1)
    else:
        packed = torch.stack((gate, up), dim=-1)  # I = 1: concatenated and interleaved coincide
    try:
        with torch.no_grad():
            expected = function(packed.to(torch.float32)).to(torch.float64)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    for candidate in _candidates(module):
        ours = activate(packed.to(torch.float32), candidate, gated=form.gated).to(torch.float64)
        if ours.shape == expected.shape and torch.allclose(ours, expected, rtol=2e-6, atol=1e-6):
            return candidate
    return _callable_activation(module, form, packed, expected)


def _own_activation(module: nn.Module, form: ExpertsConfig) -> Callable[[Tensor], Tensor] | None:
    """What the module does between its products: `_apply_gate` on gate and up, `act_fn` when
    ungated.
    """
    if form.gated:
        apply_gate: Callable[[Tensor], Tensor] | None = getattr(module, "_apply_gate", None)
        if apply_gate is not None:
            return apply_gate
    act_fn: Callable[[Tensor], Tensor] | None = getattr(module, "act_fn", None)
    if act_fn is None or not form.gated:
        return act_fn
    if _numbers(module, LIMIT_ATTRIBUTES):
        return None  # it clamps somewhere in its forward, where random input may not show it
    return lambda packed: act_fn(packed[..., 0:1]) * packed[..., 1:2]


def _numbers(module: nn.Module, names: tuple[str, ...]) -> list[float]:
    """Positive finite numbers under these names, on the module or on its activation's parts."""
    found = (getattr(part, name, None) for part in module.modules() for name in names)
    numbers = [float(value) for value in found if isinstance(value, int | float)]
    return [value for value in numbers if 0 < value < float("inf")]


def _candidates(module: nn.Module) -> Iterator[Activation]:
    for name in ACTIVATION_NAMES:
        yield Activation(name=name)
    caps = _numbers(module, SOFTCAP_ATTRIBUTES)
    for cap, up_cap in product(caps, caps):
        yield Activation(softcap=cap, up_softcap=None if cap == up_cap else up_cap)
    for limit in _numbers(module, LIMIT_ATTRIBUTES):
        yield Activation(limit=limit)
        yield Activation(limit=limit, limit_place="after")
        for alpha in _numbers(module, ALPHA_ATTRIBUTES):
            yield Activation(alpha=alpha, limit=limit, up_shift=1.0)


def _callable_activation(
    module: nn.Module, form: ExpertsConfig, packed: Tensor, expected: Tensor
) -> Activation | None:
    """An `act_fn` without a name here, kept as a callable where it is plainly `act_fn(gate) *
    up`.
    """
    for name in ACTIVATION_ATTRIBUTES:
        act_fn: Any = getattr(module, name, None)
        if not callable(act_fn):
            continue
        candidate = Activation(function=act_fn)
        try:
            ours = activate(packed.to(torch.float32), candidate, gated=form.gated)
        except (RuntimeError, TypeError, ValueError):
            continue
        if torch.allclose(ours.to(torch.float64), expected, rtol=2e-6, atol=1e-6):
            return candidate
    return None
