"""The native CPU kernel against the formulas in float64, for every form, dtype and instruction set.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moetor.config import Activation, ExpertsConfig
from moetor.kernels.base import ExpertWeights
from moetor.kernels.native import library as native_library
from moetor.kernels.native.build import BuildError
from moetor.kernels.native.kernel import native_experts
from oracle import Estimate

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _isas() -> tuple[str, ...]:
    try:
        return native_library.load().isas
    except BuildError:
        return ()


ISAS = _isas()
needs_library = pytest.mark.skipif(not ISAS, reason="the native kernel cannot be built here")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call."""

    name: str
    T: int = 5
    K: int = 2
    E: int = 4
    H: int = 64
    I: int = 32  # noqa: E741
    dtype: torch.dtype = F32
    routing: str = "random"  # random, one_expert, repeated, dropped, all_dropped
    form: Mapping[str, object] = field(default_factory=dict)
    activation: Activation = field(default_factory=Activation)

    @property
    def config(self) -> ExpertsConfig:
        return ExpertsConfig(
            num_experts=self.E,
            hidden_size=self.H,
            intermediate_size=self.I,
            activation=self.activation,
            **self.form,  # type: ignore[arg-type]
        )


GPT_OSS = {"interleaved": True, "transposed": True, "has_bias": True}
CLAMPED = Activation(alpha=1.702, limit=1.0, up_shift=1.0)
SIZES = ((1, 1), (3, 2), (97, 45), (33, 31), (130, 70))
CASES = (
    *(
        Case(name=f"plain-{T}-{str(d)[6:]}", T=T, dtype=d)
        for T in (0, 1, 2, 17)
        for d in (F32, BF16, F16)
    ),
    *(
        Case(name=f"tokens-{T}", T=T, K=1, E=1, H=70, I=40, dtype=BF16)
        for T in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25, 97, 200)
    ),
    *(
        Case(name=f"columns-{T}", T=T, K=1, E=1, H=70, I=40, dtype=BF16, form=GPT_OSS)
        for T in (1, 2, 3, 4, 5, 6, 7, 13, 97, 200)
    ),
    *(
        Case(
            name=f"odd-{H}-{I}-{str(d)[6:]}-{t}",
            H=H,
            I=I,
            dtype=d,
            form={"transposed": t, "has_bias": True},
        )
        for H, I in SIZES  # noqa: E741
        for d in (F32, BF16, F16)
        for t in (False, True)
    ),
    Case(name="long axes", T=7, H=2900, I=1500, dtype=BF16),
    Case(name="up waits for a long gate", T=3, E=16, K=8, H=40, I=1100, dtype=BF16),
    Case(name="long columns", T=7, H=2900, I=1500, dtype=BF16, form=GPT_OSS, activation=CLAMPED),
    Case(name="several spans of the second product", T=3, H=40, I=9001, dtype=BF16),
    Case(name="several groups of tokens", T=60, K=1, E=1, H=9000, I=33, dtype=BF16),
    Case(name="many tokens", T=4096, K=4, E=8, H=48, I=33, dtype=BF16),
    Case(name="many tokens, columns", T=4096, K=4, E=8, H=48, I=33, form=GPT_OSS),
    Case(name="many tokens, long axes", T=230, K=1, E=1, H=4500, I=70, dtype=BF16),
    Case(name="many tokens, several spans", T=50, K=1, E=2, H=70, I=8200, dtype=BF16),
    Case(name="many tokens of one expert", routing="one_expert", T=30, K=1, E=64, dtype=BF16),
    Case(name="every expert", K=4, T=9),
    Case(name="all on one expert", routing="one_expert", T=30, K=1),
    Case(name="an expert twice in a token", routing="repeated", T=150, H=40, dtype=BF16),
    Case(name="an expert twice, columns", routing="repeated", T=150, H=40, form=GPT_OSS),
    Case(name="dropped slots", routing="dropped", T=20, dtype=BF16),
    Case(name="all slots dropped", routing="all_dropped", T=3),
    Case(name="many experts, few tokens", T=2, E=64, K=3),
    *(
        Case(
            name=f"form-{d}-{'-'.join(form)}",
            dtype=d,
            T=8,
            H=65,
            I=37,
            form=dict.fromkeys(form, True),
            activation=act,
        )
        for d in (F32, BF16, F16)
        for form, act in (
            (("interleaved",), Activation()),
            (("interleaved", "has_bias"), CLAMPED),
            (("transposed",), Activation()),
            (("interleaved", "transposed"), Activation()),
            (("interleaved", "transposed", "has_bias"), CLAMPED),
            (("has_bias",), Activation()),
            (("weight_on_input",), Activation()),
            (("weight_on_input", "transposed"), Activation()),
            (("weight_on_input", "has_bias"), Activation()),
        )
    ),
    *(
        Case(
            name=f"ungated-{act.label}-{t}",
            T=9,
            H=65,
            I=37,
            form={"gated": False, "transposed": t},
            activation=act,
        )
        for act in (
            *(Activation(name=n) for n in ("silu", "gelu", "gelu_tanh", "relu", "relu2")),
            Activation(name="relu2", limit=0.7),
            Activation(name="relu2", limit=0.7, limit_place="after"),
        )
        for t in (False, True)
    ),
    *(
        Case(name=f"gated-{act.label}", T=9, activation=act)
        for act in (
            *(Activation(name=n) for n in ("gelu", "gelu_tanh", "relu", "relu2")),
            Activation(limit=0.5),
            Activation(limit=0.5, limit_place="after"),
            Activation(softcap=2.0),
            Activation(softcap=2.0, up_softcap=0.5),
            CLAMPED,
        )
    ),
)


