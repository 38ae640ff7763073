"""Every MoE family, spread over two processes (some over four): logits equal one process's."""

from __future__ import annotations

import functools

import pytest
import torch

import moetor
from huggingface.custom_models import tiny_custom
from moetor.errors import ParallelError
from moetor.huggingface.trial import relative_error
from moetor.tools.tiny import FAMILIES, logits_of, tiny_inputs, tiny_model
from parallel.families import MODES, Told, experts_held, try_family
from parallel.pool import Pool, RankError

# float32 sums in another order; recurrent and scaled models carry the difference further.
FLOAT32_ERROR = 1e-5
TWO = [mode for mode, config in MODES.items() if config.world_size == 2]
FOUR = [mode for mode, config in MODES.items() if config.world_size == 4]
# Blocks that are not fused stay whole on every rank.
WHOLE = {"doge", "nllb_moe", "vitpose_backbone"}
# Shared experts that no slicing of linear layers describes.
WHOLE_SHARED = {"inkling"}


def ask(pool: Pool, name: str, modes: list[str], *, generates: bool = False) -> list[Told]:
    told: list[Told] = pool.run(functools.partial(try_family, generates=generates), name, modes)
    if told[0].skipped:
        pytest.skip(told[0].skipped)
    for rank, answer in enumerate(told):
        for mode in modes:
            assert answer.errors[mode] <= FLOAT32_ERROR, f"{mode}, rank {rank}"
    return told


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks(name: str, two: Pool) -> None:
    told = ask(two, name, TWO)
    each_weight_is_on_one_rank(name, told, TWO)
    if name not in WHOLE:
        report = told[0].reports["tp"]
        assert ("shared experts whole" in report) == (name in WHOLE_SHARED), report


def each_weight_is_on_one_rank(name: str, told: list[Told], modes: list[str]) -> None:
    whole = told[0].held["whole"]
    assert (whole > 0) == (name not in WHOLE)
    for mode in modes if whole else []:
        held = [answer.held[mode] for answer in told]
        assert sum(held) == whole, mode
        assert max(held) < whole, mode


@pytest.mark.parametrize("name", FAMILIES)
def test_four_ranks(name: str, four: Pool) -> None:
    modes = set(FOUR)
    if name != "deepseek_v3":  # two heads of keys, which four ranks cannot share
        modes.remove("tp4_ep2")
    if name == "muse_spark":  # a norm needs each expert's whole output
        modes.remove("tp2_dp2_ep2")
    each_weight_is_on_one_rank(name, ask(four, name, sorted(modes)), sorted(modes))


def test_heads_are_not_cut(four: Pool) -> None:
    with pytest.raises(RankError, match=r"num_key_value_heads=2 .*possible by it: 1, 2"):
        four.run(try_family, "qwen3_moe", ["tp4_ep2"])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_greedy_tokens(name: str, two: Pool) -> None:
    modes = ["tp", "tp_ep", "sp"]
    for answer in ask(two, name, modes, generates=True):
        assert answer.same_tokens == dict.fromkeys(modes, True)


def test_norm_after_every_expert_is_said(two: Pool) -> None:
    told = ask(two, "muse_spark", ["tp"])
    assert "split by expert: a norm follows every expert" in told[0].reports["tp"]


def other_weights(rank: int) -> None:
    """In a worker: a model whose weights differ in one parameter."""
    model = tiny_model("qwen3_moe")
    if rank:
        model.model.layers[1].self_attn.o_proj.weight.add_(0.01)
    before = model.state_dict()
    moetor.fuse(model, verify=False)
    try:
        moetor.parallelize(model, MODES["tp"])
    finally:
        assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())


def test_another_revision_on_a_rank_is_found_by_all(two: Pool) -> None:
    for fine, answer in two.try_all(other_weights):
        assert not fine
        assert answer[0] is ParallelError
        assert "disagree on the model's weights" in answer[1]
        assert "the model's configuration" not in answer[1]


def custom(rank: int, style: str, mode: str) -> tuple[float, int, int]:
    """In a worker: a model from somebody's own file, every expert a module; error, weights here."""
    whole, spread = tiny_custom(style), tiny_custom(style)
    moetor.fuse(whole)
    report = moetor.fuse(spread, parallel=MODES[mode])
    assert {block.level for block in report.blocks} == {"block"}
    drawn = torch.Generator().manual_seed(rank if MODES[mode].joint else 0)
    ids = torch.randint(0, 61, (2, 5 + (rank if MODES[mode].joint else 0)), generator=drawn)
    error = relative_error(spread(ids).logits, whole(ids).logits)
    return error, experts_held(spread), experts_held(whole)


@pytest.mark.parametrize("mode", ["tp", "tp_ep", "dp_ep"])
@pytest.mark.parametrize("style", ["mixtral", "grok", "deepseek"])
def test_experts_that_are_modules_of_their_own(style: str, mode: str, two: Pool) -> None:
    told = two.run(custom, style, mode)
    assert max(error for error, _, _ in told) <= FLOAT32_ERROR
    assert sum(held for _, held, _ in told) == told[0][2]


def quantised(rank: int) -> float:
    """In a worker: a model whose experts are quantised, then split by expert."""
    model, spread = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    inputs = tiny_inputs("qwen3_moe", model)
    moetor.fuse(model, quantization="int8_w8a16")
    moetor.fuse(spread, quantization="int8_w8a16", parallel=MODES["tp_ep"])
    ours, whole = (logits_of("qwen3_moe", each, inputs) for each in (spread, model))
    return relative_error(ours, whole)


def test_quantised_experts(two: Pool) -> None:
    assert max(two.run(quantised)) <= FLOAT32_ERROR
