"""The choice of a kernel: who is taken, who refused, and what the person reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moetor.config import ExpertsConfig, RouterConfig
from moetor.errors import KernelRefusedError
from moetor.kernels import routing, select
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery
from moetor.kernels.select import Refusal, kernel_names, select_kernel, select_router
from moetor.kernels.triton import routing as triton_routing

QUERY = KernelQuery(
    device="cpu",
    dtype=torch.float32,
    experts=ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=6),
    top_k=2,
)


class Stub(ExpertsKernel):
    """Answers every question with one reason, or with none."""

    def __init__(self, name: str, reason: str | None) -> None:
        self.name = name  # type: ignore[misc]
        self.reason = reason
        self.asked: list[KernelQuery] = []

    def refusal(self, query: KernelQuery) -> str | None:
        self.asked.append(query)
        return self.reason

    def __call__(
        self,
        hidden_TH: Tensor,
        topk_weights_TK: Tensor,
        topk_ids_TK: Tensor,
        weights: ExpertWeights,
        config: ExpertsConfig,
        *,
        batch_invariant: bool = False,
    ) -> Tensor:
        raise NotImplementedError

    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """Reasons by kernel in order of preference, a request, and the answer."""

    id: str
    reasons: dict[str, str | None]
    requested: str = "auto"
    chosen: str | None = None
    refusals: tuple[tuple[str, str], ...] = ()
    error: str | None = None


CASES = [
    Case(
        id="auto_takes_the_first",
        reasons={"fast": None, "torch": None, "reference": None},
        chosen="fast",
    ),
    Case(
        id="auto_tells_who_was_preferred_and_why_not",
        reasons={"fast": "needs steam", "torch": None, "slow": "is tired", "reference": None},
        chosen="torch",
        refusals=(("fast", "needs steam"),),
    ),
    Case(
        id="auto_never_takes_the_reference",
        reasons={"fast": "needs steam", "torch": "is out", "reference": None},
        error="no kernel runs this case: fast needs steam; torch is out",
    ),
    Case(
        id="a_name_is_honoured",
        reasons={"fast": None, "torch": None, "reference": None},
        requested="reference",
        chosen="reference",
    ),
    Case(
        id="a_name_is_refused_with_its_reason_and_who_can",
        reasons={"fast": "needs steam", "torch": None, "reference": None},
        requested="fast",
        error="kernel 'fast' was asked for and needs steam; kernels that can: torch, reference",
    ),
    Case(
        id="a_name_is_refused_and_nobody_can",
        reasons={"fast": "needs steam", "reference": "is out"},
        requested="fast",
        error="kernel 'fast' was asked for and needs steam; kernels that can: none",
    ),
    Case(
        id="an_unknown_name",
        reasons={"fast": None, "reference": None},
        requested="quick",
        error="unknown kernel 'quick'; the kernels are auto, fast, reference",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_selection(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = tuple(Stub(name, reason) for name, reason in case.reasons.items())
    monkeypatch.setattr(select, "KERNELS", stubs)
    if case.error is not None:
        with pytest.raises(KernelRefusedError) as caught:
            select_kernel(QUERY, case.requested)
        assert str(caught.value) == case.error
        return
    choice = select_kernel(QUERY, case.requested)
    assert choice.kernel.name == case.chosen
    assert choice.refusals == tuple(Refusal(*pair) for pair in case.refusals)
    assert all(query is QUERY for stub in stubs for query in stub.asked)


def test_the_real_kernels() -> None:
    assert kernel_names()[0] == "auto"
    assert {"native", "torch", "reference"} <= set(kernel_names())
    assert kernel_names()[-1] == "reference"
    for name in ("torch", "reference"):
        assert select_kernel(QUERY, name).kernel.name == name
    assert select_kernel(QUERY).kernel.name in ("native", "torch")


def test_an_unknown_format_is_refused_by_every_kernel_with_a_reason() -> None:
    query = KernelQuery(
        device="cpu", dtype=torch.float32, experts=QUERY.experts, top_k=2, weight_format="runes"
    )
    with pytest.raises(KernelRefusedError, match=r"^no kernel runs this case: ") as caught:
        select_kernel(query)
    for name in kernel_names()[1:]:
        why = {
            "triton": "runs on NVIDIA GPUs",
            "grouped_mm": "runs on NVIDIA GPUs",
        }.get(name, "knows no weight format runes")
        assert f"{name} {why}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "device", "dtype", "words"),
    [
        ({}, "cpu", torch.float32, "not on cpu"),
        ({"num_experts": 1025}, "cuda", torch.float32, "1024"),
        ({"score_precision": "model"}, "cuda", torch.float32, "float32"),
        ({}, "cuda", torch.float64, "float64"),
    ],
)
def test_torch_routes_where_triton_does_not(
    options: dict[str, Any], device: str, dtype: torch.dtype, words: str
) -> None:
    config = RouterConfig(**({"num_experts": 4, "top_k": 2} | options))
    choice = select_router(config, device, dtype)
    assert (choice.name, choice.route) == ("torch", routing.route)
    assert choice.refusal is not None
    assert words in choice.refusal


def test_triton_routes_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "routing_refusal", lambda *asked: None)
    config = RouterConfig(num_experts=5, top_k=2)
    select_router.cache_clear()
    choice = select_router(config, "cuda", torch.float32)
    select_router.cache_clear()
    assert (choice.name, choice.route, choice.refusal) == ("triton", triton_routing.route, None)


def test_what_a_kernel_says_of_a_case_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tuned(Stub):
        def note(self, query: KernelQuery) -> str | None:
            return f"tuned for K={query.top_k}"

    monkeypatch.setattr(select, "KERNELS", (Tuned("fast", None), Stub("other", None)))
    assert select_kernel(QUERY).note == "tuned for K=2"
    assert select_kernel(QUERY, "fast").note == "tuned for K=2"
    assert select_kernel(QUERY, "other").note is None
