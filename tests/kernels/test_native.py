"""The native CPU kernel against the formulas in float64, bit by bit against itself, and what it refuses.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from moetor.config import Activation, ExpertsConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.native import build as native_build
from moetor.kernels.native import kernel as native_kernel
from moetor.kernels.native import library as native_library
from moetor.kernels.native.build import BuildError
from moetor.kernels.native.kernel import NativeKernel, native_experts

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
    form: dict[str, object] = field(default_factory=dict)
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
CASES = (
    *(Case(name=f"plain-{T}-{str(d)[6:]}", T=T, dtype=d) for T in (0, 1, 2, 17) for d in (F32, BF16, F16)),
    *(
        Case(name=f"tokens-{T}", T=T, K=1, E=1, H=70, I=40, dtype=BF16)
        for T in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25, 97, 200)
    ),
    *(
        Case(name=f"columns-{T}", T=T, K=1, E=1, H=70, I=40, dtype=BF16, form=GPT_OSS)
        for T in (1, 2, 3, 4, 5, 6, 7, 13, 97, 200)
    ),
    *(
        Case(name=f"odd-{H}-{I}-{str(d)[6:]}-{t}", H=H, I=I, dtype=d, form={"transposed": t, "has_bias": True})
        for H, I in ((1, 1), (3, 2), (97, 45), (33, 31), (130, 70))
        for d in (F32, BF16, F16)
        for t in (False, True)
    ),
    Case(name="long axes", T=7, H=2900, I=1500, dtype=BF16),
    Case(name="long columns", T=7, H=2900, I=1500, dtype=BF16, form=GPT_OSS, activation=CLAMPED),
    Case(name="several spans of the second product", T=3, H=40, I=9001, dtype=BF16),
    Case(name="several groups of tokens", T=60, K=1, E=1, H=9000, I=33, dtype=BF16),
    Case(name="many tokens", T=4096, K=4, E=8, H=48, I=33, dtype=BF16),
    Case(name="many tokens, columns", T=4096, K=4, E=8, H=48, I=33, form=GPT_OSS),
    Case(name="every expert", K=4, T=9),
    Case(name="all on one expert", routing="one_expert", T=30, K=1),
    Case(name="an expert twice in a token", routing="repeated", T=150, H=40, dtype=BF16),
    Case(name="an expert twice, columns", routing="repeated", T=150, H=40, form=GPT_OSS),
    Case(name="dropped slots", routing="dropped", T=20, dtype=BF16),
    Case(name="all slots dropped", routing="all_dropped", T=3),
    Case(name="many experts, few tokens", T=2, E=64, K=3),
    *(
        Case(name=f"form-{d}-{'-'.join(form)}", dtype=d, T=8, H=65, I=37, form=dict.fromkeys(form, True), activation=act)
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
        Case(name=f"ungated-{act.label}-{t}", T=9, H=65, I=37, form={"gated": False, "transposed": t}, activation=act)
        for act in (
            *(Activation(name=n) for n in ("silu", "gelu", "gelu_tanh", "relu", "relu2")),  # type: ignore[arg-type]
            Activation(name="relu2", limit=0.7),
            Activation(name="relu2", limit=0.7, limit_place="after"),
        )
        for t in (False, True)
    ),
    *(
        Case(name=f"gated-{act.label}", T=9, activation=act)
        for act in (
            *(Activation(name=n) for n in ("gelu", "gelu_tanh", "relu", "relu2")),  # type: ignore[arg-type]
            Activation(limit=0.5),
            Activation(limit=0.5, limit_place="after"),
            Activation(softcap=2.0),
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
        call.hidden, call.topk_weights, call.topk_ids, call.weights, call.config, isa=isa, threads=threads
    )


def oracle_activation(up_J: Tensor, config: ExpertsConfig) -> Tensor:
    act = config.activation

    def sigmoid(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    functions = {
        "silu": lambda x: x * sigmoid(act.alpha * x),
        "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
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
        cap = act.softcap
        return cap * torch.tanh(gate / cap) * sigmoid(gate) * cap * torch.tanh(up / cap)
    return functions[act.name](gate).clamp(max=after) * (up.clamp(-after, after) + act.up_shift)


def oracle(call: Call) -> Tensor:
    """The formulas in float64, expert by expert."""
    config, weights = call.config, call.weights
    out_TH = torch.zeros(call.hidden.shape, dtype=torch.float64)
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
        y_SH = oracle_activation(up_SJ, config) @ (down if config.transposed else down.T)
        if weights.down_bias is not None:
            y_SH = y_SH + weights.down_bias[expert].double()
        out_TH.index_add_(0, token, y_SH if config.weight_on_input else y_SH * weight_S1)
    return out_TH


def assert_close(out: Tensor, expected: Tensor) -> None:
    """Within float32 sums and one rounding to the output's dtype."""
    rounding = {F32: 0.0, BF16: 2.0**-8, F16: 2.0**-11}[out.dtype]
    size = expected.abs().max().item() if expected.numel() else 0.0
    error = (out.double() - expected).abs()
    allowed = rounding * expected.abs() + 4e-6 * size + (1e-7 if out.dtype == F16 else 0.0)
    assert bool((error <= allowed).all()), f"worst excess {(error - allowed).max():.3g} of {size:.3g}"


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_formulas(case: Case, isa: str) -> None:
    call = make_call(case)
    out = run(call, isa)
    assert out.shape == call.hidden.shape and out.dtype == case.dtype
    assert_close(out, oracle(call))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activation_is_exact_over_its_range(name: str, isa: str) -> None:
    """One expert with unit weights turns the layer into its activation; the error is relative, tails included."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-80.0, -30.0, 1e-30, -1e-30, 40.0, 90.0])])
    config = ExpertsConfig(
        num_experts=1, hidden_size=1, intermediate_size=1, gated=False,
        activation=Activation(name=name),  # type: ignore[arg-type]
    )  # fmt: skip
    ones = torch.ones(1, 1, 1)
    ids, topk_weights = torch.zeros(x.numel(), 1, dtype=torch.int32), torch.ones(x.numel(), 1)
    out = native_experts(x[:, None], topk_weights, ids, ExpertWeights(ones, ones), config, isa=isa)[:, 0].double()
    wide = x.double()
    if name == "gelu_tanh":  # 1 + tanh cancels even in float64
        expected = wide / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    else:
        expected = oracle_activation(wide[:, None], config)[:, 0]
    normal = expected.abs() > 1e-30
    relative = ((out - expected).abs() / expected.abs())[normal]
    # The exponent of a tail is a float32 of size x^2/2 or more: its rounding is the function's relative error.
    allowed = (1e-6 + 1.5e-7 * wide.abs() ** (3 if name == "gelu_tanh" else 2))[normal]
    assert bool((relative <= allowed).all())
    near = normal & (wide.abs() < 3)
    assert ((out - expected).abs() / expected.abs())[near].max() < 3e-6
    assert bool((out[~normal].abs() <= 2e-30).all())


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_soft_cap_over_its_range(isa: str) -> None:
    x = torch.linspace(-30, 30, 3001)
    config = ExpertsConfig(num_experts=1, hidden_size=1, intermediate_size=1, activation=Activation(softcap=3.0))
    weights = ExpertWeights(torch.ones(1, 2, 1), torch.ones(1, 1, 1))
    ids, ones = torch.zeros(x.numel(), 1, dtype=torch.int32), torch.ones(x.numel(), 1)
    out = native_experts(x[:, None], ones, ids, weights, config, isa=isa)[:, 0].double()
    expected = oracle_activation(x.double()[:, None].repeat(1, 2), config)[:, 0]
    assert ((out - expected).abs() <= 3e-6 * expected.abs() + 1e-12).all()


FORMS = (
    Case(name="rows", T=40, H=70, I=40, dtype=BF16),
    Case(name="columns", T=40, H=70, I=40, dtype=BF16, form=GPT_OSS, activation=CLAMPED),
    Case(name="rows f32", T=40, H=1030, I=40),
    Case(name="rows f16 long", T=40, H=2500, I=40, dtype=F16, form={"has_bias": True}),
)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_bits_do_not_depend_on_batch_threads_or_repetition(case: Case, isa: str) -> None:
    call = make_call(case)
    before = [t.clone() for t in (call.hidden, call.topk_weights, call.topk_ids, call.weights.gate_up, call.weights.down)]
    out = run(call, isa)
    for threads in (1, 2, 3, 7):
        assert torch.equal(run(call, isa, threads), out), f"{threads} threads"
    for rows in (1, 3, 13):
        parts = [
            run(replace(call, hidden=x, topk_weights=w, topk_ids=i), isa)
            for x, w, i in zip(
                call.hidden.split(rows), call.topk_weights.split(rows), call.topk_ids.split(rows), strict=True
            )
        ]
        assert torch.equal(torch.cat(parts), out), f"{rows} tokens at a time"
    after = (call.hidden, call.topk_weights, call.topk_ids, call.weights.gate_up, call.weights.down)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", [{}, {"transposed": True}], ids=["rows", "columns"])
def test_views_are_read_in_place(form: dict[str, object], isa: str) -> None:
    """Padded, transposed and strided views of the weights; what lies around them is NaN."""
    case = Case(name="views", T=9, H=40, I=24, dtype=BF16, form=form)
    call = make_call(case)
    expected = run(call, isa)

    def padded(w: Tensor) -> Tensor:
        big = torch.full((w.shape[0] + 2, w.shape[1] + 3, w.shape[2] + 5), torch.nan, dtype=w.dtype)
        view = big[1:-1, 1:-2, 2:-3]
        view.copy_(w)
        return view

    def flipped(w: Tensor) -> Tensor:
        return w.transpose(1, 2).contiguous().transpose(1, 2)

    def strided(w: Tensor) -> Tensor:
        big = torch.full((*w.shape[:2], 2 * w.shape[2]), torch.nan, dtype=w.dtype)
        big[..., ::2] = w
        return big[..., ::2]

    for view in (padded, strided):
        weights = ExpertWeights(view(call.weights.gate_up), view(call.weights.down))
        assert torch.equal(run(replace(call, weights=weights), isa), expected), view.__name__
    for up, down in ((flipped, flipped), (flipped, padded), (padded, flipped)):
        weights = ExpertWeights(up(call.weights.gate_up), down(call.weights.down))
        assert_close(run(replace(call, weights=weights), isa), oracle(call))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", [{}, GPT_OSS], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_nan_and_infinity_reach_their_own_token_alone(form: dict[str, object], dtype: torch.dtype, isa: str) -> None:
    call = make_call(Case(name="nan", T=6, H=40, I=24, dtype=dtype, form=form))
    clean = run(call, isa)
    hidden = call.hidden.clone()
    hidden[2, 7], hidden[4, 3] = torch.nan, torch.inf
    out = run(replace(call, hidden=hidden), isa)
    assert out[2].isnan().all() and not out[4].isfinite().all()
    keep = [0, 1, 3, 5]
    assert torch.equal(out[keep], clean[keep])


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_stale_scratch_memory_does_not_show(isa: str) -> None:
    call = make_call(Case(name="stale", T=11, H=45, I=33, dtype=BF16))
    expected = run(call, isa)
    run(make_call(Case(name="fills the scratch", T=64, H=97, I=65, dtype=BF16)), isa)
    native_kernel._kept.buffer.fill_(0xFF)  # every float a NaN
    assert torch.equal(run(call, isa), expected)
    empty = make_call(Case(name="dropped", T=3, routing="all_dropped"))
    native_kernel._kept.buffer.fill_(0xFF)
    assert bool((run(empty, isa) == 0).all())


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounds_once_to_nearest_even(dtype: torch.dtype, isa: str) -> None:
    """relu of an exact product: the output is the float32 value rounded as torch rounds it, overflow included."""
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(3)).abs().to(dtype)
    x[:3, 0] = torch.tensor([60000.0, 1e-7, 1.0])
    config = ExpertsConfig(
        num_experts=1, hidden_size=1, intermediate_size=1, gated=False, activation=Activation(name="relu")
    )
    one = torch.ones(1, 1, 1, dtype=dtype)
    factor = torch.full((500, 1), 1.2345678)
    ids = torch.zeros(500, 1, dtype=torch.int32)
    out = native_experts(x, factor, ids, ExpertWeights(one, one), config, isa=isa)
    assert torch.equal(out, (x.float() * factor).to(dtype))


@needs_library
def test_one_pool_of_threads() -> None:
    """The OpenMP runtime is torch's own: no second one is mapped."""
    run(make_call(CASES[0]))
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(runtimes) <= 1, runtimes


