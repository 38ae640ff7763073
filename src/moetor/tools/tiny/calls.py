"""Calling a tiny model of any family: its inputs, its logits, its greedy tokens.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetor.tools.tiny.models import family_of

SEQUENCE = 19
NEW_TOKENS = 8
# Ids from here on: clear of padding, begin and end.
_FIRST_ID = 3
# Placeholders of images, video and audio take the last ids of the vocabulary.
_RESERVED = 8


def tiny_inputs(name: str, model: Any, seed: int = 0) -> dict[str, Tensor]:
    """What a forward of the family's model needs when there is only text (or, for a family without
    text, a picture).

    Args:
        name: of the family.
        model: as `tiny_model` gave it.
        seed: of the inputs.
    """
    call = family_of(name).call
    rng = torch.Generator().manual_seed(seed + 1)
    if call == "image":
        height, width = model.config.image_size
        parameter = next(model.parameters())
        pixels = torch.randn((2, 3, height, width), generator=rng).to(parameter.dtype)
        return {"pixel_values": pixels, "dataset_index": torch.tensor([1, 3])}
    inputs = {"input_ids": _ids(model, SEQUENCE, rng)}
    if call in ("encoder_decoder", "diffusion"):
        length = model.config.canvas_length if call == "diffusion" else SEQUENCE // 2
        inputs["decoder_input_ids"] = _ids(model, length, rng)
    if call == "modalities":
        # as if every third token came from a picture: these take the second bank of experts
        inputs["moe_mm_token_type_ids"] = (torch.arange(SEQUENCE) % 3 == 0).int().expand(2, -1)
    return inputs


@torch.no_grad()
def logits_of(name: str, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The family's main output in float32: logits [B, S, V], or feature maps where it has none."""
    call = family_of(name).call
    if call == "image":
        return torch.as_tensor(model(**inputs).feature_maps[0]).float()
    if call == "omni":
        return torch.cat([part(**given).logits for part, given in _omni_calls(model, inputs)], 1)
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def generate_of(name: str, model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """Greedy token ids, or None where the family has no greedy `generate`."""
    if not family_of(name).generates:
        return None
    speaker = model.thinker if family_of(name).call == "omni" else model
    kept = {key: value for key, value in inputs.items() if key == "input_ids"}
    ids: Tensor = speaker.generate(
        **kept,
        attention_mask=torch.ones_like(kept["input_ids"]),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    return ids


def _omni_calls(model: Any, inputs: dict[str, Tensor]) -> list[tuple[Any, dict[str, Any]]]:
    """The thinker on the text, and the talker on embedded codes at the same positions."""
    embeds = model.talker.get_input_embeddings()(inputs["input_ids"])
    positions = torch.arange(embeds.shape[1]).expand(3, embeds.shape[0], -1)
    return [
        (model.thinker, {**inputs, "use_cache": False}),
        (model.talker, {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}),
    ]


def _ids(model: Any, length: int, rng: torch.Generator) -> Tensor:
    high = model.config.get_text_config().vocab_size - _RESERVED
    return torch.randint(_FIRST_ID, high, (2, length), generator=rng)
