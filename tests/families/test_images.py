"""Pictures through the path without a processor: pixel tensors, fused and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

import moetor
from moetor.errors import UnsupportedError
from moetor.huggingface.trial import relative_error
from moetor.tools.sweep import typical_error
from moetor.tools.tiny import logits_of, tiny_model
from moetor.tools.tiny.images import FEATURES, IMAGES, tiny_image_inputs

families = pytest.mark.parametrize("name", list(IMAGES))
OLDER = Version(transformers.__version__) < Version("5.23")
pytestmark = pytest.mark.skipif(OLDER, reason="pixel arguments of a newer Transformers")


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    try:
        return tiny_model(name, dtype)
    except UnsupportedError as missing:
        pytest.skip(str(missing))


@families
def test_the_picture_matters(name: str) -> None:
    model = model_of(name)
    inputs = tiny_image_inputs(name, model)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2 * FEATURES
    logits = logits_of(name, model, inputs)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    assert relative_error(logits_of(name, model, other), logits) > 0.01


@families
def test_fused_logits_with_pictures(name: str) -> None:
    model = model_of(name)
    inputs = tiny_image_inputs(name, model)
    before = logits_of(name, model, inputs)
    report = moetor.fuse(model)
    assert {block.level for block in report.blocks} == {"block"}
    assert relative_error(logits_of(name, model, inputs), before) <= 1e-5


@families
def test_bfloat16_with_pictures(name: str) -> None:
    rounded, exact = model_of(name, torch.bfloat16), model_of(name)
    exact.load_state_dict(rounded.state_dict())
    target = logits_of(name, exact, tiny_image_inputs(name, exact))
    inputs = tiny_image_inputs(name, rounded)
    original = logits_of(name, rounded, inputs)
    moetor.fuse(rounded)
    fused = logits_of(name, rounded, inputs)
    assert typical_error(fused, target) <= 1.5 * typical_error(original, target)


def embedded(model: Any) -> dict[str, Tensor]:
    """Embeddings and positions of three axes, whose last dimension is the sequence."""
    rng = torch.Generator().manual_seed(4)
    positions = torch.stack([torch.arange(12), torch.arange(12) // 3, torch.arange(12) % 4])
    return {
        "inputs_embeds": torch.randn((2, 12, 64), generator=rng),
        "position_ids": positions[:, None].expand(-1, 2, -1),
    }


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_mrope_positions_and_embeddings_compile(name: str) -> None:
    """One graph for the whole fused language model, with the numbers of the original."""
    torch._dynamo.reset()
    model = model_of(name).model.language_model
    given = embedded(model)
    with torch.no_grad():
        before = model(**given, use_cache=False).last_hidden_state
        flat = {**given, "position_ids": torch.arange(12).expand(3, 2, -1)}
        assert relative_error(model(**flat, use_cache=False).last_hidden_state, before) > 0.01
        moetor.fuse(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        after = compiled(**given, use_cache=False).last_hidden_state
    assert relative_error(after, before) <= 1e-5
