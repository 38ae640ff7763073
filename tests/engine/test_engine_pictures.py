"""Prompts with pictures, beside prompts of text, against the model's own `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
from moetor.tools.tiny import tiny_model


def picture_model(name: str) -> Any:
    if name != "llama4":
        return make_model(name, 3)
    # the width of its shuffled pixels
    vision = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return tiny_model(
        name, seed=3, settings={"vision_config": {**vision, "intermediate_size": 128}}
    )


def picture_prompt(name: str, model: Any, text: list[int], seed: int) -> dict[str, Any]:
    """Text, a picture of random pixels, text."""
    generator = torch.Generator().manual_seed(seed)
    config, vision = model.config, model.config.vision_config
    inputs: dict[str, Tensor] = {}
    count = 4
    match name:
        case "qwen3_vl_moe":
            patch = 3 * vision.temporal_patch_size * vision.patch_size**2
            inputs["pixel_values"] = torch.randn(16, patch, generator=generator)
            inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        case "llama4":
            size = (1, 3, vision.image_size, vision.image_size)
            inputs["pixel_values"] = torch.randn(size, generator=generator)
            sides = vision.image_size // vision.patch_size
            count = int(sides**2 * vision.pixel_shuffle_ratio**2)
        case "gemma4":
            side = 2 * vision.pooling_kernel_size
            patch = 3 * vision.patch_size**2
            inputs["pixel_values"] = torch.rand(1, side * side, patch, generator=generator)
            steps = torch.arange(side)
            grid = torch.meshgrid(steps, steps, indexing="xy")
            inputs["image_position_ids"] = torch.stack(grid, -1).reshape(1, -1, 2)
    token = config.image_token_id
    ids = [*text[:3], *[token] * count, *text[3:]]
    if name != "llama4":
        inputs["mm_token_type_ids"] = torch.tensor([[int(one == token) for one in ids]])
    return {"prompt_token_ids": ids, "inputs": inputs}


def own_text(model: Any, prompt: dict[str, Any]) -> list[int]:
    ids = torch.tensor([prompt["prompt_token_ids"]])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **prompt["inputs"],
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            pad_token_id=0,
        )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llama4", "gemma4"])
def test_pictures_beside_text(name: str) -> None:
    model = picture_model(name)
    texts = random_prompts(model, (9, 14, 21), seed=7)
    pictures = [picture_prompt(name, model, texts[i], seed=i) for i in range(2)]
    other = {**pictures[0], "inputs": pictures[0]["inputs"] | {}}
    other["inputs"]["pixel_values"] = pictures[0]["inputs"]["pixel_values"] * -2 + 1
    prompts = [pictures[0], texts[2], pictures[1], other]
    wanted = [
        own_tokens(name, model, one) if isinstance(one, list) else own_text(model, one)
        for one in prompts
    ]
    if name == "llama4":  # loaded from a folder, it has none of the hooks that a tiny model has
        model.language_model._forward_hooks.clear()
    for settings in ({}, {"max_num_seqs": 4, "max_num_batched_tokens": 6, "kv_cache_blocks": 12,
                          "block_size": 4, "max_model_len": 45}):  # fmt: skip
        engine = make_engine(model, **settings)
        for _ in range(2):  # nothing of a picture may be found again by its tokens alone
            done = run_staggered(engine, prompts, [greedy()] * 4, every=1)
            assert [done[str(i)].error for i in range(4)] == [None] * 4
            assert [done[str(i)].outputs[0].token_ids for i in range(4)] == wanted
            assert_empty(engine)


def test_pictures_are_refused_where_there_is_no_eye_for_them() -> None:
    engine = make_engine(make_model("nllb_moe", 3))
    prompt = {"prompt_token_ids": [5, 6], "inputs": {"pixel_values": torch.zeros(1)}}
    with pytest.raises(ValueError, match="text alone"):
        engine.intake.request(prompt, greedy(), "0")
