"""Greedy tokens of every family against the model's own `generate`, token for token."""

from __future__ import annotations

import pytest

from engine.engine_cases import (
    NEW,
    assert_empty,
    greedy,
    make_engine,
    make_model,
    own_tokens,
    random_prompts,
    run_staggered,
)
from moetor.tools.tiny import FAMILIES

SERVED = [name for name, family in FAMILIES.items() if family.generates]
# Small enough that prompts come in many chunks and sequences are preempted.
TIGHT = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 5,
    "block_size": 4,
    "kv_cache_blocks": 18,
    "max_model_len": 60,
}


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    model = make_model(name, 3)
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)
    wanted = {str(i): own_tokens(name, model, prompt) for i, prompt in enumerate(prompts)}
    for settings in ({}, TIGHT, {**TIGHT, "enable_prefix_caching": False}):
        engine = make_engine(model, **settings)
        if "enable_prefix_caching" in settings and not engine.strategy.prefix_caching:
            break  # the same once more
        done = run_staggered(engine, prompts, [greedy()] * len(prompts), every=3)
        got = {key: output.outputs[0].token_ids for key, output in done.items()}
        assert [output.error for output in done.values()] == [None] * len(prompts)
        assert got == wanted, (engine.strategy, settings)
        if settings and engine.strategy.chunked_prefill:
            assert engine.core.stats().preemptions > 0
        assert_empty(engine)
    assert len(wanted["0"]) == NEW
