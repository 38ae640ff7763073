"""What the Triton kernels refuse on machines that are not this one, before any launch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moetor.config import ExpertsConfig, RouterConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels import select
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.select import select_kernel, select_router
from moetor.kernels.triton import choose, support
from moetor.kernels.triton.fused import TritonKernel
from moetor.kernels.triton.large_kernel import TritonLargeKernel
from moetor.kernels.triton.small import TritonSmallKernel

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


# --- limits of sizes and of the tensors' own GPU --------------------------------------------------


def test_an_expert_of_two_to_the_31_elements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(Machine(id="good", words=""), monkeypatch)
    huge = replace(CONFIG, hidden_size=2**15, intermediate_size=2**15)
    with pytest.raises(KernelRefusedError, match=r"less than 2\^31 .*kernels that can: torch"):
        select_kernel(replace(QUERY, experts=huge), "triton")
    # Weights of all experts may have more.
    many = replace(CONFIG, num_experts=1024, hidden_size=2**12, intermediate_size=2**12)
    assert TritonLargeKernel().refusal(replace(QUERY, experts=many)) is None


def test_strides_that_reach_too_far_are_named() -> None:
    far = torch.empty_strided((4, 16, 16), (16, 2**28, 1), dtype=torch.bfloat16, device="meta")
    given = inputs(
        hidden_TH=elsewhere(3, 16, dtype=torch.bfloat16),
        topk_weights_TK=elsewhere(3, 2, dtype=torch.float32),
        topk_ids_TK=elsewhere(3, 2, dtype=torch.int32),
        weights=ExpertWeights(far, elsewhere(*CONFIG.down_shape, dtype=torch.bfloat16)),
    )
    with pytest.raises(InputError, match=r"gate_up has strides \[16, 268435456, 1\].*contiguous"):
        support.check_inputs(**given)


def fake_call(config: ExpertsConfig, tokens: int, device: str) -> list[Any]:
    """Arguments of a kernel on a GPU that is made up."""
    bfloat16: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    return [
        torch.empty(tokens, config.hidden_size, **bfloat16),
        torch.empty(tokens, 2, device=device),
        torch.empty(tokens, 2, dtype=torch.int32, device=device),
        ExpertWeights(
            torch.empty(config.gate_up_shape, **bfloat16),
            torch.empty(config.down_shape, **bfloat16),
        ),
        config,
    ]


@pytest.mark.parametrize(
    "kernel", [TritonKernel(), TritonSmallKernel(), TritonLargeKernel()], ids=lambda one: one.name
)
def test_tensors_on_an_older_gpu_than_the_current_one(
    kernel: TritonKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(Machine(id="good", words=""), monkeypatch)
    capabilities = {0: (9, 0), 1: (7, 5)}
    made = {
        index: choose.Device(sms=40, shared=64 * 1024, capability=capability)
        for index, capability in capabilities.items()
    }
    monkeypatch.setattr(support, "gpu", made.__getitem__)
    monkeypatch.setattr(TritonKernel, "_tuned", staticmethod(lambda *_: None))
    with FakeTensorMode(), pytest.raises(KernelRefusedError, match=r"this GPU has 7\.5; use"):
        kernel(*fake_call(CONFIG, 1, "cuda:1"))


@pytest.mark.parametrize("transposed", [False, True])
def test_more_programs_than_a_grid_has(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(Machine(id="good", words=""), monkeypatch)
    wide = replace(CONFIG, intermediate_size=8192, transposed=transposed)
    tokens = 2**25 if transposed else 2**18
    with (
        FakeTensorMode(),
        pytest.raises(
            KernelRefusedError, match=r"programs in one launch.*use kernel 'triton_large'"
        ),
    ):
        TritonSmallKernel()(*fake_call(wide, tokens, "cuda"))


@pytest.mark.parametrize(
    ("version", "have"), [("3.6.0", True), ("3.6.1+cu130", True), ("3.7.1", False), ("4.0", False)]
)
def test_warps_have_roles_with_the_triton_that_they_are_written_for(
    version: str, have: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "have_triton", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    support.have_roles.cache_clear()
    assert support.have_roles() == have
    support.have_roles.cache_clear()