@dataclass(frozen=True)
class Call:
    hidden: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    weights: ExpertWeights
    config: ExpertsConfig


def make_call(case: Case, scale: float = 1.0) -> Call:
    """Random inputs from a seed that follows from the case's name."""
    random = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    config = case.config

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    ids = torch.rand(case.T, case.E, generator=random).argsort(dim=1)[:, : case.K]
    match case.routing:
        case "one_expert":
            ids = torch.full((case.T, case.K), case.E - 1)
        case "repeated":
            ids = torch.full((case.T, case.K), 1)
        case "dropped":
            ids = torch.where(torch.rand(ids.shape, generator=random) < 0.4, case.E, ids)
        case "all_dropped":
            ids = torch.full((case.T, case.K), case.E)
    topk_weights = torch.rand(case.T, case.K, generator=random) + 0.1
    topk_weights = torch.where(ids == case.E, 0.0, topk_weights)
    weights = ExpertWeights(
        (normal(*config.gate_up_shape) * case.H**-0.5 * scale).to(case.dtype),
        (normal(*config.down_shape) * case.I**-0.5).to(case.dtype),
        normal(case.E, config.up_size).to(case.dtype) if config.has_bias else None,
        normal(case.E, case.H).to(case.dtype) if config.has_bias else None,
    )
    return Call(normal(case.T, case.H).to(case.dtype), topk_weights, ids.int(), weights, config)


def run(call: Call, isa: str | None = None, threads: int | None = None) -> Tensor:
    return native_experts(
        call.hidden,
        call.topk_weights,
        call.topk_ids,
        call.weights,
        call.config,
        isa=isa,
        threads=threads,
    )


