"""Where a layer's routing comes from: its gate, logits from outside, a callable, a simulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layer.layer_cases import (
    DEEPSEEK_V3,
    IDENTITY,
    PLAIN_SHARED,
    build,
    draw_input,
    draw_layer,
    expected,
    make_config,
)
from moetor.config import RouterConfig
from moetor.errors import ConfigError, InputError
from moetor.kernels.routing import Routing, route
from moetor.kernels.select import RouterChoice
from moetor.layer import CustomRouter, MoELayer, Router, SimulatedRouter
from moetor.layer.context import ForwardContext, forward_context
from moetor.layer.recording import RoutingRecorder, RoutingReplay
from moetor.layer.routing import router
from moetor.quantization import method as quant_method
from oracle import OracleRouting, assert_close


def test_external_logits_are_what_the_gate_would_have_said(rng: torch.Generator) -> None:
    inside = make_config(router=DEEPSEEK_V3, shared=PLAIN_SHARED)
    outside = make_config(router=DEEPSEEK_V3, shared=PLAIN_SHARED, internal_gate=False)
    tensors = draw_layer(inside, torch.float32, rng)
    own = build(inside, tensors)
    state = dict(tensors.state)
    state["_selection_bias"] = state.pop("gate.selection_bias")
    del state["gate.weight"]
    other = build(outside, type(tensors)(tensors.experts, state))
    given = draw_input(own, 5, rng)
    assert torch.equal(other(given.hidden, own.logits(given.hidden)), own(given.hidden))


def test_missing_logits_are_refused(rng: torch.Generator) -> None:
    config = make_config(internal_gate=False)
    layer = build(config, draw_layer(config, torch.float32, rng), name="block 3")
    with pytest.raises(InputError, match=r"'block 3' has no gate .*; pass router_logits"):
        layer(torch.randn(2, 12))


def test_superfluous_logits_are_refused(rng: torch.Generator) -> None:
    config = make_config()
    layer = build(config, draw_layer(config, torch.float32, rng), name="block 4")
    with pytest.raises(InputError, match=r"'block 4' has a gate .* internal_gate=False"):
        layer(torch.randn(2, 12), torch.randn(2, 6))


@pytest.mark.parametrize("width", [5, 7, 12])
def test_logits_of_a_wrong_width_are_refused(width: int, rng: torch.Generator) -> None:
    config = make_config(internal_gate=False)
    layer = build(config, draw_layer(config, torch.float32, rng))
    with pytest.raises(InputError, match=r"takes \[tokens, 6\]"):
        layer(torch.randn(2, 12), torch.randn(2, width))


@pytest.mark.parametrize("width", [5, 7])
def test_logits_of_a_wrong_width_are_refused_by_a_monolithic_layer(
    width: int, rng: torch.Generator
) -> None:
    config = make_config(internal_gate=False, quantization="unquantized_monolithic")
    layer = build(config, draw_layer(config, torch.float32, rng))
    with pytest.raises(InputError):
        layer(torch.randn(2, 12), torch.randn(2, width))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_logits_for_another_number_of_tokens_are_refused(rows: int, rng: torch.Generator) -> None:
    config = make_config(internal_gate=False)
    layer = build(config, draw_layer(config, torch.float32, rng))
    with pytest.raises(InputError):
        layer(torch.randn(4, 12), torch.randn(rows, 6))


class Recorder:
    """A router that answers what it is told and keeps what it was asked."""

    def __init__(self, weights: Tensor, ids: Tensor) -> None:
        self.answer = weights, ids
        self.asked: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, hidden: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        self.asked.append((hidden, logits))
        return self.answer


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shared": PLAIN_SHARED},
        {"latent_size": 5, "shared": PLAIN_SHARED},
        {"internal_gate": False},
        {"runner": {"name": "chunked", "workspace_bytes": 1}},
        {"runner": {"hidden_multiple": 8}},
    ],
    ids=["plain", "shared", "latent", "no_gate", "chunked", "padded"],
)
def test_a_callable_routes(
    fields: dict[str, Any], ids_dtype: torch.dtype, rng: torch.Generator
) -> None:
    """It sees the layer's own input and the gate's logits, and may drop a slot with the id E."""
    config = make_config(**fields)
    tensors = draw_layer(config, torch.float32, rng)
    ids = torch.tensor([[0, 5], [2, 6], [6, 6], [3, 3]], dtype=ids_dtype)
    weights = torch.rand(4, 2, generator=rng, dtype=torch.float64) + 0.2
    router = Recorder(weights, ids)
    layer = build(config, tensors, router=router)
    hidden = torch.randn(2, 2, 12, generator=rng)
    out = layer(hidden)
    ((seen, logits),) = router.asked
    assert torch.equal(seen, hidden.reshape(4, 12))
    if config.internal_gate:
        assert logits is not None
        torch.testing.assert_close(logits, seen @ tensors.state["gate.weight"].T)
    else:
        assert logits is None
    kept = [[slot for slot in range(2) if ids[token, slot] < 6] for token in range(4)]
    routing = OracleRouting(
        [[int(ids[token, slot]) for slot in slots] for token, slots in enumerate(kept)],
        [[float(weights[token, slot]) for slot in slots] for token, slots in enumerate(kept)],
        [],
    )
    assert_close(out.reshape(4, 12), expected(config, tensors, hidden.reshape(4, 12), routing))
    assert torch.equal(router.answer[1], ids)


def test_a_callable_is_given_external_logits(rng: torch.Generator) -> None:
    config = make_config(internal_gate=False)
    router = Recorder(torch.ones(3, 2), torch.tensor([[0, 1]] * 3))
    layer = build(config, draw_layer(config, torch.float32, rng), router=router)
    logits = torch.randn(3, 6)
    layer(torch.randn(3, 12), logits)
    assert router.asked[0][1] is not None
    assert torch.equal(router.asked[0][1], logits)


def test_a_monolithic_method_refuses_a_callable_and_identity_experts() -> None:
    config = make_config(quantization="unquantized_monolithic")
    with pytest.raises(ConfigError, match=r"routes inside its kernel.*Use a modular method"):
        MoELayer(config, router=SimulatedRouter(6, 2))
    with pytest.raises(ConfigError, match=r"identity experts. Use a modular method"):
        MoELayer(make_config(quantization="unquantized_monolithic", router=IDENTITY))


def test_a_callable_with_identity_experts_is_refused_or_served(rng: torch.Generator) -> None:
    config = make_config(router=IDENTITY)
    tensors = draw_layer(config, torch.float32, rng)
    router = Recorder(torch.full((2, 3), 0.5), torch.tensor([[0, 7, 8], [1, 2, 9]]))
    try:
        layer = build(config, tensors, router=router)
    except ConfigError:
        return
    hidden = torch.randn(2, 12, generator=rng)
    routing = OracleRouting([[0, 7, 8], [1, 2, 9]], [[0.5] * 3] * 2, [])
    assert_close(layer(hidden), expected(config, tensors, hidden, routing))


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, "softmax top-2 of 6"),
        ({"score_order": "after_topk", "renormalize": True}, "top-2 softmax of 6, renormalised"),
        ({"scoring": "sqrt_softplus", "scaling_factor": 1.5}, "sqrt-softplus top-2 of 6, x 1.5"),
        (
            DEEPSEEK_V3,
            "sigmoid top-3 of 8, groups 2/4, bias, renormalised, x 2.5",
        ),
        (IDENTITY, "softmax top-3 of 6+4 identity, bias, x 2"),
    ],
)
def test_a_router_names_itself(fields: dict[str, Any], label: str) -> None:
    assert Router(make_config(router=fields).router).label == label


def test_a_callable_names_itself() -> None:
    config = make_config().router
    assert CustomRouter(SimulatedRouter(6, 2, "zipf"), config).label == "callable simulated zipf"
    recorder = Recorder(torch.ones(1), torch.ones(1))
    assert CustomRouter(recorder, config).label == "callable Recorder"


# --- the simulator -------------------------------------------------------------------------------


def popularity(router: SimulatedRouter, tokens: int = 4000) -> Tensor:
    _, ids = router(torch.empty(tokens, 1))
    return torch.bincount(ids.flatten().long(), minlength=router.num_experts) / tokens


@pytest.mark.parametrize("pattern", ["uniform", "zipf", "fixed"])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 3), (8, 8), (1, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_simulated_routings_are_routings(
    pattern: Any, experts: int, top_k: int, tokens: int, seed: int
) -> None:
    weights, ids = SimulatedRouter(experts, top_k, pattern, seed=seed)(torch.empty(tokens, 4))
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (tokens, top_k)
    assert ids.is_contiguous()
    assert torch.equal(weights, torch.full((tokens, top_k), 1 / top_k))
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert all(0 <= expert < experts for row in ids.tolist() for expert in row)


def test_uniform_is_uniform(seed: int) -> None:
    """4000 tokens, 2 of 8: a share is 0.25 with a standard deviation of 0.007."""
    assert (popularity(SimulatedRouter(8, 2, seed=seed)) - 0.25).abs().max() < 0.05


def test_zipf_falls_as_it_says(seed: int) -> None:
    """With one slot the shares are the weights 1 / (e + 1) ** s themselves."""
    for exponent in (0.5, 1.0, 2.0):
        shares = popularity(SimulatedRouter(8, 1, "zipf", exponent=exponent, seed=seed))
        wanted = torch.arange(1, 9, dtype=torch.float64) ** -exponent
        assert (shares - wanted / wanted.sum()).abs().max() < 0.05
    shares = popularity(SimulatedRouter(8, 2, "zipf", seed=seed))
    assert shares[0] > shares[1] > shares[3] > shares[7] > 0


def test_fixed_is_fixed() -> None:
    assert SimulatedRouter(8, 3, "fixed")(torch.empty(2, 4))[1].tolist() == [[0, 1, 2]] * 2


def test_seeds_decide(seed: int) -> None:
    hidden = torch.empty(200, 1)
    one, same, other = (SimulatedRouter(16, 2, seed=s) for s in (seed, seed, seed + 1))
    first = one(hidden)[1]
    assert torch.equal(first, same(hidden)[1])
    assert not torch.equal(first, other(hidden)[1])
    second = one(hidden)[1]
    assert not torch.equal(first, second)
    assert torch.equal(second, same(hidden)[1])


def test_the_simulator_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    SimulatedRouter(8, 2)(torch.empty(5, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 2, "random"), "'random' is not one of uniform, zipf, fixed"),
        ((8, 9), "top_k=9 must lie between 1 and num_experts=8"),
        ((8, 0), "top_k=0 must lie between"),
    ],
)
def test_the_simulator_refuses(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SimulatedRouter(*arguments)


def test_a_layer_runs_on_simulated_routings(rng: torch.Generator, seed: int) -> None:
    config = make_config(shared=PLAIN_SHARED)
    tensors = draw_layer(config, torch.float32, rng)
    layer = build(config, tensors, router=SimulatedRouter(6, 2, "zipf", seed=seed))
    hidden = torch.randn(7, 12, generator=rng)
    _, ids = SimulatedRouter(6, 2, "zipf", seed=seed)(hidden)
    routing = OracleRouting(ids.tolist(), [[0.5, 0.5]] * 7, [])
    assert_close(layer(hidden), expected(config, tensors, hidden, routing))


@pytest.mark.parametrize("method", [None, "unquantized_monolithic"])
def test_a_layer_routes_by_the_launch_that_was_chosen(
    method: str | None, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """Inside the op, except where ids are prescribed."""
    launched: list[int] = []

    def launch(logits: Tensor, *rest: Any) -> Routing:
        launched.append(logits.shape[0])
        return route(logits, *rest)

    def choose(config: RouterConfig, device: str, dtype: torch.dtype) -> RouterChoice:
        return RouterChoice("stub", launch, None)

    monkeypatch.setattr(router, "select_router", choose)
    monkeypatch.setattr(quant_method, "select_router", choose)
    config = make_config(quantization=method)
    layer = build(config, draw_layer(config, torch.float32, rng))
    hidden = draw_input(layer, 5, rng).hidden
    out = layer(hidden)
    assert launched == [5]
    if method is not None:
        return
    recorder = RoutingRecorder()
    with forward_context(ForwardContext(recorder=recorder)):
        assert torch.equal(layer(hidden), out)
    ids = recorder.ids([layer.name])[:, 0]
    assert launched == [5, 5]
    with forward_context(ForwardContext(replay=RoutingReplay({layer.name: ids}))):
        assert torch.equal(layer(hidden), out)
    assert launched == [5, 5]
