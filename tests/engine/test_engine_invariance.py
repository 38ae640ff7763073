"""`batch_invariant`: a request's tokens and log-probabilities have the same bits alone, and among
others that come and go, in chunks of prompts, with shared beginnings and after preemption.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import moetor
from engine.engine_cases import assert_empty, make_engine, random_prompts
from moetor.config import RunnerConfig
from moetor.engine import EngineConfig, ModelSource, RequestOutput, SamplingParams, build_engine
from moetor.engine.build import Engine
from moetor.errors import ConfigError, InputError, UnsupportedError
from moetor.kernels.native import dense as native
from moetor.tools.tiny import tiny_model

NEW = 6
LENGTHS = (11, 27, 1, 24, 13, 22, 2, 7, 19, 27, 5, 16)
TIGHT = {
    "max_num_seqs": 5,
    "max_num_batched_tokens": 7,
    "block_size": 4,
    "kv_cache_blocks": 12,
    "max_model_len": 40,
}
DTYPES = (torch.float32, torch.bfloat16)


def asked(count: int) -> list[SamplingParams]:
    """Greedy and seeded, with penalties, limits and log-probabilities of the prompt among them."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 9, "repetition_penalty": 1.2},
        {"temperature": 0, "prompt_logprobs": 2},
        {"temperature": 1.0, "min_p": 0.02, "presence_penalty": 0.5},
    ]
    return [
        SamplingParams(
            max_tokens=NEW, ignore_eos=True, seed=i, logprobs=i % 4, **kinds[i % len(kinds)]
        )
        for i in range(count)
    ]


def told(output: RequestOutput) -> tuple[Any, ...]:
    """All numbers of an answer."""
    assert output.error is None
    answer = output.outputs[0]
    assert len(answer.token_ids) == NEW
    return answer.token_ids, answer.logprobs, output.prompt_logprobs


def run_at_random(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], seed: int
) -> list[tuple[Any, ...]]:
    """Requests come at random steps, in a random order."""
    rng = random.Random(seed)
    requests = [
        engine.intake.request(prompt, one, str(index))
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    rng.shuffle(requests)
    done: dict[str, tuple[Any, ...]] = {}
    while requests or not engine.core.idle:
        if requests and (engine.core.idle or rng.random() < 0.7):
            engine.core.add(requests.pop())
        for request in engine.core.step():
            if request.finished:
                done[request.request_id] = told(engine.core.output(request))
    assert_empty(engine)
    return [done[str(index)] for index in range(len(prompts))]


def run_alone(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[tuple[Any, ...]]:
    """One request after the other, each prompt in one piece."""
    both = zip(prompts, params, strict=True)
    return [run_at_random(engine, [prompt], [one], 0)[0] for prompt, one in both]


CASES = [
    *((name, dtype, True) for name in ("qwen3_moe", "gpt_oss", "gemma4") for dtype in DTYPES),
    ("deepseek_v3", torch.bfloat16, True),
    ("qwen3_moe", torch.bfloat16, False),
    ("deepseek_v3", torch.float32, False),
]


@pytest.mark.parametrize(("name", "dtype", "library"), CASES)
def test_bits_are_the_same_alone_and_together(
    name: str, dtype: torch.dtype, library: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as if there were no native library."""
    if not library:
        monkeypatch.setattr(native, "available", lambda: False)
    model = tiny_model(name, dtype=dtype, seed=3)
    prompts, params = random_prompts(model, LENGTHS, seed=seed), asked(len(LENGTHS))
    options = {"level": "auto", "batch_invariant": True}
    alone = run_alone(make_engine(model, enable_prefix_caching=False, **options), prompts, params)
    caching = random.Random(seed).random() < 0.5
    engine = make_engine(model, **TIGHT, enable_prefix_caching=caching, **options)
    assert run_at_random(engine, prompts, params, seed) == alone
    stats = engine.core.stats()
    assert stats.preemptions > 0
    assert (stats.prefix_hit_tokens > 0) == caching


def demo(dtype: str, **settings: Any) -> Engine:
    return build_engine(ModelSource(model="demo", dtype=dtype), EngineConfig(**settings))


def demo_prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_model_and_what_it_gives_without(dtype: str, seed: int) -> None:
    prompts, params = demo_prompts(seed), asked(len(LENGTHS))
    for invariant in (True, False):
        alone = run_alone(demo(dtype, batch_invariant=invariant), prompts, params)
        engine = demo(dtype, batch_invariant=invariant, **TIGHT)
        together = run_at_random(engine, prompts, params, seed)
        assert engine.core.stats().preemptions > 0
        # Without it logits of one prompt in several blockings are equal by chance alone.
        assert (together == alone) == invariant
    assert any(p.temperature for p in params)


def test_prompt_logprobs_are_whole_after_preemption() -> None:
    model = tiny_model("qwen3_moe", seed=3)
    prompts = random_prompts(model, LENGTHS, seed=1)
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True, prompt_logprobs=0)] * len(prompts)
    engine = make_engine(model, **TIGHT)
    done = [run_at_random(engine, prompts, params, seed) for seed in range(3)]
    assert engine.core.stats().preemptions > 0
    for answers in done:
        assert [len(answer[2]) for answer in answers] == [len(prompt) for prompt in prompts]


def test_what_it_refuses() -> None:
    fused = tiny_model("qwen3_moe", seed=3)
    moetor.fuse(fused)
    with pytest.raises(ConfigError, match="fused without it; call"):
        make_engine(fused, level="auto", batch_invariant=True)
    moetor.unfuse(fused)
    moetor.fuse(fused, runner=RunnerConfig(batch_invariant=True))
    make_engine(fused, level="auto", batch_invariant=True)
    with pytest.raises(UnsupportedError, match="Qwen3NextForCausalLM is paged and states"):
        make_engine(tiny_model("qwen3_next", seed=3), level="auto", batch_invariant=True)
    with pytest.raises(ConfigError, match="cpu_experts cannot be had together"):
        build_engine(ModelSource(model="demo", cpu_experts=1), EngineConfig(batch_invariant=True))


def test_an_engine_for_it_takes_no_pictures() -> None:
    engine = demo("float32", batch_invariant=True)
    prompt = {"prompt_token_ids": [5, 6], "inputs": {"pixel_values": torch.zeros(1)}}
    with pytest.raises(InputError, match="text alone"):
        engine.intake.request(prompt, SamplingParams(), "0")


def test_code_that_mixes_tokens_is_found_out() -> None:
    model = tiny_model("qwen3_moe", seed=3)
    norm = model.model.norm
    norm.forward = lambda hidden: type(norm).forward(norm, hidden) + hidden.amax() * 1e-6
    with pytest.raises(UnsupportedError, match="Qwen3MoeForCausalLM: on random tokens"):
        make_engine(model, level="auto", batch_invariant=True, fuse_dense="off")