@dataclass(frozen=True)
class Wrong:
    """An argument that must be refused before anything is computed."""

    name: str
    change: dict[str, object]
    text: str


GOOD = make_call(Case(name="good", dtype=BF16))
WRONG = (
    Wrong("hidden width", {"hidden": torch.zeros(5, 63, dtype=BF16)}, "hidden states has shape"),
    Wrong("hidden rank", {"hidden": torch.zeros(64, dtype=BF16)}, "must be [T, H]"),
    Wrong("hidden dtype", {"hidden": torch.zeros(5, 64, dtype=torch.float64)}, "float64"),
    Wrong("hidden device", {"hidden": torch.zeros(5, 64, dtype=BF16, device="meta")}, "on meta"),
    Wrong("hidden strides", {"hidden": torch.zeros(64, 5, dtype=BF16).T}, "contiguous"),
    Wrong("weights dtype", {"hidden": torch.zeros(5, 64)}, "gate_up is torch.bfloat16"),
    Wrong("topk_weights dtype", {"topk_weights": torch.zeros(5, 2, dtype=BF16)}, "topk_weights"),
    Wrong("topk_weights shape", {"topk_weights": torch.zeros(5, 3)}, "topk_weights"),
    Wrong("ids dtype", {"topk_ids": torch.zeros(5, 2, dtype=torch.int64)}, "topk_ids"),
    Wrong("ids rows", {"topk_ids": torch.zeros(4, 2, dtype=torch.int32)}, "topk_"),
    Wrong("id too large", {"topk_ids": torch.full((5, 2), 5, dtype=torch.int32)}, "outside [0, 4]"),
    Wrong("id negative", {"topk_ids": torch.full((5, 2), -1, dtype=torch.int32)}, "outside [0, 4]"),
    Wrong("weights shape", {"weights": ExpertWeights(GOOD.weights.down, GOOD.weights.down)}, "gate_up has shape"),
    Wrong("no bias", {"config": replace(GOOD.config, has_bias=True)}, "gate_up_bias is missing"),
)


