"""Layers over two GPUs by NCCL: results, and CUDA graphs replayed with changed tokens."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from layer.layer_cases import DEEPSEEK_V3, IDENTITY, build, draw_layer, make_config
from moetor.config import SharedExpertsConfig
from moetor.layer.sharding import shard_layer
from moetor.parallel.config import ParallelConfig
from moetor.parallel.groups import make_groups, start_process_group

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

EP: dict[str, Any] = {"enable_expert_parallel": True}
DP: dict[str, Any] = {"data_parallel_size": 2, "max_tokens_per_rank": 9, **EP}
BACKEND: dict[str, Any] = {"collectives": "backend"}
DIRECT: dict[str, Any] = {"collectives": "direct"}
SPREAD = {
    "tp": ParallelConfig(tensor_parallel_size=2, **BACKEND),
    "tp_direct": ParallelConfig(tensor_parallel_size=2, **DIRECT),
    "tp_ep": ParallelConfig(tensor_parallel_size=2, **EP),
    "sp": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, **EP, **BACKEND),
    "sp_direct": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, **EP, **DIRECT),
    "dp_allgather": ParallelConfig(dispatcher="allgather", **DP, **BACKEND),
    "dp_direct": ParallelConfig(dispatcher="allgather", **DP, **DIRECT),
    "dp_alltoall": ParallelConfig(dispatcher="alltoall", **DP),
    "dp_redundant": ParallelConfig(num_redundant_experts=2, **DP),
}
SHARED = SharedExpertsConfig(intermediate_size=32, sigmoid_gate=True)
SIZES: dict[str, Any] = {"hidden_size": 64, "experts": {"intermediate_size": 48}}
LAYERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**SIZES, "router": DEEPSEEK_V3, "shared": SHARED},
    "latent_identity": {**SIZES, "latent_size": 32, "router": IDENTITY, "shared": SHARED},
    "dual_batch": {**SIZES, "runner": {"name": "dual_batch", "dual_batch_min_tokens": 4}},
}
TOKENS = {"some": (8, 5), "none_on_one": (0, 4)}
ERROR = 1e-2  # float32 with TensorFloat-32 products, relative to the largest output


def _error(ours: torch.Tensor, whole: torch.Tensor) -> float:
    return float((ours - whole).abs().max() / whole.abs().max()) if whole.numel() else 0.0


def _one_layer(rank: int, name: str, spread: str) -> dict[str, float]:
    fields = {**LAYERS[name]}
    fields["runner"] = {**fields.get("runner", {}), "kernel": "auto"}
    config = make_config(**fields)
    tensors = draw_layer(config, torch.float32, torch.Generator().manual_seed(5))
    whole, layer = build(config, tensors).cuda(), build(config, tensors).cuda()
    assert layer.routed_experts.kernel_name == "triton"
    parallel = SPREAD[spread]
    groups = make_groups(parallel, "cuda")
    shard_layer(layer, groups)
    told = {}
    for case, counts in TOKENS.items():
        rng = torch.Generator().manual_seed(7 + groups.data_rank)
        shape = (counts[groups.data_rank], config.hidden_size)
        first, second = (torch.randn(shape, generator=rng).cuda() for _ in range(2))
        told[f"{case}"] = _error(layer(first), whole(first))
        given = first.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(given)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = layer(given)
        for number, tokens in enumerate((first, second)):
            given.copy_(tokens)
            graph.replay()
            torch.cuda.synchronize()
            told[f"{case}, replay {number}"] = _error(out, whole(tokens))
    return told


def _rank(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    path = Path(folder)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{path / 'meet'}", rank=rank, world_size=2
    )
    start_process_group("cuda")
    told: dict[str, Any] = {}
    with torch.no_grad():
        for name in LAYERS:
            for spread in SPREAD:
                try:
                    told[f"{name} {spread}"] = _one_layer(rank, name, spread)
                except Exception:
                    told[f"{name} {spread}"] = traceback.format_exc()
                torch.save(told, path / f"rank{rank}.pt")  # whatever becomes of the others
                if isinstance(told[f"{name} {spread}"], str) and "NCCL" in told[f"{name} {spread}"]:
                    raise RuntimeError(told[f"{name} {spread}"])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("name", LAYERS)
def test_two_gpus(name: str, spread: str, answers: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(answers):
        errors = told[f"{name} {spread}"]
        assert not isinstance(errors, str), errors
        assert max(errors.values()) < ERROR, f"rank {rank}: {errors}"
