"""Layers are found by name: names are unique among the living, and copies are layers of their
own."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from layer.layer_cases import DEEPSEEK_V3, PLAIN_SHARED, build, draw_input, draw_layer, make_config
from moetor.errors import InputError
from moetor.layer import MoELayer
from moetor.layer.context import (
    ForwardContext,
    find_layer,
    forward_context,
    get_forward_context,
)

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"router": DEEPSEEK_V3, "shared": PLAIN_SHARED},
    "chunked": {"runner": {"name": "chunked", "workspace_bytes": 1}},
    "native": {"runner": {"kernel": "auto"}},
}


def test_a_layer_is_found_by_its_name() -> None:
    layer = MoELayer(make_config(), name="model.layers.7.mlp")
    assert layer.name == "model.layers.7.mlp"
    assert find_layer("model.layers.7.mlp") is layer


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(InputError, match="no MoE layer called 'nobody' is alive"):
        find_layer("nobody")
    with pytest.raises(InputError, match="'nobody'"):
        torch.ops.moetor.moe_forward(torch.ones(1, 12), torch.ones(1, 6), "nobody")


def test_a_taken_name_gets_a_number() -> None:
    layers = [MoELayer(make_config(), name="twin") for _ in range(3)]
    assert [layer.name for layer in layers] == ["twin", "twin#2", "twin#3"]
    assert [find_layer(layer.name) for layer in layers] == layers


@pytest.mark.parametrize("form", ["plain", "shared"])
def test_a_dead_layer_disappears_and_frees_its_name(form: str) -> None:
    """At once: weights must not wait for a garbage collector."""
    gc.collect()
    gc.disable()
    try:
        layer = MoELayer(make_config(**FORMS[form]), name="mortal")
        assert layer.name == "mortal"
        layer.eval()(torch.randn(2, 12))
        del layer
        with pytest.raises(InputError, match="'mortal'"):
            find_layer("mortal")
        assert MoELayer(make_config(), name="mortal").name == "mortal"
    finally:
        gc.enable()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_copy_is_a_layer_of_its_own(
    way: str, form: str, used: bool, rng: torch.Generator
) -> None:
    config = make_config(**FORMS[form])
    layer = build(config, draw_layer(config, torch.float32, rng), name="original")
    given = draw_input(layer, 4, rng)
    if used:
        layer(given.hidden)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    wanted = layer(given.hidden)
    assert other.name not in ("", layer.name)
    assert find_layer(other.name) is other
    assert find_layer(layer.name) is layer
    assert torch.equal(other(given.hidden), wanted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    changed = other(given.hidden)
    assert not torch.equal(changed, wanted)
    assert torch.equal(layer(given.hidden), wanted)
    del layer
    gc.collect()
    assert torch.equal(other(given.hidden), changed)


@pytest.mark.parametrize("form", ["plain", "shared"])
def test_a_shallow_copy_leaves_the_original_whole(form: str, rng: torch.Generator) -> None:
    config = make_config(**FORMS[form])
    layer = build(config, draw_layer(config, torch.float32, rng))
    given = draw_input(layer, 3, rng)
    wanted = layer(given.hidden)
    other = copy.copy(layer)
    assert other.name != layer.name
    assert torch.equal(other(given.hidden), wanted)
    assert torch.equal(layer(given.hidden), wanted)
    del other
    gc.collect()
    assert torch.equal(layer(given.hidden), wanted)


def test_a_model_is_copied_with_its_layers(rng: torch.Generator) -> None:
    config = make_config(shared=PLAIN_SHARED)
    layers = [build(config, draw_layer(config, torch.float32, rng), name="m") for _ in range(2)]
    model = nn.Sequential(*layers)
    other = copy.deepcopy(model)
    assert len({layer.name for layer in [*layers, *other]}) == 4
    hidden = torch.randn(3, 12, generator=rng)
    assert torch.equal(other(hidden), model(hidden))


def test_a_context_hides_the_other_layers(rng: torch.Generator) -> None:
    config = make_config()
    tensors = draw_layer(config, torch.float32, rng)
    layer, other = build(config, tensors, name="a"), build(config, tensors, name="b")
    given = draw_input(layer, 2, rng)
    context = ForwardContext(layers={"a": layer})
    with forward_context(context) as entered:
        assert entered is context is get_forward_context()
        layer(given.hidden)
        with pytest.raises(InputError, match="'b'"):
            other(given.hidden)
        with forward_context(ForwardContext(layers={"b": other})):
            other(given.hidden)
        assert get_forward_context() is context
    with pytest.raises(RuntimeError, match="inside"), forward_context(context):
        raise RuntimeError("inside")
    assert get_forward_context() is not context
    other(given.hidden)


def test_a_context_belongs_to_its_thread() -> None:
    seen: list[ForwardContext] = []
    context = ForwardContext(layers={})
    with forward_context(context):
        thread = threading.Thread(target=lambda: seen.append(get_forward_context()))
        thread.start()
        thread.join()
    assert seen[0] is not context


def test_names_are_unique_across_threads() -> None:
    made: list[MoELayer] = []
    threads = [
        threading.Thread(target=lambda: made.append(MoELayer(make_config(), name="race")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({layer.name for layer in made}) == 8
