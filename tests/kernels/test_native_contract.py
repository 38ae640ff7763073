"""The native CPU kernel bit by bit against itself, what it refuses, and what it must not touch.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from test_native import (
    BF16,
    CASES,
    CLAMPED,
    F16,
    F32,
    GPT_OSS,
    ISAS,
    Case,
    assert_close,
    make_call,
    needs_library,
    oracle,
    run,
)
from torch import Tensor

from moetor.config import Activation, ExpertsConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.native import library as native_library
from moetor.kernels.native.kernel import NativeKernel, native_experts
from moetor.kernels.native.pages import prefer_huge_pages

FORMS = (
    Case(name="rows", T=40, H=70, I=40, dtype=BF16),
    Case(name="columns", T=40, H=70, I=40, dtype=BF16, form=GPT_OSS, activation=CLAMPED),
    Case(name="rows f32", T=40, H=1030, I=40),
    Case(name="long rows, many tokens", T=40, K=1, E=1, H=4500, I=2100, dtype=BF16),
    Case(name="long rows, few tokens", T=5, E=16, K=8, H=40, I=1100, dtype=BF16),
    Case(name="rows f16 long", T=40, H=2500, I=40, dtype=F16, form={"has_bias": True}),
)


@needs_library
def test_more_threads_than_shares_of_the_work() -> None:
    call = make_call(Case(name="", T=40, H=70, I=40, dtype=BF16))
    assert torch.equal(run(call, threads=70), run(call, threads=1))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_bits_do_not_depend_on_batch_threads_or_repetition(case: Case, isa: str) -> None:
    call = make_call(case)
    before = [
        t.clone()
        for t in (
            call.hidden,
            call.topk_weights,
            call.topk_ids,
            call.weights.gate_up,
            call.weights.down,
        )
    ]
    out = run(call, isa)
    for threads in (1, 2, 3, 7):
        assert torch.equal(run(call, isa, threads), out), f"{threads} threads"
    for rows in (1, 3, 13):
        parts = [
            run(replace(call, hidden=x, topk_weights=w, topk_ids=i), isa)
            for x, w, i in zip(
                call.hidden.split(rows),
                call.topk_weights.split(rows),
                call.topk_ids.split(rows),
                strict=True,
            )
        ]
        assert torch.equal(torch.cat(parts), out), f"{rows} tokens at a time"
    after = (call.hidden, call.topk_weights, call.topk_ids, call.weights.gate_up, call.weights.down)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), (
        "an input was written to"
    )


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", [{}, {"transposed": True}], ids=["rows", "columns"])
def test_views_are_read_in_place(form: Mapping[str, object], isa: str) -> None:
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
        assert_close(run(replace(call, weights=weights), isa), oracle(call), isa)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", [{}, GPT_OSS], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_nan_and_infinity_reach_their_own_token_alone(
    form: Mapping[str, object], dtype: torch.dtype, isa: str
) -> None:
    call = make_call(Case(name="nan", T=6, H=40, I=24, dtype=dtype, form=form))
    clean = run(call, isa)
    hidden = call.hidden.clone()
    hidden[2, 7], hidden[4, 3] = torch.nan, torch.inf
    out = run(replace(call, hidden=hidden), isa)
    assert out[2].isnan().all()
    assert not out[4].isfinite().all()
    keep = [0, 1, 3, 5]
    assert torch.equal(out[keep], clean[keep])


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_stale_scratch_memory_does_not_show(isa: str) -> None:
    call = make_call(Case(name="stale", T=11, H=45, I=33, dtype=BF16))
    expected = run(call, isa)
    run(make_call(Case(name="fills the scratch", T=64, H=97, I=65, dtype=BF16)), isa)
    native_library._kept.buffer.fill_(0xFF)  # every float a NaN
    assert torch.equal(run(call, isa), expected)
    empty = make_call(Case(name="dropped", T=3, routing="all_dropped"))
    native_library._kept.buffer.fill_(0xFF)
    assert bool((run(empty, isa) == 0).all())


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounds_once_to_nearest_even(dtype: torch.dtype, isa: str) -> None:
    """relu of an exact product: rounded as torch rounds the float32 value, overflow included."""
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(3)).abs().to(dtype)
    x[:3, 0] = torch.tensor([60000.0, 1e-7, 1.0])
    config = ExpertsConfig(
        num_experts=1,
        hidden_size=1,
        intermediate_size=1,
        gated=False,
        activation=Activation(name="relu"),
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
        runtimes = {
            line.split()[-1]
            for line in maps
            if "libgomp" in line or "libomp" in line or "libiomp" in line
        }
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
    Wrong(
        "weights shape",
        {"weights": ExpertWeights(GOOD.weights.down, GOOD.weights.down)},
        "gate_up has shape",
    ),
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
    (replace(QUERY, weight_format="fp8"), "fp8"),
    (replace(QUERY, experts=replace(CONFIG, post_norm_eps=1e-5)), "norm"),
    (
        replace(QUERY, experts=replace(CONFIG, activation=Activation(function=torch.sin))),
        "Python activation",
    ),
)


@pytest.mark.parametrize(("query", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refusals_say_why(query: KernelQuery, text: str) -> None:
    reason = NativeKernel().refusal(query)
    assert reason is not None
    assert text in reason


@needs_library
def test_accepts_and_runs_what_it_accepts() -> None:
    kernel = NativeKernel()
    assert kernel.refusal(replace(QUERY, batch_invariant=True)) is None
    call = GOOD
    out = kernel(
        call.hidden,
        call.topk_weights,
        call.topk_ids,
        call.weights,
        call.config,
        batch_invariant=True,
    )
    assert torch.equal(out, run(call))
    with pytest.raises(KernelRefusedError, match="norm"):
        run(replace(call, config=replace(call.config, post_norm_eps=1e-5)))
    with pytest.raises(KernelRefusedError, match="sse"):
        run(call, isa="sse")


@needs_library
@pytest.mark.parametrize("isa", [1, 2, 3])
@pytest.mark.parametrize("weights", [0, 2, 5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_workspace_bound_holds(case: Case, weights: int, isa: int) -> None:
    config = case.config
    columns = config.transposed and weights == 0
    arguments = native_library.Arguments(
        tokens=case.T,
        top_k=case.K,
        num_experts=case.E,
        hidden_size=case.H,
        intermediate_size=case.I,
        threads=torch.get_num_threads(),
        gate_up_columns=columns,
        down_columns=columns,
        weight_on_input=config.weight_on_input,
        dtype=native_library.DTYPE_CODES[case.dtype],
        isa=isa,
        weights=weights,
        group=32 if weights == 2 else 0,
        round_inputs=weights == 5,
    )
    bound = NativeKernel().workspace_bytes_per_token(config, case.K, case.dtype)
    assert native_library.load().workspace_bytes(arguments) <= bound * max(case.T, 256)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", [{}, {"transposed": True}], ids=["rows", "columns"])
def test_weights_beyond_31_bits_of_elements(form: Mapping[str, object], isa: str) -> None:
    """The last expert lies 2^31 + 64 elements behind the first; nothing between is touched."""
    call = make_call(Case(name="far", T=6, E=2, H=40, I=24, dtype=BF16, form=form))
    apart = 2**31 + 64

    def far(w: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(apart + w[0].numel(), dtype=BF16)
        view = storage.as_strided(w.shape, (apart, w.stride(1), 1))
        view.copy_(w)
        return view

    weights = ExpertWeights(far(call.weights.gate_up), far(call.weights.down))
    assert torch.equal(run(replace(call, weights=weights), isa), run(call, isa))


@needs_library
@pytest.mark.skipif("avx512_bf16" not in ISAS, reason="needs AVX512_BF16")
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_other_inputs_are_not_rounded_to_bfloat16(dtype: torch.dtype) -> None:
    call = make_call(Case(name="not bf16", T=9, H=70, I=40, dtype=dtype))
    assert torch.equal(run(call, "avx512_bf16"), run(call, "avx512"))


def test_memory_asked_for_in_huge_pages_keeps_its_place() -> None:
    tensor = torch.arange(3 * 2**20, dtype=torch.int32)
    before, address = tensor.clone(), tensor.data_ptr()
    agreed = prefer_huge_pages(tensor)
    assert agreed % (2 * 2**20) == 0
    assert 0 <= agreed <= tensor.nbytes
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, before)
    assert prefer_huge_pages(torch.zeros(8)) == 0
    assert prefer_huge_pages(torch.zeros(2**22, device="meta")) == 0
