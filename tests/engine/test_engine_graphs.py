"""The decoding step as graphs replay it, with a recorder that runs the step again on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine_cases import (
    assert_empty,
    greedy,
    make_engine,
    make_model,
    own_tokens,
    random_prompts,
    run_staggered,
)
from moetor.engine import SamplingParams, graphs, prompt_graphs, runner, sampler
from moetor.engine.launched import Launched, Started
from moetor.engine.rotary import RotaryTables
from moetor.layer.context import forward_context, get_forward_context


def rerun(
    step: Callable[[], tuple[Tensor, ...]], device: torch.device, pool: Any
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Like a graph: the same buffers are filled at each replay, and nothing else is returned."""
    filled = tuple(tensor.clone() for tensor in step())

    def replay() -> None:
        for old, new in zip(filled, step(), strict=True):
            old.copy_(new)

    return replay, filled


def rerun_with_recorder(step: Any, device: torch.device, pool: Any) -> Any:
    """Like a graph, which also holds what the recorder launched when it was captured."""
    context = get_forward_context()

    def recorded() -> Any:
        with forward_context(context):
            return step()

    return rerun(recorded, device, pool)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen3_next", "lfm2_moe", "deepseek_v3"])
def test_replayed_steps_give_the_tokens_of_generate(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "record", rerun)
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)
    wanted = [own_tokens(name, model, prompt) for prompt in prompts]
    engine = make_engine(model, max_num_seqs=5)
    made = engine.core.runner
    made.graphs.capture()
    # poison what no row may depend on: block 0, and what is left from the capture
    assert made.cache is not None
    for blocks in made.cache.blocks.values():
        blocks.keys[0] = 3.0
        blocks.values[0] = -5.0
    assert made.graphs._rotary is not None
    assert len(made.graphs._rotary) == 1
    engine.core._overlap = True
    params = [greedy() for _ in prompts]
    done = run_staggered(engine, prompts, params, every=1)
    assert [done[str(i)].outputs[0].token_ids for i in range(5)] == wanted
    assert engine.core.stats().graph_steps > 4
    assert_empty(engine)


def test_draws_are_the_same_with_graphs_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "record", rerun)
    model = make_model("qwen3_moe", 3)
    prompts = random_prompts(model, (11, 7, 3), seed=5)
    params = [
        SamplingParams(max_tokens=9, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=12, seed=4, top_k=9, frequency_penalty=0.7, ignore_eos=True),
        SamplingParams(max_tokens=7, temperature=0, logprobs=2, ignore_eos=True),
    ]
    found = []
    for captured in (False, True):
        engine = make_engine(model)
        if captured:
            engine.core.runner.graphs.capture()
            engine.core._overlap = True
        done = run_staggered(engine, prompts, params, every=1)
        found.append([done[str(i)].outputs[0].token_ids for i in range(3)])
        assert (engine.core.stats().graph_steps > 0) is captured
        assert_empty(engine)
    assert found[0] == found[1]
    assert list(map(len, found[0])) == [9, 12, 7]


@pytest.mark.parametrize("most", [1, 2, 5, 32, 33, 40, 256, 1000])
def test_sizes_reach_the_greatest_batch(most: int) -> None:
    sizes = graphs.graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert all(after <= 2 * before for before, after in pairwise(sizes))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4", "llama4", "deepseek_v3"])
def test_steps_with_prompts_are_replayed_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in parts, beside texts that grow, in graphs with room for more tokens and sequences
    than there are."""
    monkeypatch.setattr(graphs, "record", rerun)
    monkeypatch.setattr(prompt_graphs, "_SIZES", (16, 24, 4096))
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)
    wanted = [own_tokens(name, model, prompt) for prompt in prompts]
    engine = make_engine(model, max_num_seqs=4, max_num_batched_tokens=21)
    made = engine.core.runner
    made.graphs.capture()
    made.graphs.capture_prompts(21)
    assert made.graphs.prompts is not None
    assert made.graphs.prompts._sizes == [16, 21]
    assert made.cache is not None
    for blocks in made.cache.blocks.values():
        blocks.keys[0] = 3.0
        blocks.values[0] = -5.0
    engine.core._overlap = True
    done = run_staggered(engine, prompts, [greedy() for _ in prompts], every=1)
    assert [done[str(i)].outputs[0].token_ids for i in range(5)] == wanted
    stats = engine.core.stats()
    assert stats.graph_steps == stats.steps
    assert_empty(engine)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "llama4", "longcat_flash"])
def test_rows_that_fill_up_a_graph_are_no_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens and prompts, in graphs with more rows than there are tokens."""
    monkeypatch.setattr(graphs, "record", rerun_with_recorder)
    monkeypatch.setattr(graphs, "graph_sizes", lambda most: [4, most])
    monkeypatch.setattr("moetor.engine.replay.graph_sizes", graphs.graph_sizes)
    monkeypatch.setattr(prompt_graphs, "_SIZES", (16, 4096))
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)
    loads = []
    for captured in (False, True):
        engine = make_engine(model, "auto", max_num_batched_tokens=21, record_expert_load=True)
        core = engine.core
        if captured:
            core.runner.graphs.capture()
            core.runner.graphs.capture_prompts(21)
        params = [greedy(number + 2) for number in range(5)]
        run_staggered(engine, prompts, params, every=1)
        stats = core.stats()
        assert (stats.graph_steps > 2) is captured
        loads.append(core.expert_load())
        if name == "longcat_flash":  # some choices are identity experts
            continue
        top_k = model.config.get_text_config().num_experts_per_tok
        tokens = stats.prompt_tokens + stats.generated_tokens - len(prompts)
        assert [sum(counts) for counts in loads[-1].values()] == [tokens * top_k] * len(loads[-1])
    assert loads[0] == loads[1]


