"""The engine over a model with experts in host memory, with a CPU in the GPU's place; and what it
foresees of a GPU's memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import moetor
from engine.engine_cases import (
    assert_empty,
    greedy,
    make_model,
    own_tokens,
    random_prompts,
    run_staggered,
)
from engine.test_engine_graphs import rerun
from moetor.engine import EngineConfig, ModelSource, build_engine, graphs
from moetor.engine.memory import step_reserve
from moetor.engine.model import ServedModel
from moetor.engine.reserve import predict_reserve, settle_offload, token_bytes
from moetor.engine.trial import choose_strategy
from moetor.errors import ConfigError
from moetor.huggingface.offloading import offload_of
from moetor.kernels.base import KernelQuery
from moetor.kernels.native.kernel import NativeKernel
from moetor.offload_config import OffloadConfig


def _native_refuses() -> bool:
    form = moetor.ExpertsConfig(num_experts=2, hidden_size=4, intermediate_size=4)
    query = KernelQuery(device="cpu", dtype=torch.float32, experts=form, top_k=1)
    return NativeKernel().refusal(query) is not None


needs_native = pytest.mark.skipif(_native_refuses(), reason="needs the native kernel")
BESIDE_CPU = OffloadConfig(cpu_experts=1, accelerator="cpu", cache_experts=2)


@needs_native
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_tokens_are_those_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "record", rerun)
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 30, 1), seed=5)
    wanted = [own_tokens(name, model, prompt) for prompt in prompts]
    engine = build_engine(
        ModelSource(model=model, cpu_experts=replace(BESIDE_CPU, stream_min_tokens=3)),
        EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_blocks=64),
    )
    group, runner = offload_of(model), engine.core.runner
    assert group is not None
    assert runner.graphs.sizes == [1, 2]  # larger steps copy experts
    runner.graphs.capture()
    steps = count_steps(group, monkeypatch)
    done = run_staggered(engine, prompts, [greedy()] * 3, every=1)
    assert [done[str(i)].outputs[0].token_ids for i in range(3)] == wanted
    stats = engine.core.stats()
    assert 0 < stats.graph_steps < stats.steps
    assert len(steps) >= stats.steps  # a step before each replay, and one of each eager call
    assert group.hot.choices > 0
    assert_empty(engine)


def count_steps(group: Any, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    steps: list[None] = []
    own = group.step

    def step() -> None:
        steps.append(None)
        own()

    monkeypatch.setattr(group, "step", step)
    return steps


@needs_native
def test_llm_takes_it() -> None:
    with pytest.raises(ConfigError, match="the model is on cpu"):
        moetor.LLM("demo", device="cpu", cpu_experts=1)
    llm = moetor.LLM("demo", device="cpu", cpu_experts=BESIDE_CPU, max_num_seqs=2)
    plain = moetor.LLM("demo", device="cpu", max_num_seqs=2)
    params = moetor.SamplingParams(temperature=0, max_tokens=8)
    texts = [one.generate("Now is the", params)[0].outputs[0].text for one in (llm, plain)]
    assert texts[0] == texts[1]
    with pytest.raises(ConfigError, match="not fused with level 'none'"):
        moetor.LLM("demo", device="cpu", level="none", cpu_experts=BESIDE_CPU)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4", "qwen3_next"])
def test_no_more_is_cached_than_foreseen(name: str) -> None:
    model = make_model(name, 3)
    served = ServedModel(model)
    shapes = choose_strategy(served).shapes
    found = sum(shape.token_bytes for shape in shapes.values())
    foreseen = token_bytes(served.config, torch.float32)
    assert found <= foreseen
    if name in ("qwen3_moe", "gpt_oss", "deepseek_v3"):
        assert found == foreseen


def test_room_for_one_sequence_at_least_and_for_all_at_most() -> None:
    config = make_model("qwen3_moe", 3).config
    engine = EngineConfig(max_num_seqs=3, max_model_len=100, max_num_batched_tokens=8)
    each = token_bytes(config, torch.float32)
    assert predict_reserve(engine, config, torch.float32, None).tokens == 112
    assert predict_reserve(engine, config, torch.float32, 2000 * each).tokens == 200
    most = predict_reserve(engine, config, torch.float32, 10**6 * each)
    assert most.tokens == 336
    assert most.nbytes >= 336 * each + step_reserve(engine, config.vocab_size)
    fixed = replace(engine, kv_cache_blocks=9)
    assert predict_reserve(fixed, config, torch.float32, None).tokens == 144


def test_what_was_said_is_kept() -> None:
    config = make_model("qwen3_moe", 3).config
    asked = OffloadConfig(cpu_experts=1, gpu_memory=5 * 10**9, reserve=7)
    engine, cpu = EngineConfig(), torch.device("cpu")
    assert settle_offload(asked, engine, config, torch.float32, cpu) == asked
    assert settle_offload(None, engine, config, torch.float32, cpu) is None
    settled = settle_offload("auto", engine, config, torch.float32, cpu)
    assert settled is not None
    assert settled.reserve == predict_reserve(engine, config, torch.float32, None).nbytes
