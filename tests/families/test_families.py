"""Every MoE family of Transformers, fused and compared with itself on a tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

import moetor
from moetor.errors import UnsupportedError
from moetor.huggingface.report import FusionReport
from moetor.huggingface.trial import relative_error
from moetor.tools.sweep import typical_error
from moetor.tools.tiny import FAMILIES, generate_of, logits_of, tiny_inputs, tiny_model

# The blocks that `fuse` leaves as they are; all others of every family reach level block, so that a
# family that falls back is noticed.
LEFT = {"doge": 3, "jetmoe": 3, "nllb_moe": 2, "vitpose_backbone": 2}
# No family may be missed: what is counted is what the model holds, not what `fuse` says.
BLOCKS = {
    "deepseek_v4": 4,
    "diffusion_gemma": 4,
    "dots3_note": 4,
    "ernie4_5_vl_moe": 4,
    "gemma4": 2,
    "jetmoe": 6,
    "switch_transformers": 2,
    "qwen3_omni_moe": 4,
}
# In an older Transformers some families keep their experts or their routers in another form.
OLDER = Version(transformers.__version__) < Version("5.23")
GENERATING = [name for name, family in FAMILIES.items() if family.generates]
UNTOUCHED = [name for name in LEFT if name != "jetmoe"]
FLOAT32_ERROR = 1e-5


@dataclass(frozen=True)
class Comparison:
    report: FusionReport
    before: Tensor
    fused: Tensor
    restored: Tensor
    tokens_before: Tensor | None
    tokens_fused: Tensor | None


@cache
def compare(name: str) -> Comparison | str:
    try:
        model = tiny_model(name)
    except UnsupportedError as missing:
        return str(missing)
    inputs = tiny_inputs(name, model)
    try:
        before = logits_of(name, model, inputs)
    except Exception as failure:
        if OLDER:
            return f"its own forward fails in Transformers {transformers.__version__}: {failure}"
        raise
    tokens_before = generate_of(name, model, inputs)
    report = moetor.fuse(model)
    fused = logits_of(name, model, inputs)
    tokens_fused = generate_of(name, model, inputs)
    moetor.unfuse(model)
    restored = logits_of(name, model, inputs)
    return Comparison(report, before, fused, restored, tokens_before, tokens_fused)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    outcome = compare(name)
    if isinstance(outcome, str):
        pytest.skip(outcome)
    return name


def comparison(name: str) -> Comparison:
    outcome = compare(name)
    assert isinstance(outcome, Comparison)
    return outcome


def test_the_model_says_something(family: str) -> None:
    logits = comparison(family).before
    assert torch.isfinite(logits).all()
    assert 0.3 < logits.std() < 30


@pytest.mark.skipif(OLDER, reason="the table is that of a newer Transformers")
def test_level(family: str) -> None:
    blocks = comparison(family).report.blocks
    assert blocks, "no MoE block was found"
    left = LEFT.get(family, 0)
    levels = [block.level for block in blocks]
    assert (levels.count("none"), levels.count("block")) == (left, len(blocks) - left)
    if family in BLOCKS:
        assert len(blocks) == BLOCKS[family]


def test_reason_where_it_is_not_a_block(family: str) -> None:
    for block in comparison(family).report.blocks:
        assert bool(block.reason) == (block.level != "block"), block


def test_fused_logits(family: str) -> None:
    outcome = comparison(family)
    assert relative_error(outcome.fused, outcome.before) <= FLOAT32_ERROR


@pytest.mark.parametrize("family", GENERATING, indirect=True)
def test_greedy_tokens(family: str) -> None:
    outcome = comparison(family)
    assert outcome.tokens_before is not None
    assert outcome.tokens_fused is not None
    assert torch.equal(outcome.tokens_fused, outcome.tokens_before)


def test_unfuse_restores_every_bit(family: str) -> None:
    outcome = comparison(family)
    assert torch.equal(outcome.restored, outcome.before)


@pytest.mark.parametrize("family", UNTOUCHED, indirect=True)
def test_what_is_not_fused_is_left_alone(family: str) -> None:
    outcome = comparison(family)
    assert torch.equal(outcome.fused, outcome.before)


def test_bfloat16(family: str) -> None:
    """The same levels as in float32, and no more error than the model that is not fused has."""
    rounded = tiny_model(family, torch.bfloat16)
    exact = tiny_model(family)
    exact.load_state_dict(rounded.state_dict())
    target = logits_of(family, exact, tiny_inputs(family, exact))
    inputs = tiny_inputs(family, rounded)
    try:
        original = logits_of(family, rounded, inputs)
    except RuntimeError as failure:
        if OLDER:
            pytest.skip(f"its own forward fails in bfloat16: {failure}")
        raise
    report = moetor.fuse(rounded)
    levels = [block.level for block in report.blocks]
    assert levels == [block.level for block in comparison(family).report.blocks]
    fused = logits_of(family, rounded, inputs)
    assert typical_error(fused, target) <= 1.5 * typical_error(original, target)