def oracle_activation(up_J: Tensor, config: ExpertsConfig) -> Tensor:
    act = config.activation

    def sigmoid(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": lambda x: x * sigmoid(act.alpha * x),
        "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
        "gelu_tanh": lambda x: (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "relu": lambda x: x * (x > 0),
        "relu2": lambda x: x * x * (x > 0),
    }
    before = act.limit if act.limit is not None and act.limit_place == "before" else math.inf
    after = act.limit if act.limit is not None and act.limit_place == "after" else math.inf
    if not config.gated:
        return functions[act.name](up_J.clamp(max=before)).clamp(max=after)
    if config.interleaved:
        gate, up = up_J[..., ::2], up_J[..., 1::2]
    else:
        gate, up = up_J[..., : config.intermediate_size], up_J[..., config.intermediate_size :]
    gate, up = gate.clamp(max=before), up.clamp(-before, before)
    if act.softcap is not None:
        cap, up_cap = act.softcap, act.up_softcap or act.softcap
        return cap * torch.tanh(gate / cap) * sigmoid(gate) * up_cap * torch.tanh(up / up_cap)
    return functions[act.name](gate).clamp(max=after) * (up.clamp(-after, after) + act.up_shift)


def oracle(call: Call) -> Estimate:
    """The formulas in float64, expert by expert."""
    config, weights = call.config, call.weights
    out_TH = torch.zeros(call.hidden.shape, dtype=torch.float64)
    variance_TH = torch.zeros_like(out_TH)
    for expert in range(config.num_experts):
        token, slot = (call.topk_ids == expert).nonzero(as_tuple=True)
        weight_S1 = call.topk_weights[token, slot, None].double()
        x_SH = call.hidden[token].double()
        if config.weight_on_input:
            x_SH = x_SH * weight_S1
        gate_up, down = weights.gate_up[expert].double(), weights.down[expert].double()
        up_SJ = x_SH @ (gate_up if config.transposed else gate_up.T)
        if weights.gate_up_bias is not None:
            up_SJ = up_SJ + weights.gate_up_bias[expert].double()
        down_IH = down if config.transposed else down.T
        act_SI = oracle_activation(up_SJ, config)
        y_SH = act_SI @ down_IH
        if weights.down_bias is not None:
            y_SH = y_SH + weights.down_bias[expert].double()
        outside = 1.0 if config.weight_on_input else weight_S1
        out_TH.index_add_(0, token, y_SH * outside)
        # An activation near a zero is known no better than its neighbours: all count as their mean.
        mean_S1 = (act_SI**2).mean(dim=1, keepdim=True)
        variance_TH.index_add_(0, token, mean_S1 * (down_IH**2).sum(dim=0) * outside**2)
    return Estimate(out_TH, variance_TH.sqrt())


def assert_close(out: Tensor, expected: Estimate, isa: str | None = None) -> None:
    """Within float32 sums and one rounding to the output's dtype; and, where products are of
    bfloat16 pairs, one more of each activation (weighted inputs: two). These are independent and
    at most 2^-9 of a term each: by Hoeffding their sum leaves 6 of that with a probability below
    1e-7 (see `oracle.tolerance`)."""
    rounding = {F32: 0.0, BF16: 2.0**-8, F16: 2.0**-11}[out.dtype]
    value, spread = expected
    size = value.abs().max().item() if value.numel() else 0.0
    error = (out.double() - value).abs()
    allowed = rounding * value.abs() + 4e-6 * size + (1e-7 if out.dtype == F16 else 0.0)
    if out.dtype == BF16 and (isa or ISAS[-1]) == "avx512_bf16":
        allowed = allowed + 12 * 2.0**-9 * spread
    assert bool((error <= allowed).all()), (
        f"worst excess {(error - allowed).max():.3g} of {size:.3g}"
    )


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_formulas(case: Case, isa: str) -> None:
    call = make_call(case)
    out = run(call, isa)
    assert out.shape == call.hidden.shape
    assert out.dtype == case.dtype
    assert_close(out, oracle(call), isa)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activation_is_exact_over_its_range(name: str, isa: str) -> None:
    """Unit weights turn the layer into its activation; the error is relative, tails included."""
    x = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.tensor([-80.0, -30.0, 1e-30, -1e-30, 40.0, 90.0])]
    )
    config = ExpertsConfig(
        num_experts=1, hidden_size=1, intermediate_size=1, gated=False,
        activation=Activation(name=name),  # type: ignore[arg-type]
    )  # fmt: skip
    ones = torch.ones(1, 1, 1)
    ids, topk_weights = torch.zeros(x.numel(), 1, dtype=torch.int32), torch.ones(x.numel(), 1)
    out = native_experts(x[:, None], topk_weights, ids, ExpertWeights(ones, ones), config, isa=isa)[
        :, 0
    ].double()
    wide = x.double()
    if name == "gelu_tanh":  # 1 + tanh cancels even in float64
        expected = wide / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    else:
        expected = oracle_activation(wide[:, None], config)[:, 0]
    normal = expected.abs() > 1e-30
    relative = ((out - expected).abs() / expected.abs())[normal]
    # The exponent of a tail is a float32 of size x^2/2 or more; its rounding is a relative error.
    allowed = (1e-6 + 1.5e-7 * wide.abs() ** (3 if name == "gelu_tanh" else 2))[normal]
    assert bool((relative <= allowed).all())
    near = normal & (wide.abs() < 3)
    assert ((out - expected).abs() / expected.abs())[near].max() < 3e-6
    assert bool((out[~normal].abs() <= 2e-30).all())


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_soft_cap_over_its_range(isa: str) -> None:
    x = torch.linspace(-30, 30, 3001)
    config = ExpertsConfig(
        num_experts=1, hidden_size=1, intermediate_size=1, activation=Activation(softcap=3.0)
    )
    weights = ExpertWeights(torch.ones(1, 2, 1), torch.ones(1, 1, 1))
    ids, ones = torch.zeros(x.numel(), 1, dtype=torch.int32), torch.ones(x.numel(), 1)
    out = native_experts(x[:, None], ones, ids, weights, config, isa=isa)[:, 0].double()
    expected = oracle_activation(x.double()[:, None].repeat(1, 2), config)[:, 0]
    assert ((out - expected).abs() <= 3e-6 * expected.abs() + 1e-12).all()
