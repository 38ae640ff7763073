"""Experts in host memory: the same sums whatever is cached or copied, with a CPU as the GPU.

Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from layer.expert_cases import EDGES, FORMS, Drawn, ExpertsCase, draw
from moetor.config import ExpertsConfig
from moetor.errors import ConfigError, KernelRefusedError, UnsupportedError
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.native.kernel import NativeKernel
from moetor.kernels.routing import Routing
from moetor.layer.experts import Experts
from moetor.layer.offload import ExpertOffload, LayerNeed, plan_memory
from moetor.layer.offload.balance import Balance
from moetor.layer.offload.hot import NOWHERE, HotExperts
from moetor.layer.offload.store import runs
from moetor.layer.quantized_experts import make_experts
from moetor.offload_config import OffloadConfig, offload_config
from oracle import assert_close

CPU = torch.device("cpu")
PLAIN = ExpertsConfig(num_experts=8, hidden_size=24, intermediate_size=20, has_bias=True)


def native_refuses(config: ExpertsConfig) -> str | None:
    query = KernelQuery(device="cpu", dtype=torch.float32, experts=config, top_k=1)
    return NativeKernel().refusal(query)


pytestmark = pytest.mark.skipif(native_refuses(PLAIN) is not None, reason="needs the native kernel")
CASES = [case for case in FORMS + EDGES if native_refuses(case.config) is None]


def build(drawn: Drawn, case: ExpertsCase, quantization: str | None = None) -> Experts:
    return make_experts(
        case.config,
        quantization,
        case.top_k,
        kernel="auto",
        batch_invariant=False,
        weights=ExpertWeights(**drawn.tensors._asdict()),
        dtype=drawn.hidden.dtype,
    )


def offload(*experts: Experts, cache: int = 0, **settings: object) -> ExpertOffload:
    config = OffloadConfig(cpu_experts=len(experts), accelerator="cpu", **settings)  # type: ignore[arg-type]
    return ExpertOffload(experts, CPU, config, cache)


HOW = [
    *("host", "cached", "all cached", "copied", "cached and copied", "half copied", "all three"),
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_form_wherever_its_experts_are(
    case: ExpertsCase, how: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = draw(case, torch.float32, rng)
    experts = build(drawn, case)
    count = case.config.num_experts
    caches = {"cached": 2, "all cached": count, "cached and copied": 1, "all three": 1}
    cache = caches.get(how, 0)
    monkeypatch.setattr("moetor.layer.offload.store.CHUNK_BYTES", 1)  # one expert a chunk
    group = offload(
        experts,
        cache=cache,
        stream_min_tokens=1 if "copied" in how else 0,
    )
    if how in ("half copied", "all three"):
        group.balance = Balance(1, ((1, 1.0),), copy_seconds=1.0)
    out = experts.run(drawn.hidden, Routing(drawn.topk_weights, drawn.topk_ids))
    assert_close(out, drawn.expected(case.config))


@pytest.mark.parametrize("name", ["int8_w8a16", "int4", "mxfp4"])
@pytest.mark.parametrize("copied", [False, True])
def test_quantised_experts(name: str, copied: bool, rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=6, hidden_size=64, intermediate_size=32, has_bias=True)
    case = ExpertsCase(id=name, config=config, tokens=7, top_k=3)
    drawn = draw(case, torch.float32, rng)
    routing = Routing(drawn.topk_weights, drawn.topk_ids)
    wanted = build(drawn, case, name).run(drawn.hidden, routing)
    experts = build(drawn, case, name)
    offload(experts, cache=2, stream_min_tokens=int(copied))
    torch.testing.assert_close(
        experts.run(drawn.hidden, routing), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
    )


def test_half_precision(rng: torch.Generator) -> None:
    case = ExpertsCase(id="half", config=PLAIN, tokens=9, top_k=4)
    drawn = draw(case, torch.bfloat16, rng)
    experts = build(drawn, case)
    offload(experts, cache=3)
    out = experts.run(drawn.hidden, Routing(drawn.topk_weights, drawn.topk_ids))
    wanted = drawn.expected(PLAIN).value
    assert (out.double() - wanted).abs().max() <= 6 * torch.finfo(torch.bfloat16).eps * float(
        wanted.abs().max()
    )


def test_the_cache_follows_the_choices(rng: torch.Generator) -> None:
    case = ExpertsCase(id="hot", config=PLAIN, tokens=6, top_k=2)
    drawn = draw(case, torch.float32, rng)
    first, second = build(drawn, case), build(drawn, case)
    group = offload(first, second, cache=2, moves_per_step=1)
    assert group.hot.absent(0) == group.hot.absent(1) == [2, 3, 4, 5, 6, 7]
    ids = torch.tensor([[6, 5]] * 6, dtype=torch.int32)
    expected = replace(drawn, topk_ids=ids).expected(PLAIN)
    for _ in range(12):
        out = first.run(drawn.hidden, Routing(drawn.topk_weights, ids))
        assert_close(out, expected)
    assert group.hot.absent(0) == [0, 1, 2, 3, 4, 7]
    assert group.hot.absent(1) == [2, 3, 4, 5, 6, 7]
    slots = group.hot.slot_LE[0]
    for tensor, rows in zip(group.stores[0].tensors, group.stores[0].cache, strict=True):
        for expert in (5, 6):
            assert torch.equal(rows[slots[expert]], tensor[expert])


def test_no_step_moves_more_than_it_may() -> None:
    hot = HotExperts([4, 4], slots=2, decay=0.5)
    hot.note(np.array([[0, 0, 9, 9], [0, 0, 5, 7]], dtype=np.int32))
    moves = hot.moves(3)
    assert [(move.layer, move.expert) for move in moves] == [(0, 2), (0, 3), (1, 3)]
    assert len({(move.layer, move.slot) for move in moves}) == 3
    hot.begin(moves)
    assert (hot.slot_LE[0] == NOWHERE).all()  # neither there before they have arrived
    hot.finish(moves)
    assert hot.absent(0) == [0, 1]
    assert len(hot.absent(1)) == 2


def test_an_expert_that_is_hardly_hotter_stays_where_it_is() -> None:
    hot = HotExperts([3], slots=1, decay=0.9)
    hot.note(np.array([[10, 11, 0]], dtype=np.int32))
    assert hot.moves(4) == []
    hot.note(np.array([[0, 11, 0]], dtype=np.int32))
    assert [move.expert for move in hot.moves(4)] == [1]


def test_tables_say_where_each_expert_is_computed() -> None:
    hot = HotExperts([3, 5], slots=4, decay=0.9)
    hot.slot_LE[1] = [NOWHERE, 3, 0, NOWHERE, 1]
    tables = hot.tables(4)
    assert tables[0, :, :4].tolist() == [[0, 1, 2, 3], [3, 3, 3, 3], [3, 3, 3, 3]]
    assert tables[1].tolist() == [[4, 3, 0, 4, 1, 4], [0, 5, 5, 3, 5, 5], [0, 5, 5, 1, 5, 5]]


def test_two_runs_without_a_cache_give_the_same_bits(rng: torch.Generator) -> None:
    case = ExpertsCase(id="twice", config=PLAIN, tokens=11, top_k=3)
    drawn = draw(case, torch.bfloat16, rng)
    experts = build(drawn, case)
    offload(experts)
    routing = Routing(drawn.topk_weights, drawn.topk_ids)
    runs = [experts.run(drawn.hidden, routing) for _ in range(2)]
    assert torch.equal(*runs)


def test_the_host_and_the_copies_end_together() -> None:
    host = ((8, 0.004), (16, 0.007), (64, 0.012), (256, 0.028))
    balance = Balance.of(host, 0.022, top_k=8, experts=128)
    # With 25 tokens four of five experts are met; the host's part of the time is 27% there.
    assert balance.min_tokens == 25
    assert balance.host_seconds(40) == pytest.approx(0.0095)
    assert balance.host_seconds(1024) == pytest.approx(0.112)
    for tokens in (25, 64, 200, 1000):
        copied = balance.copied(tokens, 128)
        left = balance.host_seconds(tokens) * (128 - copied) / 128
        assert left == pytest.approx(0.022 * copied / 128, rel=0.05)
    assert balance.copied(10_000, 128) == 128
    # A host that is as quick as that is left to do it all.
    assert Balance.of(((8, 0.001), (64, 0.002)), 0.022, 8, 128).min_tokens is None
    assert Balance.of(((8, 0.1), (64, 0.5)), 0.022, 4, 4).min_tokens == 2
    assert Balance(5).copied(5, 128) == 128


def test_runs_without_a_gap() -> None:
    assert list(runs([1, 2, 3, 7, 9, 10])) == [(1, 0, 3), (7, 3, 1), (9, 4, 2)]
    assert list(runs([])) == []


def test_they_stay_in_host_memory_and_are_not_cast_or_copied(rng: torch.Generator) -> None:
    case = ExpertsCase(id="fixed", config=PLAIN)
    experts = build(draw(case, torch.float32, rng), case)
    offload(experts)
    before = experts.down_proj.data_ptr()
    assert experts.to("meta").down_proj.data_ptr() == before
    with pytest.raises(ConfigError, match="cannot be cast"):
        experts.half()
    with pytest.raises(UnsupportedError, match="load it twice"):
        copy.deepcopy(experts)
    with pytest.raises(UnsupportedError, match="pickled"):
        pickle.dumps(experts)


@pytest.mark.parametrize("id", ["post_norm", "function"])
def test_forms_that_the_native_kernel_lacks_are_refused(id: str, rng: torch.Generator) -> None:
    case = next(case for case in FORMS if case.id == id)
    experts = build(draw(case, torch.float32, rng), case)
    with pytest.raises(KernelRefusedError, match="kernel 'native'"):
        offload(experts)


GIB = 2**30
LAYERS = [LayerNeed(f"layers.{n}.mlp", 8, 4 * GIB) for n in range(6)]
NO_RESERVE = OffloadConfig(reserve=0)


def test_as_few_layers_as_memory_asks_for() -> None:
    # Two chunks of an expert each, because one is larger than a chunk: 1 GiB.
    plan = plan_memory(LAYERS, GIB, NO_RESERVE, gpu_memory=15 * GIB, host_memory=64 * GIB)
    assert plan.layers == ("layers.3.mlp", "layers.4.mlp", "layers.5.mlp")
    assert (plan.resident_bytes, plan.host_bytes, plan.staging_bytes) == (
        12 * GIB,
        12 * GIB,
        GIB,
    )
    # 1 GiB is left; an expert of each of the three layers takes 1.5.
    assert (plan.cache_experts, plan.gpu_bytes) == (0, 14 * GIB)
    roomier = plan_memory(LAYERS, GIB, NO_RESERVE, gpu_memory=17 * GIB, host_memory=None)
    assert (len(roomier.layers), roomier.cache_experts) == (3, 2)
    assert roomier.gpu_bytes <= 17 * GIB
    everything = plan_memory(LAYERS, GIB, NO_RESERVE, gpu_memory=25 * GIB, host_memory=None)
    assert (everything.layers, everything.gpu_bytes) == ((), 25 * GIB)


@pytest.mark.parametrize(
    ("changes", "gpu", "host", "words"),
    [
        ({"cpu_experts": 7}, 99, 99, "above the 6 MoE layers"),
        ({"cpu_experts": 2}, 10, 99, "possible: cpu_experts from 4 on"),
        ({}, 1, 99, "the experts of 6 of 6 MoE layers"),
        ({}, 15, 11, "take 12 GiB of host memory, of which 11 GiB are free"),
        ({"cpu_experts": 3, "cache_experts": 4}, 15, 99, "possible: up to 0"),
    ],
)
def test_too_little_is_said_with_numbers(
    changes: dict[str, int], gpu: int, host: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_memory(
            LAYERS,
            GIB,
            replace(NO_RESERVE, **changes),
            gpu_memory=gpu * GIB,
            host_memory=host * GIB,
        )


def test_auto_needs_to_know_the_memory() -> None:
    with pytest.raises(ConfigError, match="give gpu_memory"):
        plan_memory(LAYERS, GIB, NO_RESERVE, gpu_memory=None, host_memory=None)


@pytest.mark.parametrize(
    "bad",
    [
        {"cpu_experts": -1},
        {"cpu_experts": "some"},
        {"cache_experts": True},
        {"moves_per_step": -1},
        {"gpu_memory": 0},
        {"decay": 1.0},
        {"accelerator": "tpu"},
    ],
)
def test_values_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        OffloadConfig(**bad)  # type: ignore[arg-type]


def test_short_forms() -> None:
    assert offload_config(None) is None
    assert offload_config(3) == OffloadConfig(cpu_experts=3)
    assert offload_config("auto") == OffloadConfig()
    for bad in (True, "all", 1.5):
        with pytest.raises(ConfigError, match="number of layers, or 'auto'"):
            offload_config(bad)  # type: ignore[arg-type]
