"""`reduce_results` over two real processes: the ranks' partial layers add up to the whole one, in
one reduction."""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from layer.layer_cases import (
    DEEPSEEK_V3,
    IDENTITY,
    LayerTensors,
    build,
    draw_input,
    draw_layer,
    make_config,
)
from moetor.config import MoEConfig, SharedExpertsConfig
from moetor.layer import MoELayer
from moetor.layer.runner import base

RANKS = 2
SHARED = SharedExpertsConfig(intermediate_size=6, sigmoid_gate=True)
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"experts": {"has_bias": True}},
    "shared": {"router": DEEPSEEK_V3, "shared": SHARED},
    "mean": {"shared": replace(SHARED, combine="mean", sigmoid_gate=False)},
    "latent": {"latent_size": 5},
    "latent_shared": {"latent_size": 5, "shared": SHARED},
    "latent_mean": {"latent_size": 16, "shared": replace(SHARED, combine="mean")},
    "padded": {"hidden_size": 13, "shared": SHARED, "runner": {"hidden_multiple": 8}},
    "chunked": {"shared": SHARED, "runner": {"name": "chunked", "workspace_bytes": 1}},
    "external": {"internal_gate": False, "shared": SHARED},
    "callable": {"shared": SHARED},
    "identity": {"router": IDENTITY, "shared": SHARED},
    "latent_identity": {"latent_size": 5, "router": IDENTITY},
    "not_reduced": {"shared": SHARED},
}


def config_of(name: str) -> MoEConfig:
    return make_config(**LAYERS[name])


def first_two(hidden_TH: Tensor, logits_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    """A callable router."""
    assert logits_TE is not None
    ids = torch.tensor([[0, 3]] * len(hidden_TH))
    return logits_TE.gather(1, ids).sigmoid(), ids


def options(name: str) -> dict[str, Any]:
    return {"router": first_two} if name == "callable" else {}


def shard(config: MoEConfig, tensors: LayerTensors, rank: int) -> tuple[MoEConfig, LayerTensors]:
    """One rank's part: a slice of every intermediate size, and the output's bias on one rank."""
    size = config.experts.intermediate_size // RANKS
    rows = torch.arange(rank * size, (rank + 1) * size)
    both = torch.cat((rows, rows + config.experts.intermediate_size))
    experts = tensors.experts
    down_bias = experts.down_bias
    if down_bias is not None and rank > 0:
        down_bias = torch.zeros_like(down_bias)
    experts = experts._replace(
        gate_up=experts.gate_up[:, both],
        gate_up_bias=None if experts.gate_up_bias is None else experts.gate_up_bias[:, both],
        down=experts.down[:, :, rows],
        down_bias=down_bias,
    )
    state, shared = dict(tensors.state), config.shared
    if shared is not None:
        part = shared.intermediate_size // RANKS
        own = slice(rank * part, (rank + 1) * part)
        for name in ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"):
            state[name] = state[name][own]
        state["shared_experts.down_proj.weight"] = state["shared_experts.down_proj.weight"][:, own]
        shared = replace(shared, intermediate_size=part)
    form = replace(config.experts, intermediate_size=size)
    return replace(config, experts=form, shared=shared), LayerTensors(experts, state)


def _one_rank(rank: int, folder: str) -> None:
    """Runs every layer on this rank and writes output and number of reductions."""
    path = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path / 'rendezvous'}", rank=rank, world_size=RANKS
    )
    group = dist.group.WORLD
    widths: list[int] = []
    real = base.all_reduce

    def counted(partial_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
        widths.append(partial_TH.shape[-1])
        return real(partial_TH, group)

    base.all_reduce = counted
    results: dict[str, Any] = {}
    inputs = torch.load(path / "inputs.pt", weights_only=False)
    for name, (tensors, hidden, logits) in inputs.items():
        widths.clear()
        try:
            part, own = shard(config_of(name), tensors, rank)
            part = part.with_runner(reduce_results=name != "not_reduced")
            layer = build(part, own, process_group=group, **options(name))
            with torch.no_grad():
                before = hidden.clone()
                results[name] = (layer(hidden, logits), list(widths), torch.equal(before, hidden))
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, path / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Inputs, whole results and both ranks' answers, of one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    rng = torch.Generator()
    print(f"seed {rng.seed()}")
    inputs, whole = {}, {}
    for name in LAYERS:
        config = config_of(name)
        tensors = draw_layer(config, torch.float64, rng)
        layer: MoELayer = build(config, tensors, **options(name))
        given = draw_input(layer, 5, rng)
        inputs[name] = (tensors, given.hidden, given.logits)
        with torch.no_grad():
            whole[name] = layer(given.hidden, given.logits)
    torch.save(inputs, folder / "inputs.pt")
    mp.spawn(_one_rank, args=(str(folder),), nprocs=RANKS)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {"whole": whole, "ranks": ranks}


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "not_reduced"])
def test_partial_results_add_up(name: str, ran: dict[str, Any]) -> None:
    for answers in ran["ranks"]:
        assert not isinstance(answers[name], str), answers[name]
        out, widths, untouched = answers[name]
        assert untouched
        # A float64 sum in another order; identity experts are added in float32.
        close = 1e-6 if "identity" in name else 1e-12
        torch.testing.assert_close(out, ran["whole"][name], rtol=close, atol=close)
        assert len(widths) == 1, "one reduction for routed and shared together"
    assert torch.equal(ran["ranks"][0][name][0], ran["ranks"][1][name][0])


def test_a_latent_layer_reduces_at_its_width(ran: dict[str, Any]) -> None:
    for answers in ran["ranks"]:
        assert answers["latent"][1] == [5]
        assert answers["latent_shared"][1] == [5 + 12]


def test_nothing_is_reduced_unasked(ran: dict[str, Any]) -> None:
    first, second = (answers["not_reduced"] for answers in ran["ranks"])
    assert first[1] == second[1] == []
    whole = ran["whole"]["not_reduced"]
    assert not torch.allclose(first[0], whole)
    torch.testing.assert_close(first[0] + second[0], whole, rtol=1e-12, atol=1e-12)
