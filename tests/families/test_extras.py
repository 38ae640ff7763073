"""What people do with a model besides calling it: casts, copies, autocast, outputs on request."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import moetor
from moetor.errors import UnsupportedError
from moetor.huggingface.trial import relative_error
from moetor.tools.sweep import typical_error
from moetor.tools.tiny import FAMILIES, family_of, logits_of, tiny_inputs, tiny_model

# Forms that differ in where their tensors are: packed, transposed with biases, a selection bias on
# router or block, identity experts, a norm after each expert, flat, split, apart, in their layer.
FORMS = (
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "afmoe",
    "longcat_flash",
    "muse_spark",
    "dbrx",
    "jetmoe",
    "switch_transformers",
    "gemma4",
    "zaya",
)
forms = pytest.mark.parametrize("name", FORMS)


def fused_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    try:
        model = tiny_model(name, dtype)
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    moetor.fuse(model)
    return model


@forms
def test_a_fused_model_is_cast_as_its_original(name: str) -> None:
    model, original = fused_model(name), tiny_model(name)
    inputs = tiny_inputs(name, model)
    before = logits_of(name, model, inputs)
    for cast in (model, original):
        cast.to(torch.float64)
    assert relative_error(logits_of(name, model, inputs), before) <= 1e-4
    for cast in (model, original):
        cast.bfloat16()
    target = before
    theirs = typical_error(logits_of(name, original, inputs), target)
    assert typical_error(logits_of(name, model, inputs), target) <= 1.5 * theirs


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "dbrx"])
def test_half(name: str) -> None:
    model = fused_model(name)
    inputs = tiny_inputs(name, model)
    before = logits_of(name, model, inputs)
    assert typical_error(logits_of(name, model.half(), inputs), before) <= 0.02


@forms
def test_copies_and_pickles_compute_the_same_and_are_separate(name: str) -> None:
    model = fused_model(name)
    inputs = tiny_inputs(name, model)
    fused = logits_of(name, model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(name, twin, inputs), fused)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5)
        assert not torch.equal(logits_of(name, twin, inputs), fused)
        assert torch.equal(logits_of(name, model, inputs), fused)
        assert moetor.unfuse(twin)


@forms
def test_moving_moves_everything(name: str) -> None:
    model = fused_model(name).to("meta")
    left = [
        name for name, t in (*model.named_parameters(), *model.named_buffers()) if not t.is_meta
    ]
    assert not left


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "zaya"])
def test_autocast(name: str) -> None:
    """As the original under autocast, which computes its experts in bfloat16 where it can."""
    model, original = fused_model(name), tiny_model(name)
    inputs = tiny_inputs(name, model)
    target = logits_of(name, model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = logits_of(name, model, inputs), logits_of(name, original, inputs)
    assert typical_error(ours, target) <= 1.5 * typical_error(theirs, target)


def recorded(model: Any, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Everything that a forward gives on request, by name."""
    with torch.no_grad():
        out = model(**inputs, use_cache=False, output_hidden_states=True, output_router_logits=True)
    found: dict[str, list[Tensor]] = {}
    for name, value in out.items():
        if ("hidden_states" in name or "router" in name) and isinstance(value, tuple):
            found[name] = [item for item in value if isinstance(item, Tensor)]
    return found


# Families whose own forward does not take or does not survive these requests.
NO_REQUESTS = ("deepseek_ocr2", "unlimited_ocr")
ASKED = [
    name
    for name in FAMILIES
    if family_of(name).call == "text" and name not in (*NO_REQUESTS, "doge", "nllb_moe")
]


@pytest.mark.parametrize("name", ASKED)
def test_hidden_states_and_router_logits_on_request(name: str) -> None:
    """The same as of the original, or refused by it as well."""
    try:
        model = tiny_model(name)
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    inputs = tiny_inputs(name, model)
    try:
        before = recorded(model, inputs)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as failure:
        pytest.skip(f"the original fails: {failure}")
    moetor.fuse(model)
    after = recorded(model, inputs)
    assert after.keys() == before.keys()
    for request, values in before.items():
        assert len(after[request]) == len(values), request
        for ours, theirs in zip(after[request], values, strict=True):
            assert relative_error(ours, theirs) <= 2e-5, request
