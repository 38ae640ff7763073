"""A checkpoint's folder with a processor, as it comes from elsewhere: what `moetor serve` says of a
picture is what Transformers says with the same folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from moetor.huggingface.composites import images_named
from moetor.huggingface.loading import load_tokenizer
from moetor.tools.tiny import tiny_model
from server.server_process import ServerProcess
from server.test_server_images import data_url, message, picture

NEW = 10
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}PICTURE{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(mark: str, **special: str) -> Any:
    """The demo model's, with a family's marks.

    Args:
        mark: what stands in a text for a picture.
        special: attributes of the tokenizer, and their tokens.
    """
    base = load_tokenizer("demo")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        extra_special_tokens=special,
        chat_template=TEMPLATE.replace("PICTURE", mark),
        pad_token=base.convert_ids_to_tokens(0),
    )
    return tokenizer


def aria() -> tuple[Any, Any]:
    from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
    from transformers.models.aria.processing_aria import AriaProcessor

    tokenizer = make_tokenizer("<|img|>", image_token="<|img|>")
    # its own size; 7 x 7 patches make the 256 features that it counts with
    pixels = AriaImageProcessorPil(max_image_size=980)
    settings = {
        "image_token_id": tokenizer.image_token_id,
        "text_config": {"vocab_size": len(tokenizer) + 8, "max_position_embeddings": 512},
        "vision_config": {"model_type": "idefics3_vision", "image_size": 980, "patch_size": 140},
        "projector_patch_to_query_dict": {49: 256},
    }
    model = tiny_model("aria", seed=3, settings=settings)
    return model, AriaProcessor(pixels, tokenizer, chat_template=tokenizer.chat_template)


def qwen3_vl_moe() -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = make_tokenizer(
        "<|vision_start|><|image_pad|><|vision_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    size = {"shortest_edge": 64, "longest_edge": 1024}
    pixels = Qwen2VLImageProcessor(**sizes, size=size)
    settings = {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
        "text_config": {"vocab_size": len(tokenizer) + 8},
    }
    model = tiny_model("qwen3_vl_moe", seed=3, settings=settings)
    processor = Qwen3VLProcessor(
        pixels, tokenizer, Qwen3VLVideoProcessor(**sizes), chat_template=tokenizer.chat_template
    )
    return model, processor


def llama4() -> tuple[Any, Any]:
    from transformers import Llama4ImageProcessor, Llama4Processor

    # features stand in the places of patches, in tiles and in the whole picture behind them
    tokenizer = make_tokenizer(
        "<|image|>",
        image_token="<|image|>",
        patch_token="<|patch|>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        tile_x_separator_token="<|tile_x_separator|>",
        tile_y_separator_token="<|tile_y_separator|>",
    )
    settings = {
        "image_token_id": tokenizer.patch_token_id,
        "text_config": {"vocab_size": len(tokenizer) + 8},
    }
    model = tiny_model("llama4", seed=3, settings=settings)
    vision = model.config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    processor = Llama4Processor(
        Llama4ImageProcessor(size=side, max_patches=4),
        tokenizer,
        patch_size=vision.patch_size,
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def gemma4() -> tuple[Any, Any]:
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    tokenizer = make_tokenizer(
        "<|image|>",
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
        video_token="<|video|>",
    )
    size = len(tokenizer) + 8
    settings = {
        "image_token_id": tokenizer.image_token_id,
        "audio_token_id": tokenizer.audio_token_id,
        "video_token_id": tokenizer.video_token_id,
        # a tied head would say the last token again, whatever the picture
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": size,
            "vocab_size_per_layer_input": size,
            "tie_word_embeddings": False,
        },
    }
    model = tiny_model("gemma4", seed=3, settings=settings)
    vision = model.config.vision_config
    sizes = {
        "patch_size": vision.patch_size,
        "pooling_kernel_size": vision.pooling_kernel_size,
        "max_soft_tokens": 70,
    }
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(**sizes),
        tokenizer,
        Gemma4VideoProcessor(**sizes),
        chat_template=tokenizer.chat_template,
    )
    return model, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "aria": aria,
    "gemma4": gemma4,
    "llama4": llama4,
    "qwen3_vl_moe": qwen3_vl_moe,
}


def runs_torchvision() -> bool:
    """Whether it is here and fits torch: a build for GPUs beside a torch for CPUs does not."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_with_a_processor(name: str, tmp_path: Path) -> None:
    if name != "aria" and not runs_torchvision():
        pytest.skip("this family's processor needs torchvision, of a build that fits torch")
    model, processor = FAMILIES[name]()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures = [picture(seed, size) for seed, size in ((1, (24, 16)), (2, (24, 16)), (3, (9, 40)))]
    wanted = own_answers(tmp_path, [image for image, _ in pictures])
    apart = max(abs(a - b) for a, b in zip(wanted[0][1], wanted[1][1], strict=True))
    assert apart > 5e-3, "the picture does not matter"

    server = ServerProcess(str(tmp_path), "--dtype", "float32", "--kv-cache-blocks", "128")
    body = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": True}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for (_, data), (text, logprobs) in zip(pictures, wanted, strict=True):
            asked = {**body, "messages": message(data_url(data))}
            answer = client.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            assert choice["message"]["content"] == text
            told = [one["logprob"] for one in choice["logprobs"]["content"]]
            assert told == pytest.approx(logprobs, abs=1e-3)
    assert server.stop() == 0


def own_answers(folder: Path, images: list[Any]) -> list[tuple[str, list[float]]]:
    """What Transformers alone makes of the folder and each picture: a text, and the logarithms of
    its tokens' probabilities.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    images_named(model)
    processor = AutoProcessor.from_pretrained(folder)
    made = []
    for image in images:
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.dtype)  # Llama 4's processor makes bfloat16
        with torch.no_grad():
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=NEW,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert len(ids) == NEW
        rows = torch.stack([step[0] for step in out.logits]).log_softmax(-1)
        logprobs = [float(row[token]) for row, token in zip(rows, ids, strict=True)]
        made.append((processor.tokenizer.decode(ids, skip_special_tokens=True), logprobs))
    return made
