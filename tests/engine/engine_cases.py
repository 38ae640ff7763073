"""Engines over tiny models, driven step by step, and what the model's own `generate` gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import torch

from moetor.engine import EngineConfig, ModelSource, RequestOutput, SamplingParams, build_engine
from moetor.engine.build import Engine
from moetor.tools.tiny import family_of, tiny_model

NEW = 8
_FIRST, _RESERVED = 3, 8


def make_engine(model: Any, level: Literal["auto", "none"] = "none", **settings: Any) -> Engine:
    """An engine over a live model, which is left unfused unless `level` says otherwise."""
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_blocks": 64}
    config = EngineConfig(**{**defaults, **settings})
    return build_engine(ModelSource(model=model, level=level), config)


def random_prompts(model: Any, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Token ids clear of special ones; the second half begins like the first prompt."""
    rng = random.Random(seed)
    high = model.config.get_text_config().vocab_size - _RESERVED
    prompts = [[rng.randrange(_FIRST, high) for _ in range(length)] for length in lengths]
    for prompt in prompts[len(prompts) // 2 :]:
        shared = min(len(prompt), len(prompts[0])) * 3 // 4
        prompt[:shared] = prompts[0][:shared]
    return prompts


def own_tokens(name: str, model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    """Greedy tokens of the model's own `generate`, alone in its batch."""
    speaker = model.thinker if family_of(name).call == "omni" else model
    if name == "llama4":  # its composite cannot generate from text alone in every release
        speaker = model.language_model
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = speaker.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )
    # an encoder-decoder's text begins with its start token instead of the prompt
    first = 1 if speaker.config.is_encoder_decoder else len(prompt)
    return out[0, first:].tolist()


def greedy(new: int = NEW, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, min_tokens=new, **more)


def run_staggered(
    engine: Engine, prompts: Sequence[Any], params: Sequence[SamplingParams], every: int = 2
) -> dict[str, RequestOutput]:
    """Adds a request every few steps and runs until all have finished."""
    waiting = [
        engine.intake.request(prompt, one, str(index))
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    done: dict[str, RequestOutput] = {}
    steps = 0
    while waiting or not engine.core.idle:
        if waiting and steps % every == 0:
            engine.core.add(waiting.pop(0))
        for request in engine.core.step():
            if request.finished:
                done[request.request_id] = engine.core.output(request)
        steps += 1
        assert steps < 2000, "the engine makes no progress"
    return done


def assert_empty(engine: Engine) -> None:
    """Nothing of any request is left."""
    stats = engine.core.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.rows_used) == (0, 0, 0, 0)
    assert not engine.core.requests
    assert not engine.core.runner.sampler._holders
    blocks = engine.core.scheduler.blocks
    assert blocks.available == blocks.total
    assert not any(blocks._references)


def make_model(name: str, seed: int) -> Any:
    return tiny_model(name, seed=seed)
