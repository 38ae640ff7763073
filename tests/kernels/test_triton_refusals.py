"""What the Triton kernels refuse on machines that are not this one, before any launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moetor.config import ExpertsConfig, RouterConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels import select
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.select import select_kernel, select_router
from moetor.kernels.triton import choose, support

CONFIG = ExpertsConfig(num_experts=4, hidden_size=16, intermediate_size=8)
QUERY = KernelQuery(device="cuda", dtype=torch.bfloat16, experts=CONFIG, top_k=2)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine that is made up."""

    id: str
    words: str
    triton: bool = True
    hip: str | None = None
    gpu: bool = True
    capability: tuple[int, int] = (9, 0)


MACHINES = [
    Machine(id="no_triton", triton=False, words="needs Triton, which is not installed"),
    Machine(id="amd", hip="6.4", words="this torch is built for AMD's"),
    Machine(id="no_gpu", gpu=False, words="torch sees none"),
    Machine(id="turing", capability=(7, 5), words="compute capability 8.0, this GPU has 7.5"),
]


@pytest.fixture(autouse=True)
def _fresh_choices() -> Iterator[None]:
    select_router.cache_clear()
    yield
    select_router.cache_clear()


def pretend(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    device = choose.Device(sms=132, shared=227 * 1024, capability=machine.capability)
    monkeypatch.setattr(support, "have_triton", lambda: machine.triton)
    monkeypatch.setattr(torch.version, "hip", machine.hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: machine.capability)
    monkeypatch.setattr(support, "gpu", lambda index: device)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.id)
def test_the_named_kernel_is_refused_and_another_is_told(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(machine, monkeypatch)
    with pytest.raises(KernelRefusedError) as caught:
        select_kernel(QUERY, "triton")
    assert machine.words in str(caught.value)
    assert "kernels that can: torch" in str(caught.value)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.id)
def test_auto_goes_on_and_says_why(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(machine, monkeypatch)
    choice = select_kernel(QUERY)
    assert choice.kernel.name == "torch"
    assert any(machine.words in refusal.reason for refusal in choice.refusals)
    routed = select_router(RouterConfig(num_experts=4, top_k=2), "cuda", torch.float32)
    assert routed.name == "torch"
    assert machine.words in str(routed.refusal)


def test_a_good_machine_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(Machine(id="good", words=""), monkeypatch)
    monkeypatch.setattr(type(select.KERNELS[1]), "note", lambda self, query: None)
    assert select_kernel(QUERY).kernel.name == "triton"
    assert select_kernel(QUERY, "grouped_mm").kernel.name == "grouped_mm"
    routed = select_router(RouterConfig(num_experts=4, top_k=2), "cuda", torch.float32)
    assert (routed.name, routed.refusal) == ("triton", None)


def weights(**changes: Any) -> ExpertWeights:
    plain = ExpertWeights(
        torch.randn(CONFIG.gate_up_shape).bfloat16(), torch.randn(CONFIG.down_shape).bfloat16()
    )
    return replace(plain, **changes)


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_TH": torch.randn(3, 16).bfloat16(),
        "topk_weights_TK": torch.rand(3, 2),
        "topk_ids_TK": torch.zeros(3, 2, dtype=torch.int32),
        "weights": weights(),
        "config": CONFIG,
    } | changes


def elsewhere(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden_TH": torch.randn(3, 16).double()}, r"float64, not bfloat16, float16 or float32"),
    ({"hidden_TH": torch.randn(3, 15).bfloat16()}, r"\[3, 15\], it must be \[3, 16\]"),
    ({"hidden_TH": torch.randn(16, 3).bfloat16().T}, "must be contiguous"),
    ({"hidden_TH": torch.randn(16).bfloat16()}, r"must be \[T, H\]"),
    ({"topk_weights_TK": torch.rand(3, 2).bfloat16()}, "topk_weights is torch.bfloat16"),
    ({"topk_weights_TK": torch.rand(3, 3)}, r"topk_weights has shape \[3, 3\]"),
    ({"topk_ids_TK": torch.zeros(3, 2, dtype=torch.int64)}, "topk_ids is torch.int64"),
    ({"topk_ids_TK": torch.zeros(4, 2, dtype=torch.int32)}, "shape"),
    ({"topk_ids_TK": torch.zeros(3, 0, dtype=torch.int32)}, "at least one slot"),
    ({"topk_ids_TK": elsewhere(3, 2, dtype=torch.int32)}, "topk_ids is on meta"),
    ({"weights": weights(down=torch.randn(4, 16, 8).half())}, "down is torch.float16"),
    ({"weights": weights(down=torch.randn(4, 16, 9).bfloat16())}, "down has shape"),
    ({"weights": weights(gate_up=elsewhere(4, 16, 16, dtype=torch.bfloat16))}, "gate_up is on"),
    ({"config": replace(CONFIG, has_bias=True)}, "gate_up_bias is missing"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_tensors_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        support.check_inputs(**inputs(**change))


def test_good_tensors_are_taken() -> None:
    support.check_inputs(**inputs())
