"""Models with experts in host memory, with a CPU in the GPU's place: the same logits, read straight
to where they stay, refused before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moetor
from huggingface.tiny import DEEPSEEK_V3, GPT_OSS, MIXTRAL, QWEN3, Tiny
from moetor.errors import (
    CheckpointError,
    ConfigError,
    FusionError,
    KernelRefusedError,
    MoetorError,
)
from moetor.huggingface import loading, offloading
from moetor.huggingface.dummy import dummy_model
from moetor.huggingface.modules import fused_modules
from moetor.huggingface.offloading import offload_of
from moetor.huggingface.streaming import PlainSink
from moetor.kernels.base import KernelQuery
from moetor.kernels.native.kernel import NativeKernel
from moetor.offload_config import OffloadConfig

FAMILIES = [QWEN3, GPT_OSS, DEEPSEEK_V3, MIXTRAL]


def _native_refuses() -> bool:
    form = moetor.ExpertsConfig(num_experts=2, hidden_size=4, intermediate_size=4)
    query = KernelQuery(device="cpu", dtype=torch.float32, experts=form, top_k=1)
    return NativeKernel().refusal(query) is not None


pytestmark = pytest.mark.skipif(_native_refuses(), reason="needs the native kernel")


def beside_cpu(**settings: Any) -> OffloadConfig:
    return OffloadConfig(**({"cpu_experts": 1, "accelerator": "cpu"} | settings))


@torch.no_grad()
def logits(model: Any, seed: int, tokens: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (2, tokens), generator=generator)
    made: Tensor = model(input_ids=ids).logits
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Tiny], Path]:
    def save(tiny: Tiny, **options: Any) -> Path:
        tiny.build(seed=5, **options).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("how", ["host", "cached", "copied"])
@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
def test_a_loaded_model_gives_its_own_logits(
    tiny: Tiny, how: str, saved: Callable[[Tiny], Path], seed: int
) -> None:
    folder = saved(tiny)
    wanted = logits(tiny.build(seed=5), seed)
    config = beside_cpu(
        cpu_experts=2 if tiny.blocks > 1 else 1,
        cache_experts=3 if how == "cached" else 0,
        stream_min_tokens=4 if how == "copied" else 0,
    )
    model = moetor.MoEForCausalLM.from_pretrained(str(folder), device="cpu", cpu_experts=config)
    found = logits(model, seed)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    report = model.fusion_report
    assert [block.kernel for block in report.blocks[-2:]] == ["native"] * 2
    assert report.offload.cache_experts == config.cache_experts
    assert report.offload.host_bytes > 0
    assert "experts in host memory: " in str(report)
    again = moetor.MoEForCausalLM.from_pretrained(str(folder), device="cpu")
    assert set(again.state_dict()) == set(model.state_dict())
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("quantization", ["int8_w8a16", "int4"])
def test_quantised_as_they_are_read(
    quantization: str, saved: Callable[..., Path], seed: int
) -> None:
    folder = saved(QWEN3, hidden_size=64, moe_intermediate_size=32)
    load = moetor.MoEForCausalLM.from_pretrained
    options: dict[str, Any] = {"device": "cpu", "quantization": quantization}
    wanted = logits(load(str(folder), **options), seed)
    model = load(str(folder), **options, cpu_experts=beside_cpu(cache_experts=2))
    found = logits(model, seed)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert model.fusion_report.quantized is not None


def test_a_live_model(seed: int) -> None:
    model = QWEN3.build(seed=5)
    wanted = logits(model, seed)
    report = moetor.fuse(model, cpu_experts=beside_cpu(cache_experts=2))
    assert [block.kernel_note is not None for block in report.blocks] == [False, True]
    assert report.offload is not None
    assert report.offload.layers == (report.blocks[-1].name,)
    for _ in range(4):  # the cache changes, the logits do not
        found = logits(model, seed)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    group = offload_of(model)
    assert group is not None
    assert [one.offload is None for one in experts_of(model)] == [True, False]
    with pytest.raises(FusionError, match="host memory"):
        moetor.unfuse(model)
    with pytest.raises(ConfigError, match="no other weights"):
        model.load_state_dict(model.state_dict())


def experts_of(model: Any) -> list[Any]:
    return [module.routed_experts for _, module in fused_modules(model)]


def test_experts_alone(seed: int) -> None:
    model = QWEN3.build(seed=5)
    wanted = logits(model, seed)
    report = moetor.fuse(model, level="experts", cpu_experts=beside_cpu(cpu_experts=2))
    with pytest.raises(ConfigError, match="no other weights"):
        model.load_state_dict(model.state_dict())
    assert [block.level for block in report.blocks] == ["experts"] * 2
    found = logits(model, seed)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_none_in_host_memory(seed: int) -> None:
    model = QWEN3.build(seed=5)
    report = moetor.fuse(model, cpu_experts=beside_cpu(cpu_experts=0))
    assert offload_of(model) is None
    assert report.offload is not None
    assert report.offload.layers == ()
    assert moetor.unfuse(model) == 2


def test_saved_as_it_was(saved: Callable[..., Path], tmp_path: Path, seed: int) -> None:
    folder = saved(QWEN3)
    load = moetor.MoEForCausalLM.from_pretrained
    model = load(str(folder), device="cpu", cpu_experts=beside_cpu())
    model.save_pretrained(tmp_path / "again")
    wanted = logits(load(str(folder), device="cpu"), seed)
    assert torch.equal(logits(load(str(tmp_path / "again"), device="cpu"), seed), wanted)


def test_matrices_in_host_memory_are_never_made_on_the_device() -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias", "other.weight"]
    shapes = {
        names[0]: torch.empty((4, 6, 5), device="meta"),
        names[1]: torch.empty((4, 6), device="meta"),
        names[2]: torch.empty((4, 6), device="meta"),
    }
    sink = PlainSink(shapes, torch.device("meta"), ["mlp.experts"])
    for name in names:
        item: Any = _item(name, tuple(shapes[name].shape))
        place = sink.place(item, 1 if sink.by_expert(item) else None)
        assert place.device.type == ("cpu" if name == names[0] else "meta")
    given = dict(sink.tensors())
    assert {tensor.device.type for tensor in given.values()} == {"meta"}
    assert list(sink.host_tensors()) == [names[0]]


def _item(name: str, shape: tuple[int, ...]) -> Any:
    return SimpleNamespace(name=name, layout=SimpleNamespace(shape=shape), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cpu_experts": 1}, ConfigError, "the model is on cpu"),
        ({"cpu_experts": "most"}, ConfigError, "number of layers, or 'auto'"),
        ({"cpu_experts": beside_cpu(cpu_experts=3)}, ConfigError, "above the 2 MoE layers"),
        ({"cpu_experts": beside_cpu(cpu_experts="auto")}, ConfigError, "give gpu_memory"),
        ({"cpu_experts": beside_cpu(cpu_experts="auto", gpu_memory=9)}, ConfigError, "GPU needs"),
        (
            {"cpu_experts": beside_cpu(), "quantization": "nvfp4"},
            KernelRefusedError,
            "without cpu_experts, or",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_a_weight_is_read(
    options: dict[str, Any],
    error: type[MoetorError],
    words: str,
    saved: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = saved(QWEN3, hidden_size=64, moe_intermediate_size=32)

    def read(*_: object, **__: object) -> None:
        raise CheckpointError("weights are being read")

    monkeypatch.setattr(loading, "stream_weights", read)
    with pytest.raises(error, match=words):
        moetor.MoEForCausalLM.from_pretrained(str(folder), device="cpu", **options)


def test_host_memory_is_looked_at(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(QWEN3)
    monkeypatch.setattr("moetor.huggingface.offloading.free_host_memory", lambda: 1000)
    with pytest.raises(ConfigError, match="of host memory"):
        moetor.MoEForCausalLM.from_pretrained(str(folder), device="cpu", cpu_experts=beside_cpu())


@pytest.mark.parametrize(("experts", "layers"), [(16, 0), (13, 1), (5, 2)])
def test_auto_keeps_what_fits_on_the_gpu(
    experts: int, layers: int, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetor.layer.offload.plan.CHUNK_BYTES", 1)  # chunks of one expert
    folder = saved(QWEN3)
    tensors = dict(QWEN3.build().state_dict())
    dense = sum(one.nbytes for name, one in tensors.items() if "experts" not in name)
    one = 3 * 66 * 21 * 4
    config = beside_cpu(cpu_experts="auto", gpu_memory=dense + experts * one + 1000, reserve=0)
    model = moetor.MoEForCausalLM.from_pretrained(str(folder), device="cpu", cpu_experts=config)
    plan = model.fusion_report.offload
    assert (len(plan.layers), plan.host_bytes) == (layers, layers * 8 * one)
    # What is left holds hot experts: 13 - 8 - 2 for one layer, 5 - 2 for two.
    assert plan.cache_experts == {0: 0, 1: 3, 2: 1}[layers]
    assert plan.gpu_bytes <= config.gpu_memory


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_random_weights_are_made_where_they_stay(quantization: str | None, seed: int) -> None:
    config = QWEN3.config(hidden_size=64, moe_intermediate_size=32, dtype=torch.float32)
    beside = beside_cpu(cache_experts=1)
    model = dummy_model(
        config, AutoModelForCausalLM, torch.float32, torch.device("cpu"), 3, quantization, beside
    )
    stands_in = model.model.layers[1].mlp.experts.down_proj
    assert not any(stands_in.stride())
    assert any(model.model.layers[0].mlp.experts.down_proj.stride()) == (quantization is None)
    report = moetor.fuse(model, quantization=quantization, cpu_experts=beside)
    assert report.offload is not None
    assert report.offload.layers == (report.blocks[1].name,)
    found = logits(model, seed)
    assert found.isfinite().all()
    assert found.std() > 0
    first, second = experts_of(model)[1].down_proj[:2]
    assert not torch.equal(first, second)


def test_loaded_for_host_memory_and_fused_as_if_not(saved: Callable[..., Path]) -> None:
    model = loading.load_model(
        str(saved(QWEN3)), device="cpu", for_fusing=True, cpu_experts=beside_cpu()
    )
    with pytest.raises(FusionError, match=r"cpu_experts=\.\.\."):
        moetor.fuse(model)


def test_not_over_ranks() -> None:
    parallel = moetor.ParallelConfig(tensor_parallel_size=2)
    with pytest.raises(MoetorError, match=r"together|ranks"):
        moetor.fuse(QWEN3.build(), parallel=parallel, cpu_experts=beside_cpu())


def test_what_else_lives_on_the_gpu_is_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 2**20
    fakes = {
        "mem_get_info": (700 * mib, 1000 * mib),
        "memory_reserved": 100 * mib,
        "memory_allocated": 60 * mib,
        "get_per_process_memory_fraction": 0.5,
    }
    for name, answer in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    model = torch.nn.Linear(4, 4, device="meta")
    config = OffloadConfig(cpu_experts="auto")
    device = torch.device("cuda", 0)
    assert offloading._gpu_memory(config, device, model) == (500 - 60) * mib
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    assert offloading._gpu_memory(config, device, model) == int((700 + 100 - 60) * mib * 0.9)
