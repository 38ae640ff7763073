"""What cannot be spread over ranks is refused, with what can."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from layer.layer_cases import build, draw_layer, make_config
from moetor.errors import ConfigError, InputError, MoetorError, ParallelError, UnsupportedError
from moetor.layer.sharding import shard_layer
from moetor.parallel.config import CollectivesName, EplbConfig, ParallelConfig
from moetor.parallel.dispatch import agreed_rows
from moetor.parallel.groups import agree, make_groups
from moetor.parallel.placement import ExpertPlacement
from moetor.parallel.shard import slice_bounds
from parallel.pool import Pool, RankError

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be positive"),
    ({"dispatcher": "nvlink"}, "is not one of auto, allgather, alltoall"),
    ({"expert_parallel_size": 2}, "expert_parallel_size needs enable_expert_parallel=True"),
    ({"eplb": EplbConfig(), "num_redundant_experts": 2}, "eplb, num_redundant_experts needs"),
    (
        {"tensor_parallel_size": 4, "enable_expert_parallel": True, "expert_parallel_size": 3},
        "does not divide the 4 ranks; possible: 1, 2, 4",
    ),
    ({"sequence_parallel": True}, "needs tensor_parallel_size of at least 2"),
    ({"tensor_parallel_size": 2, "dispatcher": "alltoall"}, "every rank has every token"),
    ({"dispatch_dtype": "fp8"}, "dispatch_dtype='fp8' concerns tokens that travel"),
    ({"data_parallel_size": 2, "dispatch_dtype": "int3"}, "is not auto or fp8"),
    ({"max_tokens_per_rank": 8}, "every rank has every token"),
    ({"num_redundant_experts": -1}, "must not be negative"),
    ({"collectives": "ring"}, "is not one of auto, backend, direct"),
    ({"collectives": "direct"}, "needs tensor_parallel_size of at least 2, or data"),
]


@pytest.mark.parametrize(("fields", "text"), CONFIGS)
def test_configurations(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"window": 0}, "window=0 must be positive"),
        ({"decay": 1.5}, "must not exceed 1"),
        ({"min_gain": 0.5}, "at least 1"),
        ({"policy": "lucky"}, "is not one of auto, global, hierarchical"),
    ],
)
def test_balancing(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        EplbConfig(**fields)


def test_placements() -> None:
    with pytest.raises(ConfigError, match=r"at most 3, or at least 1 redundant experts"):
        ExpertPlacement.linear(3, 4)
    with pytest.raises(ConfigError, match=r"exceeds 4, with which each of 2 ranks holds all 4"):
        ExpertPlacement.linear(4, 2, redundant=5)
    with pytest.raises(ConfigError, match="holds no expert"):
        ExpertPlacement(2, ((0, 1), ()))
    with pytest.raises(ConfigError, match="hold 1 of 2 experts"):
        ExpertPlacement(2, ((0,), (0,)))


@pytest.mark.parametrize(
    ("size", "parts", "expected"),
    [
        (12, 3, [4, 4, 4]),
        (7, 2, [4, 3]),
        (5, 4, [2, 1, 1, 1]),
        (100, 3, [40, 32, 28]),
        (768, 5, [192, 192, 128, 128, 128]),
        (2, 2, [1, 1]),
    ],
)
def test_slices(size: int, parts: int, expected: list[int]) -> None:
    bounds = slice_bounds(size, parts)
    assert [stop - start for start, stop in bounds] == expected
    assert bounds[0][0] == 0
    assert bounds[-1][1] == size
    assert all(first[1] == second[0] for first, second in itertools.pairwise(bounds))


def test_a_slice_for_every_rank() -> None:
    with pytest.raises(ConfigError, match="of 3 cannot be split over 4 ranks; possible: at most 3"):
        slice_bounds(3, 4)


def test_a_grid_needs_its_ranks() -> None:
    with pytest.raises(ConfigError, match=r"2 ranks, and 1 has joined; possible here .*1 x 1"):
        make_groups(ParallelConfig(tensor_parallel_size=2))


def _other_grid(rank: int) -> None:
    make_groups(ParallelConfig(tensor_parallel_size=2, data_parallel_size=2))


def test_a_grid_that_does_not_fit(two: Pool) -> None:
    with pytest.raises(RankError, match=r"needs 4 ranks, and 2 have joined.*1 x 2, 2 x 1"):
        two.run(_other_grid)


def _direct(rank: int, collectives: CollectivesName) -> str | None:
    return make_groups(ParallelConfig(tensor_parallel_size=2, collectives=collectives)).not_direct


def test_direct_collectives_are_for_gpus(two: Pool) -> None:
    with pytest.raises(RankError, match=r"'direct' is not possible here: .* not on cpu; take"):
        two.run(_direct, "direct")
    for reason in two.run(_direct, "auto"):
        assert "not on cpu" in reason
    for reason in two.run(_direct, "backend"):
        assert reason == "collectives='backend' was asked for"


def _disagree(rank: int) -> None:
    agree({"the model": "same", "the revision": f"revision {rank}"})


def test_ranks_that_disagree_all_say_so(two: Pool) -> None:
    for fine, answer in two.try_all(_disagree):
        assert not fine
        kind, text, _ = answer
        assert kind is ParallelError
        assert "the revision (rank 0: revision 0; rank 1: revision 1)" in text
        assert "the model" not in text.partition("Start")[0]


def _refused(rank: int, fields: dict[str, Any], parallel: ParallelConfig) -> str:
    """In a worker: the refusal, after which the layer is as it was."""
    config = make_config(**fields)
    tensors = draw_layer(config, torch.float32, torch.Generator().manual_seed(3))
    layer = build(config, tensors)
    hidden = torch.ones(2, config.hidden_size)
    before = layer(hidden)
    try:
        shard_layer(layer, make_groups(parallel))
    except MoetorError as error:
        assert torch.equal(layer(hidden), before)
        return str(error)
    raise AssertionError("not refused")


@pytest.mark.parametrize(
    ("fields", "parallel", "text"),
    [
        (
            {"router": {"num_experts": 1, "top_k": 1}},
            ParallelConfig(data_parallel_size=2, enable_expert_parallel=True),
            "1 experts and 0 redundant ones do not fill 2 ranks",
        ),
        (
            {"experts": {"intermediate_size": 1}},
            ParallelConfig(tensor_parallel_size=2),
            "cannot be split over 2 ranks",
        ),
        (
            {"quantization": "unquantized_monolithic"},
            ParallelConfig(tensor_parallel_size=2, enable_expert_parallel=True),
            "possible: tensor parallelism alone, or a modular method",
        ),
    ],
)
def test_layers(fields: dict[str, Any], parallel: ParallelConfig, text: str, two: Pool) -> None:
    for answer in two.run(_refused, fields, parallel):
        assert text in answer


def _used_wrongly(rank: int) -> list[str]:
    config = make_config()
    tensors = draw_layer(config, torch.float32, torch.Generator().manual_seed(3))
    layer = build(config, tensors)
    groups = make_groups(
        ParallelConfig(data_parallel_size=2, enable_expert_parallel=True, max_tokens_per_rank=3)
    )
    shard_layer(layer, groups)
    said = []
    for wrong in (
        lambda: layer(torch.ones(4, 12)),
        lambda: shard_layer(layer, groups),
        lambda: layer.state_dict(),
    ):
        try:
            wrong()
        except (InputError, ConfigError, UnsupportedError) as error:
            said.append(str(error))
    with agreed_rows(5):
        assert torch.isfinite(layer(torch.ones(4, 12))).all()
    return said


def test_uses(two: Pool) -> None:
    for tokens, again, saved in two.run(_used_wrongly):
        assert "4 tokens were given where at most 3 were agreed" in tokens
        assert "is spread over ranks already" in again
        assert "save the model before it is spread over ranks" in saved