@needs_library
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_arguments_are_refused(wrong: Wrong) -> None:
    with pytest.raises(InputError) as caught:
        run(replace(GOOD, **wrong.change))  # type: ignore[arg-type]
    assert wrong.text in str(caught.value)


CONFIG = ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=8)
QUERY = KernelQuery(device="cpu", dtype=BF16, experts=CONFIG, top_k=2)
REFUSED = (
    (replace(QUERY, device="cuda"), "not on cuda"),
    (replace(QUERY, dtype=torch.float64), "float64"),
    (replace(QUERY, weight_format="int8"), "int8"),
    (replace(QUERY, experts=replace(CONFIG, post_norm_eps=1e-5)), "norm"),
    (replace(QUERY, experts=replace(CONFIG, activation=Activation(function=torch.sin))), "Python activation"),
)


@pytest.mark.parametrize(("query", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refusals_say_why(query: KernelQuery, text: str) -> None:
    reason = NativeKernel().refusal(query)
    assert reason is not None and text in reason


@needs_library
def test_accepts_and_runs_what_it_accepts() -> None:
    kernel = NativeKernel()
    assert kernel.refusal(replace(QUERY, batch_invariant=True)) is None
    call = GOOD
    out = kernel(call.hidden, call.topk_weights, call.topk_ids, call.weights, call.config, batch_invariant=True)
    assert torch.equal(out, run(call))
    with pytest.raises(KernelRefusedError, match="norm"):
        run(replace(call, config=replace(call.config, post_norm_eps=1e-5)))
    with pytest.raises(KernelRefusedError, match="sse"):
        run(call, isa="sse")


@needs_library
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_workspace_bound_holds(case: Case) -> None:
    config = case.config
    arguments = native_library.Arguments(
        tokens=case.T, top_k=case.K, num_experts=case.E, hidden_size=case.H, intermediate_size=case.I,
        threads=torch.get_num_threads(), gate_up_columns=config.transposed, down_columns=config.transposed,
        weight_on_input=config.weight_on_input,
    )  # fmt: skip
    bound = NativeKernel().workspace_bytes_per_token(config, case.K, case.dtype)
    assert native_library.load().workspace_bytes(arguments) <= bound * max(case.T, 256)
