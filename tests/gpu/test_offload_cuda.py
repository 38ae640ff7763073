"""Experts in host memory beside a real GPU: eager, in CUDA graphs, cached, copied, and under a cap
of the GPU's memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moetor
from layer.expert_cases import EDGES, FORMS, ExpertsCase, draw
from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.native.kernel import NativeKernel
from moetor.kernels.routing import Routing
from moetor.layer.experts import Experts
from moetor.layer.offload import ExpertOffload
from moetor.layer.offload.balance import Balance
from moetor.layer.quantized_experts import make_experts
from moetor.offload_config import OffloadConfig
from moetor.tools.tiny.models import tiny_model
from oracle import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
CUDA = torch.device("cuda")


def native_has(config: ExpertsConfig) -> bool:
    query = KernelQuery(device="cpu", dtype=torch.float32, experts=config, top_k=1)
    return NativeKernel().refusal(query) is None


CASES = [case for case in FORMS + EDGES if native_has(case.config)]


def build(weights: ExpertWeights, case: ExpertsCase, quantization: str | None = None) -> Experts:
    return make_experts(
        case.config,
        quantization,
        case.top_k,
        kernel="auto",
        batch_invariant=False,
        weights=weights,
        dtype=weights.down.dtype,
    )


def offload(*experts: Experts, cache: int = 0, **settings: Any) -> ExpertOffload:
    return ExpertOffload(
        experts, CUDA, OffloadConfig(**({"stream_min_tokens": 0} | settings)), cache
    )


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("how", ["host", "cached", "copied", "cached and copied", "all three"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_form(
    case: ExpertsCase, how: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetor.layer.offload.store.CHUNK_BYTES", 1)  # one expert a chunk
    drawn = draw(case, torch.float32, rng)
    experts = build(ExpertWeights(**drawn.tensors._asdict()), case)
    cache = {"cached": 2, "cached and copied": 2, "all three": 1}.get(how, 0)
    group = offload(experts, cache=cache, stream_min_tokens=1 if "copied" in how else 0)
    if how == "all three":
        group.balance = Balance(1, ((1, 1.0),), copy_seconds=1.0)
    routing = Routing(drawn.topk_weights.cuda(), drawn.topk_ids.cuda())
    for _ in range(3):
        out = experts.run(drawn.hidden.cuda(), routing)
        assert_close(out.cpu(), drawn.expected(case.config))


def big(rng: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> tuple[ExpertsCase, Any]:
    config = ExpertsConfig(num_experts=16, hidden_size=256, intermediate_size=192, has_bias=True)
    case = ExpertsCase(id="big", config=config, tokens=24, top_k=4)
    return case, draw(case, dtype, rng)


def close(found: Tensor, wanted: Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    error = (found.double() - wanted.double()).abs().max()
    assert error <= 6 * eps * wanted.abs().max(), error


@pytest.mark.parametrize("quantization", [None, "int8_w8a16", "int4", "mxfp4"])
@pytest.mark.parametrize("copied", [False, True])
def test_as_all_on_the_gpu(quantization: str | None, copied: bool, rng: torch.Generator) -> None:
    case, drawn = big(rng)
    weights = ExpertWeights(**drawn.tensors._asdict())
    experts = build(weights, case, quantization)
    moved = build(weights, case, quantization).cuda()
    routing = Routing(drawn.topk_weights.cuda(), drawn.topk_ids.cuda())
    wanted = moved.run(drawn.hidden.cuda(), routing)
    offload(experts, cache=5, stream_min_tokens=int(copied))
    for _ in range(4):
        close(experts.run(drawn.hidden.cuda(), routing), wanted)


def test_a_captured_graph_follows_the_cache(rng: torch.Generator) -> None:
    """Replayed with other tokens and other choices, while experts come into the cache."""
    case, drawn = big(rng, torch.float32)
    experts = [build(ExpertWeights(**drawn.tensors._asdict()), case) for _ in range(2)]
    group = offload(*experts, cache=4)
    hidden = drawn.hidden.cuda()
    routing = Routing(drawn.topk_weights.cuda(), drawn.topk_ids.cuda())

    def both() -> Tensor:
        return experts[1].run(experts[0].run(hidden, routing), routing)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both()
    before = [group.hot.absent(0), group.hot.absent(1)]
    for round_ in range(30):
        fresh = draw(case, torch.float32, rng)
        ids = fresh.topk_ids if round_ < 5 else fresh.topk_ids % 4 + 10
        hidden.copy_(fresh.hidden)
        routing.topk_ids.copy_(ids)
        routing.topk_weights.copy_(fresh.topk_weights)
        out.fill_(float("nan"))
        group.step()
        graph.replay()
        first = replace(fresh, topk_ids=ids, tensors=drawn.tensors).expected(case.config)
        again = replace(
            fresh, hidden=first.value.float(), topk_ids=ids, tensors=drawn.tensors
        ).expected(case.config)
        scale = again.value.abs().max()
        assert (out.cpu().double() - again.value).abs().max() <= 2e-5 * scale
        torch.cuda.synchronize()
    after = [group.hot.absent(0), group.hot.absent(1)]
    assert before != after
    assert not set(after[0]) & {10, 11, 12, 13}


def test_two_runs_without_a_cache_give_the_same_bits(rng: torch.Generator) -> None:
    case, drawn = big(rng)
    experts = build(ExpertWeights(**drawn.tensors._asdict()), case)
    offload(experts)
    routing = Routing(drawn.topk_weights.cuda(), drawn.topk_ids.cuda())
    hidden = drawn.hidden.cuda()
    runs = [experts.run(hidden, routing) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_the_threshold_is_measured(rng: torch.Generator) -> None:
    case, drawn = big(rng)
    experts = build(ExpertWeights(**drawn.tensors._asdict()), case)
    group = offload(experts, stream_min_tokens="auto")
    assert group.stream_min_tokens is None or group.stream_min_tokens > 0


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(input_ids=ids).logits
    return made.float()


@pytest.mark.parametrize("how", ["host", "cached", "copied"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_models_give_the_logits_of_all_on_the_gpu(name: str, how: str) -> None:
    model, twin = (tiny_model(name, torch.float32).cuda() for _ in range(2))
    layers = len(moetor.fuse(twin).blocks)
    config = OffloadConfig(
        cpu_experts=layers,
        cache_experts=2 if how == "cached" else 0,
        stream_min_tokens=1 if how == "copied" else 0,
    )
    report = moetor.fuse(model, cpu_experts=config)
    assert {block.kernel for block in report.blocks} == {"native"}
    ids = torch.randint(3, 60, (2, 13), device="cuda")
    wanted = logits(twin, ids)
    for _ in range(3):
        found = logits(model, ids)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


EXPERTS = 96


def large(tmp_path: Path) -> tuple[Path, int, int]:
    """A checkpoint of 920 MB, nearly all of it experts; bytes of a layer's and of all else."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=6,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    layer = EXPERTS * 3 * 512 * 512 * 2
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return tmp_path, layer, whole - 6 * layer


