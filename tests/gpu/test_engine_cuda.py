"""The engine on a GPU: tokens of `generate`, with CUDA graphs and without."""

from __future__ import annotations

import pytest
import torch

from engine.engine_cases import (
    assert_empty,
    greedy,
    make_engine,
    make_model,
    own_tokens,
    random_prompts,
    run_staggered,
)
from moetor.engine import SamplingParams

# Each engine plans its memory as if it were alone on the GPU.
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4", "deepseek_v3", "qwen3_next"])
def test_tokens_are_those_of_generate(name: str) -> None:
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)
    wanted = [own_tokens(name, model, prompt) for prompt in prompts]
    model = model.cuda()
    for eager in (True, False):
        engine = make_engine(model, "auto", max_num_seqs=5, enforce_eager=eager)
        print(f"\n{name} {engine.strategy} | {engine.without_graphs or 'graphs'}", flush=True)
        done = run_staggered(engine, prompts, [greedy()] * 5, every=1)
        assert [done[str(i)].error for i in range(5)] == [None] * 5
        found = [done[str(i)].outputs[0].token_ids for i in range(5)]
        same = sum(a == b for a, b in zip(found, wanted, strict=True))
        assert found == wanted, (same, engine.strategy, engine.without_graphs)
        assert_empty(engine)


def test_a_step_waits_for_nothing_but_its_tokens() -> None:
    """The one wait is an event's, which the debug mode does not see."""
    model = make_model("qwen3_moe", 3).cuda()
    prompts = random_prompts(model, (11, 37, 1, 24), seed=5)
    params = [
        greedy(),
        SamplingParams(max_tokens=8, seed=4, top_p=0.9, top_k=20, ignore_eos=True),
        greedy(logprobs=3, prompt_logprobs=2),
        SamplingParams(max_tokens=5, seed=4, frequency_penalty=0.7, ignore_eos=True),
    ]
    engine = make_engine(model, "auto", max_num_seqs=4)
    run_staggered(engine, prompts, params, every=1)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = run_staggered(engine, prompts, params, every=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [done[str(i)].error for i in range(4)] == [None] * 4
    assert_empty(engine)
