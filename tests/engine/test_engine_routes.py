"""Which experts a sequence's tokens went to, against the fused model called on the whole text."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch

from engine.engine_cases import (
    assert_empty,
    greedy,
    make_engine,
    make_model,
    random_prompts,
    run_staggered,
)
from engine.test_engine_graphs import rerun_with_recorder
from moetor import AsyncEngine, record_routing
from moetor.engine import EngineConfig, graphs
from moetor.errors import ConfigError, InputError

SETTINGS: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": 8},
    "preempted": {
        "kv_cache_blocks": 6,
        "block_size": 8,
        "max_model_len": 48,
        "record_expert_load": True,
    },
    "no_prefix_cache": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_ids_are_those_of_the_whole_text(
    name: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "record", rerun_with_recorder)
    model = make_model("qwen3_moe", 3)
    engine = make_engine(model, "auto", enable_return_routed_experts=True, **SETTINGS[name])
    if captured:
        engine.core.runner.graphs.capture()
        engine.core._overlap = True
    prompts = random_prompts(model, (11, 37, 1, 24, 13), seed=5)
    done = run_staggered(engine, prompts, [greedy() for _ in prompts], every=1)
    assert (engine.core.stats().preemptions > 0) is (name == "preempted")
    for number, prompt in enumerate(prompts):
        one = done[str(number)].outputs[0]
        with torch.no_grad(), record_routing(model) as record:
            model(torch.tensor([prompt + one.token_ids[:-1]]))
        assert one.routed_experts.dtype == np.int32
        assert one.routed_experts.shape == tuple(record.ids.shape)
        assert np.array_equal(np.sort(one.routed_experts), np.sort(record.ids.numpy()))
    assert_empty(engine)


def test_without_it_there_are_none() -> None:
    model = make_model("qwen3_moe", 3)
    engine = make_engine(model, "auto")
    done = run_staggered(engine, random_prompts(model, (5,), seed=1), [greedy()])
    assert done["0"].outputs[0].routed_experts is None


def test_where_it_cannot_be_done_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache of its own"):
        make_engine(make_model("deepseek_v32", 3), "auto", enable_return_routed_experts=True)
    with pytest.raises(ConfigError, match="fused"):
        make_engine(make_model("qwen3_moe", 3), "none", enable_return_routed_experts=True)
    model = make_model("qwen3_moe", 3)
    engine = make_engine(model, "auto", enable_return_routed_experts=True)
    with pytest.raises(InputError, match="pixel_values"):
        engine.intake.request(
            {"prompt_token_ids": [5], "inputs": {"pixel_values": torch.ones(1)}}, greedy(), "0"
        )


def test_the_server_tells_them() -> None:
    from moetor.server import ServerConfig, create_app

    config = EngineConfig(kv_cache_blocks=64, max_num_seqs=4, enable_return_routed_experts=True)
    engine = AsyncEngine.from_model("demo", config=config)
    app = create_app(engine, ServerConfig(), "demo")

    async def work() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            body = {"prompt": [[5, 6, 7], [8]], "max_tokens": 4, "n": 2, "ignore_eos": True}
            told = (await http.post("/v1/completions", json=body)).json()
            for choice, prompt in zip(told["choices"], (3, 3, 1, 1), strict=True):
                ids = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
                assert ids.shape[0] == prompt + 3
                assert len(set(ids[0, 0])) == ids.shape[2]
            message = {"role": "user", "content": "x"}
            body = {"messages": [message], "max_tokens": 2, "ignore_eos": True}
            told = (await http.post("/v1/chat/completions", json=body)).json()
            assert told["choices"][0]["routed_experts"]

    try:
        asyncio.run(work())
    finally:
        asyncio.run(engine.shutdown())