def test_a_model_larger_than_its_share_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetor.layer.offload.store.CHUNK_BYTES", 2**24)
    monkeypatch.setattr("moetor.layer.offload.plan.CHUNK_BYTES", 2**24)
    folder, layer, dense = large(tmp_path)
    twin = moetor.MoEForCausalLM.from_pretrained(str(folder), device="cuda")
    ids = torch.randint(3, 200, (2, 20), device="cuda")
    wanted = logits(twin, ids)
    del twin
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    cap = 3 * layer
    before = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((before + cap) / total)
    try:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        config = OffloadConfig(reserve=layer // 2, stream_min_tokens=30)
        model = moetor.MoEForCausalLM.from_pretrained(
            str(folder), device="cuda", cpu_experts=config
        )
        plan = model.fusion_report.offload
        print(*plan.lines(), sep="\n")
        assert 0 < len(plan.layers) <= 6
        assert plan.resident_bytes <= cap
        found = logits(model, ids)  # 40 tokens: copied
        few = logits(model, ids[:, :8])
        peak = torch.cuda.max_memory_allocated() - start
        assert peak <= cap, "the cap itself would have raised"
        assert peak < dense + 6 * layer
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    scale = float(wanted.abs().max())
    # Half precision may choose another expert here and there.
    assert float((found - wanted).abs().median()) <= 0.02 * scale
    assert float((few - wanted[:, :8]).abs().median()) <= 0.02 * scale


def test_what_stays_on_the_host_never_goes_through_the_gpu(tmp_path: Path) -> None:
    """The largest allocation while loading shows whether a matrix of all experts was one. The
    smaller of a layer's two has 48 MiB. That must be more than the workspace which torch allocates
    for cuBLAS at its first product: 32 MiB on compute capability 9.0 and later, as much as that
    matrix had with 64 experts."""
    folder, layer, dense = large(tmp_path)
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    try:
        config = OffloadConfig(cpu_experts=6, cache_experts=0, stream_min_tokens=0)
        model = moetor.MoEForCausalLM.from_pretrained(
            str(folder), device="cuda", cpu_experts=config
        )
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    peak = torch.cuda.max_memory_allocated() - start
    largest = max(
        event["size"]
        for trace in snapshot["device_traces"]
        for event in trace
        if event["action"] == "alloc"
    )
    workspace, matrix = 32 * 2**20, layer // 3
    assert workspace < matrix
    assert largest < matrix, "no matrix of all experts"
    assert peak < dense + layer // 2
    assert all(
        parameter.device.type == "cpu"
        for name, parameter in model.named_parameters()
        if ".experts." in name
    )
