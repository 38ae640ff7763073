"""Layers spread over two and four processes: every rank's result is the whole layer's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from layer.layer_cases import (
    DEEPSEEK_V3,
    GPT_OSS,
    IDENTITY,
    LayerTensors,
    build,
    draw_input,
    draw_layer,
    make_config,
)
from moetor.config import SharedExpertsConfig
from moetor.layer.runner import base
from moetor.layer.sharding import shard_layer
from moetor.parallel.config import EplbConfig, ParallelConfig
from moetor.parallel.groups import make_groups
from parallel.pool import Pool, RankError, patient

SHARED = SharedExpertsConfig(intermediate_size=6, sigmoid_gate=True)
MEAN = SharedExpertsConfig(intermediate_size=7, combine="mean")
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {"experts": {"intermediate_size": 7}, "router": {"num_experts": 5, "top_k": 3}},
    "gpt_oss": {"experts": GPT_OSS, "router": {"score_order": "after_topk"}, "shared": MEAN},
    "ungated_bias": {"experts": {"gated": False, "has_bias": True, "intermediate_size": 5}},
    "deepseek_v3": {"router": DEEPSEEK_V3, "shared": SHARED},
    "llama4": {"experts": {"weight_on_input": True, "transposed": True}, "shared": MEAN},
    "post_norm": {"experts": {"post_norm_eps": 1e-5}},
    "latent": {"latent_size": 5, "shared": SHARED},
    "latent_identity": {"latent_size": 5, "router": IDENTITY, "shared": MEAN},
    "identity": {"router": IDENTITY, "shared": SHARED},
    "padded": {"hidden_size": 13, "shared": SHARED, "runner": {"hidden_multiple": 8}},
    "chunked": {"shared": SHARED, "runner": {"name": "chunked", "workspace_bytes": 3000}},
    "dual_batch": {
        "router": IDENTITY,
        "shared": SHARED,
        "runner": {"name": "dual_batch", "dual_batch_min_tokens": 4},
    },
    "callable": {"shared": SHARED},
}


def dp_ep(size: int = 2, **fields: Any) -> ParallelConfig:
    return patient(data_parallel_size=size, enable_expert_parallel=True, **fields)


def tp(size: int = 2, **fields: Any) -> ParallelConfig:
    return patient(tensor_parallel_size=size, **fields)


EP = {"enable_expert_parallel": True}
SP = {"sequence_parallel": True}
TWO: dict[str, ParallelConfig] = {
    "tp": tp(),
    "tp_ep": tp(**EP),
    "sp": tp(**SP),
    "sp_ep": tp(**SP, **EP),
    "sp_ep_alltoall": tp(**SP, **EP, dispatcher="alltoall"),
    "dp_ep": dp_ep(),
    "dp_ep_alltoall": dp_ep(dispatcher="alltoall"),
    "dp_ep_bound": dp_ep(max_tokens_per_rank=9, dispatcher="allgather"),
    "dp_ep_alltoall_bound": dp_ep(max_tokens_per_rank=9, dispatcher="alltoall"),
    "dp_slices": dp_ep(expert_parallel_size=1),
    "redundant": dp_ep(num_redundant_experts=3, eplb=EplbConfig(window=4)),
    "tp_redundant": tp(**EP, num_redundant_experts=1),
}
FOUR: dict[str, ParallelConfig] = {
    "tp4": tp(4),
    "tp4_ep2": tp(4, **EP, expert_parallel_size=2),
    "tp2_dp2_ep": tp(2, data_parallel_size=2, **EP),
    "tp2_dp2_ep_alltoall": tp(2, data_parallel_size=2, **EP, dispatcher="alltoall"),
    "tp2_dp2_sp": tp(2, data_parallel_size=2, **SP, **EP, dispatcher="alltoall"),
    "tp2_dp2_ep2": tp(2, data_parallel_size=2, **EP, expert_parallel_size=2),
    "dp4_ep": dp_ep(4, dispatcher="alltoall", max_tokens_per_rank=8),
    "independent": tp(2, data_parallel_size=2),
}
QUANTISED = {
    f"quantised {name}": {
        "hidden_size": 128,
        "experts": {"intermediate_size": 64, "has_bias": True},
        "shared": SHARED,
        "quantization": name,
    }
    for name in ("int8_w8a16", "fp8", "int4_g64", "mxfp4")
}
# 7 runs of 32 make slices of 128 and 96; blocks of 128 rows and columns make two equal ones.
SLICED = {
    f"sliced {name}": {
        "hidden_size": 128,
        "experts": {"intermediate_size": size, "has_bias": True},
        "shared": SHARED,
        "quantization": name,
    }
    for name, size in {
        "int8_w8a16": 60,
        "int8": 60,
        "fp8": 60,
        "fp8_w8a16": 61,
        "fp8_block": 256,
        "int4": 224,
        "int4_g64": 224,
        "int4_zp": 224,
        "mxfp8": 224,
        "mxfp4": 224,
        "nvfp4": 224,
    }.items()
}
# Rows of the activation between the products are rounded by their largest value, of the slice.
ROUNDS_ROWS = {"sliced int8", "sliced fp8"}
# Tokens of each data-parallel group: different ones, and none.
TOKENS = {"some": (5, 3, 8, 1), "none_on_one": (0, 4, 0, 7), "one": (1, 1, 1, 1), "none": (0,) * 4}


def first_two(hidden_TH: Tensor, logits_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    assert logits_TE is not None
    ids = torch.tensor([[0, 3]]).expand(len(hidden_TH), 2)
    return logits_TE.gather(1, ids).sigmoid(), ids


@dataclass
class Answer:
    out: Tensor
    whole: Tensor
    reductions: list[int]
    weights: int
    untouched: bool = True
    loads: list[float] = field(default_factory=list)


def spread(
    rank: int, name: str, tensors: LayerTensors, inputs: dict[str, Any], parallel: ParallelConfig
) -> dict[str, Answer]:
    """In a worker: the layer on this rank, on every list of inputs."""
    config = make_config(**{**LAYERS, **QUANTISED, **SLICED}[name])
    options = {"router": first_two} if name == "callable" else {}
    whole = build(config, tensors, **options)
    layer = build(config, tensors, **options)
    groups = make_groups(parallel)
    shard_layer(layer, groups)
    widths: list[int] = []
    real = base.all_reduce

    def counted(partial_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
        widths.append(partial_TH.shape[-1])
        return real(partial_TH, group)

    answers = {}
    base.all_reduce = counted
    try:
        for case, batches in inputs.items():
            hidden = batches[groups.data_rank]
            widths.clear()
            before = hidden.clone()
            out = layer(hidden)
            answers[case] = Answer(
                out,
                whole(hidden),
                list(widths),
                sum(p.numel() for p in layer.routed_experts.parameters()),
                torch.equal(before, hidden),
            )
    finally:
        base.all_reduce = real
    return answers


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def check(name: str, parallel: ParallelConfig, pool: Pool, seed: int) -> list[dict[str, Answer]]:
    rng = torch.Generator().manual_seed(seed)
    config = make_config(**{**LAYERS, **QUANTISED, **SLICED}[name])
    quantised = config.quantization is not None
    tensors = draw_layer(config, torch.float32 if quantised else torch.float64, rng)
    drawn = build(config, tensors)
    inputs = {
        case: [draw_input(drawn, tokens, rng).hidden for tokens in counts]
        for case, counts in TOKENS.items()
    }
    answers: list[dict[str, Answer]] = pool.run(spread, name, tensors, inputs, parallel)
    # A float64 sum in another order; identity experts are added in float32.
    close = 1e-6 if config.router.num_zero_experts else 1e-12
    if quantised:
        close = 1e-5
    for rank, by_case in enumerate(answers):
        for case, answer in by_case.items():
            torch.testing.assert_close(
                answer.out,
                answer.whole,
                rtol=close,
                # e4m3 has steps of 1/16.
                atol=close if name not in ROUNDS_ROWS else largest(answer.whole) / 16,
                msg=lambda text, rank=rank, case=case: f"rank {rank}, {case}: {text}",
            )
            assert answer.untouched
            expected = 0 if parallel.sequence_parallel or parallel.tensor_parallel_size == 1 else 1
            assert len(answer.reductions) == expected, "routed and shared are reduced once"
    return answers


@pytest.mark.parametrize("parallel", TWO)
@pytest.mark.parametrize("name", LAYERS)
def test_two_ranks(name: str, parallel: str, two: Pool, seed: int) -> None:
    if (name, parallel) == ("post_norm", "dp_slices"):
        with pytest.raises(RankError, match=r"needs its whole output; possible: .*_size=2"):
            check(name, TWO[parallel], two, seed)
        return
    answers = check(name, TWO[parallel], two, seed)
    if name == "latent" and parallel == "tp":
        assert answers[0]["some"].reductions == [5 + 12], "communicated at the latent width"


@pytest.mark.parametrize("parallel", FOUR)
@pytest.mark.parametrize("name", ["odd", "deepseek_v3", "latent_identity", "chunked", "dual_batch"])
def test_four_ranks(name: str, parallel: str, four: Pool, seed: int) -> None:
    check(name, FOUR[parallel], four, seed)


def test_every_weight_is_on_one_rank(two: Pool, seed: int) -> None:
    for parallel in ("tp", "tp_ep", "dp_ep"):
        answers = check("odd", TWO[parallel], two, seed)
        config = make_config(**LAYERS["odd"]).experts
        held = sum(answer["some"].weights for answer in answers)
        assert held == config.num_experts * config.params_per_expert


@pytest.mark.parametrize("parallel", ["tp_ep", "sp_ep", "dp_ep_alltoall", "redundant"])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_experts_are_split_by_expert(
    name: str, parallel: str, two: Pool, seed: int
) -> None:
    check(name, TWO[parallel], two, seed)


@pytest.mark.parametrize("parallel", ["tp", "dp_slices"])
@pytest.mark.parametrize("name", SLICED)
def test_quantised_experts_are_split_where_groups_end(
    name: str, parallel: str, two: Pool, seed: int
) -> None:
    answers = check(name, TWO[parallel], two, seed)
    held = [answer["some"].weights for answer in answers]
    assert held[0] >= held[1] > 0
    whole = build(make_config(**SLICED[name]), draw_layer_of(name, seed)).routed_experts
    assert held[0] < sum(p.numel() for p in whole.parameters())


def draw_layer_of(name: str, seed: int) -> LayerTensors:
    return draw_layer(
        make_config(**SLICED[name]), torch.float32, torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("parallel", ["tp4_ep2", "tp2_dp2_ep2"])
@pytest.mark.parametrize("name", ["sliced int4", "sliced fp8_block"])
def test_quantised_experts_by_expert_and_slice(
    name: str, parallel: str, four: Pool, seed: int
) -> None:
    check(name, FOUR[parallel], four, seed)


@pytest.mark.parametrize(
    ("quantization", "size", "text"),
    [
        (
            "int4_g128",
            128,
            "in runs of 128 that share a scale cannot be split over 2 ranks; .*most 1",
        ),
        ("fp8_block", 192, "a scale would be cut; possible: enable_expert_parallel=True"),
    ],
)
def test_scales_are_not_cut(quantization: str, size: int, text: str, two: Pool, seed: int) -> None:
    fields = {**SLICED["sliced fp8"], "quantization": quantization}
    fields["experts"] = {"intermediate_size": size}
    with pytest.raises(RankError, match=text):
        two.run(refused_slices, fields)


def refused_slices(rank: int, fields: dict[str, Any]) -> None:
    config = make_config(**fields)
    layer = build(config, draw_layer(config, torch.float32, torch.Generator().manual_seed(1)))
    shard_layer(layer, make_groups(TWO["tp"]))


def compiled(rank: int, name: str, parallel: ParallelConfig) -> tuple[Tensor, Tensor]:
    """In a worker: the spread layer as one graph, and as it is."""
    config = make_config(**LAYERS[name])
    tensors = draw_layer(config, torch.float32, torch.Generator().manual_seed(11))
    layer = build(config, tensors)
    shard_layer(layer, make_groups(parallel))
    hidden = torch.randn(7, config.hidden_size, generator=torch.Generator().manual_seed(rank // 9))
    torch.compiler.reset()
    graph = torch.compile(layer, fullgraph=True, backend="eager")
    return graph(hidden), layer(hidden)


@pytest.mark.parametrize("parallel", ["tp", "tp_ep", "sp_ep", "dp_ep"])
def test_a_spread_layer_is_one_graph(parallel: str, two: Pool) -> None:
    for ours, eager in two.run(compiled, "latent", TWO[parallel]):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)
