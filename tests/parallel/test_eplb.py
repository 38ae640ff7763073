"""Load balancing of experts: the placements, the moves, and that no result changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moetor
from layer.layer_cases import LayerTensors, build, draw_layer, make_config
from moetor.config import SharedExpertsConfig
from moetor.errors import ConfigError
from moetor.huggingface.modules import fused_modules
from moetor.layer.routing.simulator import SimulatedRouter
from moetor.layer.sharding import balanced_layer, shard_layer
from moetor.parallel.config import EplbConfig, ParallelConfig
from moetor.parallel.eplb.balance import balance, balancedness, part_loads
from moetor.parallel.eplb.balancer import ExpertBalancer
from moetor.parallel.eplb.load import ExpertLoad
from moetor.parallel.eplb.rearrange import moves_between
from moetor.parallel.eplb.statistics import read_loads, save_loads
from moetor.parallel.groups import make_groups
from moetor.parallel.placement import ExpertMap, ExpertPlacement
from parallel.pool import Pool, RankError, patient


def zipf(experts: int, rng: torch.Generator) -> list[float]:
    loads = 1e6 / torch.arange(1, experts + 1)
    return [float(x) for x in loads[torch.randperm(experts, generator=rng)]]


@pytest.mark.parametrize(
    ("experts", "parts", "redundant", "at_least"),
    [(128, 4, 0, 0.99), (128, 8, 16, 0.99), (256, 32, 32, 0.97), (61, 7, 5, 0.95), (8, 4, 4, 0.8)],
)
def test_a_skewed_load_is_evened_out(
    experts: int, parts: int, redundant: int, at_least: float, rng: torch.Generator
) -> None:
    loads = zipf(experts, rng)
    before = ExpertPlacement.linear(experts, parts, redundant)
    after = balance(before, loads, EplbConfig())
    assert balancedness(after, loads) >= at_least
    assert balancedness(after, loads) >= balancedness(before, loads)
    assert [len(part) for part in after.parts] == [len(part) for part in before.parts]
    assert sum(part_loads(after, loads)) == pytest.approx(sum(loads))
    for part in after.parts:
        assert len(set(part)) == len(part), "two copies in one part help nobody"
    again = balance(after, loads, EplbConfig())
    assert len(moves_between(after, again)) <= len(moves_between(before, after))


def test_an_even_load_and_none(rng: torch.Generator) -> None:
    placement = ExpertPlacement.linear(8, 4)
    for load in (0.0, 3.0):
        assert balancedness(balance(placement, [load] * 8, EplbConfig()), [load] * 8) == 1


def test_hierarchical_keeps_groups_on_nodes(rng: torch.Generator) -> None:
    config = EplbConfig(policy="hierarchical", num_nodes=2)
    loads = zipf(32, rng)
    after = balance(ExpertPlacement.linear(32, 4, 4), loads, config, num_groups=8)
    nodes = [set(after.parts[0] + after.parts[1]), set(after.parts[2] + after.parts[3])]
    for node in nodes:
        groups = {expert // 4 for expert in node}
        assert len(groups) == 4
        assert node == {expert for group in groups for expert in range(4 * group, 4 * group + 4)}
    with pytest.raises(ConfigError, match="use 'global'"):
        balance(ExpertPlacement.linear(32, 4), loads, config, num_groups=1)


def test_moves_lead_from_one_placement_to_the_other(rng: torch.Generator) -> None:
    before = ExpertPlacement.linear(16, 4, 4)
    after = balance(before, zipf(16, rng), EplbConfig())
    slots = [list(part) for part in before.parts]
    for move in moves_between(before, after):
        slots[move.to_part][move.to_slot] = before.parts[move.from_part][move.from_slot]
    assert tuple(map(tuple, slots)) == after.parts
    assert moves_between(after, after) == []


def test_copies_take_turns() -> None:
    placement = ExpertPlacement(2, ((0, 1), (0, 0)))
    experts = ExpertMap(placement, (0, 1), 0)
    ids = torch.zeros((30, 1), dtype=torch.int32)
    physical = experts.physical(ids).flatten().tolist()
    assert {physical.count(copy) for copy in (0, 2)} <= {10, 15, 20}
    assert set(physical) <= {0, 2, 3}
    assert experts.physical(torch.full((1, 2), 2, dtype=torch.int32)).tolist() == [[4, 4]]
    every = torch.arange(5, dtype=torch.int32).unsqueeze(0)
    here = experts.held(torch.ones(1, 5), every)
    assert here.topk_ids.tolist() == [[0, 1, 2, 2, 2]]
    assert here.topk_weights.tolist() == [[1, 1, 0, 0, 0]]


def test_the_window_forgets_and_the_decay_weighs() -> None:
    load = ExpertLoad(3, EplbConfig(window=2, decay=0.5))
    for expert in (0, 1, 1, 2):
        load.count(torch.tensor([[expert, 3]]))
    assert load.read().tolist() == [0, 0.5, 1]
    load.clear()
    assert load.read().tolist() == [0, 0, 0]


def test_statistics(tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    save_loads(file, "demo", {"layers.0": [1, 0, 3]})
    assert read_loads(file) == {"layers.0": [1.0, 0.0, 3.0]}
    for text, error in (("{}", "no expert statistics"), ("[", "cannot be read")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=error):
            read_loads(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_loads(tmp_path / "none")


FIELDS: dict[str, Any] = {
    "router": {"num_experts": 8, "top_k": 2},
    "shared": SharedExpertsConfig(intermediate_size=6),
    "experts": {"has_bias": True},
    "internal_gate": False,
}
# All of them on the first rank, as long as experts are in order.
PREFERRED = (3, 4, 5)


def skewed(
    rank: int,
    tensors: LayerTensors,
    inputs: list[tuple[Tensor, Tensor]],
    parallel: ParallelConfig,
    simulated: bool,
) -> Any:
    """In a worker: a layer whose tokens prefer few experts, while experts move."""
    assert parallel.eplb is not None
    whole, layer = (
        build(
            make_config(**FIELDS),
            tensors,
            router=SimulatedRouter(8, 2, "zipf", exponent=1.5, seed=rank) if simulated else None,
        )
        for _ in range(2)
    )
    groups = make_groups(parallel)
    layout = shard_layer(layer, groups)
    watched = balanced_layer("layer", layer.routed_experts, layout)
    assert watched is not None
    balancer = ExpertBalancer([watched], parallel.eplb, groups.world)
    before = watched.experts.placement
    errors, busy = [], []
    given = inputs[groups.data_rank]
    for _ in range(14):
        expected = whole(*given)
        errors.append(float((layer(*given) - expected).abs().max()))
        balancer.step()
        busy.append(balancer.busy)
    loads = torch.stack([layout.load.read()])  # type: ignore[union-attr]
    dist.all_reduce(loads)
    after = watched.experts.placement
    even = [balancedness(where, loads[0].tolist()) for where in (before, after)]
    return errors, busy, even, balancer.stats, after


@pytest.mark.parametrize(
    ("fields", "simulated"),
    [
        ({"data_parallel_size": 2}, False),
        ({"data_parallel_size": 2}, True),
        ({"data_parallel_size": 2, "dispatcher": "alltoall"}, False),
        ({"tensor_parallel_size": 2}, False),
    ],
    ids=["allgather", "simulator", "alltoall", "replicated"],
)
def test_experts_move_and_results_stay(
    fields: dict[str, Any], simulated: bool, two: Pool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors = draw_layer(make_config(**FIELDS), torch.float64, rng)
    inputs = []
    for tokens in (40, 24):
        logits = torch.randn(tokens, 8, generator=rng)
        logits[:, PREFERRED] += 3
        inputs.append((torch.randn(tokens, 12, generator=rng).double(), logits.double()))
    one_expert = 12 * 30 * 8 + 20 * 8 + 12 * 8
    eplb = EplbConfig(window=8, interval=3, max_bytes_per_step=one_expert)
    parallel = patient(enable_expert_parallel=True, num_redundant_experts=3, eplb=eplb, **fields)
    answers = two.run(skewed, tensors, inputs, parallel, simulated)
    for errors, busy, even, stats, _ in answers:
        assert max(errors) < 1e-12
        assert not busy[1]
        assert busy[2], "the load was looked at after three passes"
        assert stats.layers_moved >= 1
        assert stats.experts_moved >= 1
        assert stats.most_bytes_in_a_step <= one_expert
        assert even[1] > even[0]
        assert even[1] > 0.9
    assert answers[0][4] == answers[1][4], "both ranks have the same placement"


def counted(
    rank: int, tensors: LayerTensors, inputs: list[tuple[Tensor, Tensor]], fields: dict[str, Any]
) -> Tensor:
    """In a worker: choices of each expert in three calls, of all ranks together."""
    layer = build(make_config(**FIELDS), tensors)
    groups = make_groups(patient(eplb=EplbConfig(decay=1.0), **fields))
    layout = shard_layer(layer, groups)
    assert layout.load is not None
    for _ in range(3):
        layer(*inputs[groups.data_rank])
    loads = layout.load.read()
    dist.all_reduce(loads)
    return loads


@pytest.mark.parametrize("tokens", [(5, 3), (1, 0)])
@pytest.mark.parametrize(
    ("world", "fields"),
    [
        (2, {"tensor_parallel_size": 2}),
        (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
        (2, {"tensor_parallel_size": 2, "sequence_parallel": True, "dispatcher": "alltoall"}),
        (2, {"data_parallel_size": 2}),
        (4, {"tensor_parallel_size": 2, "data_parallel_size": 2, "sequence_parallel": True}),
    ],
    ids=["replicated", "sp", "sp-alltoall", "dp", "sp-dp"],
)
def test_each_token_counts_once_and_filling_rows_never(
    world: int,
    fields: dict[str, Any],
    tokens: tuple[int, ...],
    two: Pool,
    four: Pool,
    rng: torch.Generator,
) -> None:
    tensors = draw_layer(make_config(**FIELDS), torch.float64, rng)
    inputs = [
        (torch.randn(n, 12, generator=rng).double(), torch.randn(n, 8, generator=rng).double())
        for n in tokens
    ]
    seen = inputs[: fields.get("data_parallel_size", 1)]
    chosen = torch.cat([logits.topk(2).indices.flatten() for _, logits in seen])
    fields = {"enable_expert_parallel": True, **fields}
    for loads in (four if world == 4 else two).run(counted, tensors, inputs, fields):
        assert loads.tolist() == (3 * chosen.bincount(minlength=8)).tolist()


def demo_under_eplb(rank: int, folder: str, dynamic: bool) -> Any:
    """In a worker: the demo on other tokens per rank, placed for a recorded load, or by its own."""
    from transformers import AutoModelForCausalLM

    from moetor.demo import heldout_text, model_path
    from moetor.huggingface.trial import relative_error

    stats = str(Path(folder) / "load.json")
    whole = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    eplb = EplbConfig(
        window=4,
        interval=2,
        dynamic=dynamic,
        statistics=None if dynamic else stats,
        max_bytes_per_step=2**20,
    )
    config = patient(
        data_parallel_size=2, enable_expert_parallel=True, eplb=eplb, num_redundant_experts=2
    )
    report = moetor.fuse(model, verify=False, parallel=config).parallel
    assert report is not None
    codes = torch.tensor([list(heldout_text().encode()[:600])]) % 97
    given = codes[:, :300] if rank == 0 else codes[:, 300:500]
    expected = whole(given).logits
    errors = [relative_error(model(given).logits, expected) for _ in range(16 if dynamic else 1)]
    layouts = [module.parallel for _, module in fused_modules(model)]
    placements = [layout.experts.placement for layout in layouts]  # type: ignore[union-attr]
    moved = 0 if report.balancer is None else report.balancer.stats.experts_moved
    return errors, placements, moved


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_the_demo(dynamic: bool, two: Pool, tmp_path: Path) -> None:
    load = [1.0 + expert * (expert < 8) for expert in range(16)]
    loads = {f"model.layers.{layer}.mlp": load for layer in range(4)}
    save_loads(tmp_path / "load.json", "demo", loads)
    answers = two.run(demo_under_eplb, str(tmp_path), dynamic)
    in_order = ExpertPlacement.linear(16, 2, 2)
    for errors, placements, moved in answers:
        assert max(errors) < 1e-5
        assert (moved > 0) == dynamic
        assert any(placement != in_order for placement in placements)
    assert answers[0][1] == answers[1][1]
    if not dynamic:
        wanted = balance(in_order, loads["model.layers.0.mlp"], EplbConfig())
        assert answers[0][1] == [wanted] * 4


def test_statistics_of_another_model_are_refused(two: Pool, tmp_path: Path) -> None:
    save_loads(tmp_path / "load.json", "other", {"model.layers.0.mlp": [1.0] * 5})
    with pytest.raises(RankError, match=r"have 5 experts for layer 'model.layers.0.mlp', which ha"):
        two.run(demo_under_eplb, str(tmp_path), False)