def test_what_a_graph_of_prompts_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the prompt's own tokens, drawn tokens, and steps beyond the largest graph."""
    monkeypatch.setattr(graphs, "record", rerun)
    model = make_model("qwen3_moe", 3)
    prompts = random_prompts(model, (11, 30, 9), seed=5)
    params = [
        SamplingParams(max_tokens=5, temperature=0, prompt_logprobs=1, ignore_eos=True),
        SamplingParams(max_tokens=5, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=5, temperature=0, logprobs=2, ignore_eos=True),
    ]
    found = []
    for captured in (False, True):
        engine = make_engine(model)
        if captured:
            monkeypatch.setattr(prompt_graphs, "_SIZES", (16,))
            engine.core.runner.graphs.capture()
            engine.core.runner.graphs.capture_prompts(64)
            engine.core._overlap = True
        done = run_staggered(engine, prompts, params, every=2)
        found.append([done[str(i)].outputs[0].token_ids for i in range(3)])
        assert done["0"].prompt_logprobs is not None
        assert len(done["0"].prompt_logprobs) == 11
    assert found[0] == found[1]


def test_what_the_host_reads_was_copied_before_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading from the device later would wait for the step that was launched meanwhile."""
    model = make_model("qwen3_moe", 3)
    prompts = random_prompts(model, (11, 7, 3), seed=5)
    params = [
        SamplingParams(max_tokens=5, temperature=0, prompt_logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=9, seed=4, top_p=0.9, logprobs=2, ignore_eos=True),
        greedy(7, logprobs=3),
    ]
    found = []
    for emulated in (False, True):
        engine = make_engine(model)
        if emulated:
            engine.core._overlap = True
            for module in (runner, sampler):
                monkeypatch.setattr(module, "to_host", torch.clone)
            fetch = engine.core.runner._fetched

            def spoiling(
                started: Started, parts: Any, sampled: Any, fetch: Any = fetch
            ) -> Launched:
                launched = fetch(started, parts, sampled)
                told = [] if sampled is None else [sampled.logprobs]
                for one in filter(None, [*told, *(found for _, found in started.prompts)]):
                    for tensor in (one.taken_R, one.rank_R, one.top_RN, one.ids_RN):
                        tensor.fill_(1)
                if sampled is not None:
                    sampled.tokens_R.fill_(1)
                return launched

            monkeypatch.setattr(engine.core.runner, "_fetched", spoiling)
        done = run_staggered(engine, prompts, params, every=1)
        outputs = [done[str(i)].outputs[0] for i in range(3)]
        found.append(([(o.token_ids, o.logprobs) for o in outputs], done["0"].prompt_logprobs))
        assert_empty(engine)
    assert found[0] == found[1]


def test_positions_in_a_table_are_the_modules_own() -> None:
    model = make_model("qwen3_moe", 3).bfloat16()
    rotary = model.model.rotary_emb
    places = torch.randint(0, 100, (1, 37))
    hidden = torch.randn(1, 37, 8, dtype=torch.bfloat16)
    wanted = rotary(hidden, places)
    tables = RotaryTables(model, 100)
    assert len(tables) == 1
    calls = []
    with tables.used():
        rotary.register_forward_pre_hook(lambda *_: calls.append("module"))
        found = rotary(hidden, position_ids=places)
        wide = rotary(hidden.float(), places)  # of another dtype than the table
        with pytest.raises(IndexError):
            rotary(hidden, places + 100)
    assert len(calls) == 3
    assert all(map(torch.equal, found, wanted))
    assert wide[0].dtype == torch.float32
    assert all(map(torch.equal, wide, rotary(hidden.float(), places)))
    assert "forward" not in vars(rotary)


@pytest.mark.parametrize("change", ["type", "keyword", "size", "history"])
def test_what_is_no_function_of_the_position_has_no_table(change: str) -> None:
    model = make_model("qwen3_moe", 3)
    rotary = model.model.rotary_emb
    own = type(rotary)
    if change == "type":
        rotary.rope_type = "dynamic"
    elif change == "keyword":

        class Layered(own):  # type: ignore[misc, valid-type]
            def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> Any:
                return super().forward(x, position_ids)

        rotary.__class__ = Layered
    elif change == "history":

        class Scaled(own):  # type: ignore[misc, valid-type]
            def forward(self, x: Tensor, position_ids: Tensor) -> Any:
                return super().forward(x, position_ids * position_ids.shape[1])

        rotary.__class__ = Scaled
    positions = 2**22 if change == "size" else 64
    assert len(RotaryTables(model, positions)) == 0
