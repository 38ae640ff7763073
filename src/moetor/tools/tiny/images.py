"""Pictures for tiny models, as a processor would hand them over: pixel tensors, and places for
their features among the tokens.

Shape letters: B batch, S sequence, P patches of all pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moetor.tools.tiny.calls import tiny_inputs

# Every picture becomes this many features, which stand in each sequence from this place on.
FEATURES = 4
_FIRST = 5
# Pictures of 16 x 16 pixels in patches of 4 x 4, of which 2 x 2 make one feature.
_PICTURES, _SIDE, _PATCH = 2, 16, 4
_PATCHES = (_SIDE // _PATCH) ** 2

Pixels = Callable[[torch.Generator], dict[str, Tensor]]


def _whole(rng: torch.Generator) -> dict[str, Tensor]:
    """Pictures as they are."""
    return {"pixel_values": torch.randn((_PICTURES, 3, _SIDE, _SIDE), generator=rng)}


def _grid(*patch: int) -> Pixels:
    """Patches of this shape of all pictures in one tensor [P, ...], with each picture's grid."""

    def make(rng: torch.Generator) -> dict[str, Tensor]:
        side = _SIDE // _PATCH
        grid = torch.tensor([[1, side, side]]).expand(_PICTURES, -1)
        pixels = torch.randn((_PICTURES * _PATCHES, *patch), generator=rng)
        return {"pixel_values": pixels, "image_grid_thw": grid}

    return make


def _positions(rng: torch.Generator) -> dict[str, Tensor]:
    """Patches of each picture with their places; 3 x 3 of them make one feature (Gemma 4)."""
    side = 6
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
    pixels = torch.rand((_PICTURES, side * side, 3 * _PATCH**2), generator=rng)
    return {
        "pixel_values": pixels,
        "image_position_ids": places.reshape(1, -1, 2).expand(_PICTURES, -1, -1),
    }


IMAGES: Mapping[str, Pixels] = {
    "aria": _whole,
    "ernie4_5_vl_moe": _grid(3 * _PATCH**2),
    "gemma4": _positions,
    "glm4v_moe": _grid(3 * 2 * _PATCH**2),
    "kimi_k25": _grid(3, _PATCH, _PATCH),
    "llama4": _whole,
    "qwen3_vl_moe": _grid(3 * 2 * _PATCH**2),
}
# Families whose positions or attention depend on which tokens are a picture's.
_TYPED = ("ernie4_5_vl_moe", "gemma4", "glm4v_moe", "qwen3_vl_moe")


def tiny_image_inputs(name: str, model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Two sequences with a picture each, for a family in `IMAGES`."""
    inputs = tiny_inputs(name, model, seed)
    ids_BS = inputs["input_ids"].clone()
    ids_BS[:, _FIRST : _FIRST + FEATURES] = model.config.image_token_id
    is_image = (ids_BS == model.config.image_token_id).int()
    pixels = IMAGES[name](torch.Generator().manual_seed(seed + 2))
    dtype = next(model.parameters()).dtype
    pixels["pixel_values"] = pixels["pixel_values"].to(dtype)
    types = {"mm_token_type_ids": is_image} if name in _TYPED else {}
    if "moe_mm_token_type_ids" in inputs:
        types["moe_mm_token_type_ids"] = is_image
    return {**inputs, "input_ids": ids_BS, **types, **pixels}
