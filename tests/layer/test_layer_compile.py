"""The custom ops, their fakes, and whole layers under torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from layer.expert_cases import FORMS
from layer.layer_cases import (
    CASES,
    DEEPSEEK_V3,
    GPT_OSS,
    IDENTITY,
    PLAIN_SHARED,
    LayerCase,
    build,
    draw_input,
    draw_layer,
    make_config,
)
from moetor.config import SharedExpertsConfig
from moetor.layer import MoELayer

HAVE_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {
        "router": DEEPSEEK_V3,
        "shared": SharedExpertsConfig(intermediate_size=7, sigmoid_gate=True),
    },
    "identity": {"router": IDENTITY},
    "gpt_oss": {"router": {"score_order": "after_topk"}, "experts": GPT_OSS, "gate_bias": True},
    "external": {"internal_gate": False, "shared": PLAIN_SHARED},
    "latent_padded": {
        "latent_size": 5,
        "shared": PLAIN_SHARED,
        "runner": {"hidden_multiple": 8},
    },
    "chunked": {"runner": {"name": "chunked", "workspace_bytes": 2000}},
    "monolithic": {"quantization": "unquantized_monolithic"},
    "batch_invariant": {"runner": {"batch_invariant": True}, "shared": PLAIN_SHARED},
    "batch_invariant_latent": {
        "latent_size": 5,
        "router": {"gate_precision": "float32"},
        "runner": {"batch_invariant": True},
    },
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def made(name: str, dtype: torch.dtype, rng: torch.Generator, **options: Any) -> MoELayer:
    config = make_config(**LAYERS[name])
    return build(config, draw_layer(config, dtype, rng), **options)


def check_compiled(layer: MoELayer, backend: str, rng: torch.Generator, tolerance: float) -> None:
    """Equal numbers at one token count, and no compilation for the next ones."""
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    # 11 is no other size of these layers: the compiler takes equal sizes for the same size.
    first, second, third = (draw_input(layer, tokens, rng) for tokens in (11, 40, 75))
    with torch.no_grad():
        results = [(first, compiled(first.hidden, first.logits))]
        with torch.compiler.set_stance("fail_on_recompile"):
            results += [(given, compiled(given.hidden, given.logits)) for given in (second, third)]
        for given, out in results:
            wanted = layer(given.hidden, given.logits)
            assert out.dtype == wanted.dtype
            torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", list(LAYERS))
def test_one_graph_with_the_same_bits(name: str, rng: torch.Generator) -> None:
    check_compiled(made(name, torch.bfloat16, rng), "aot_eager", rng, 0.0)


@pytest.mark.skipif(not HAVE_COMPILER, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["shared", "latent_padded"])
def test_inductor_gives_the_same_numbers(name: str, rng: torch.Generator) -> None:
    check_compiled(made(name, torch.float32, rng), "inductor", rng, 1e-5)


def test_a_callable_router_is_part_of_the_graph(rng: torch.Generator) -> None:
    def by_sign(hidden_TH: Tensor, logits_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        assert logits_TE is not None
        ids = torch.stack((hidden_TH[:, 0] > 0, 2 + (hidden_TH[:, 1] > 0).long()), dim=1)
        return logits_TE.gather(1, ids.long()).sigmoid(), ids.long()

    layer = made("plain", torch.float32, rng, router=by_sign)
    check_compiled(layer, "aot_eager", rng, 0.0)


def test_a_compiled_layer_takes_strided_input(rng: torch.Generator) -> None:
    """The fake of an op must promise the strides that the op returns."""
    layer = made("shared", torch.float32, rng)
    hidden = draw_input(layer, 6, rng).hidden.T.contiguous().T
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden), layer(hidden), rtol=1e-6, atol=1e-6)


# --- the ops themselves --------------------------------------------------------------------------

OPS = torch.ops.moetor


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.id
        in ("mixtral", "deepseek_v3", "chunked", "monolithic", "latent_shared", "gpt_oss")
    ],
    ids=lambda case: case.id,
)
def test_opcheck(case: LayerCase, dtype: torch.dtype, tokens: int, rng: torch.Generator) -> None:
    """Schema, fake and dispatch of all three ops, by torch's own checker."""
    layer = build(case.config, draw_layer(case.config, dtype, rng))
    given = draw_input(layer, tokens, rng)
    logits = layer.logits(given.hidden)
    assert logits is not None
    inner = torch.randn(tokens, layer.inner_size, generator=rng).to(dtype)
    torch.library.opcheck(OPS.moe_forward.default, (inner, logits, layer.name))
    if layer.shared is not None:
        arguments = (inner, given.hidden, logits, layer.name)
        torch.library.opcheck(OPS.moe_forward_shared.default, arguments)
    if case.config.quantization is None:
        weights = torch.rand(tokens, 2, generator=rng)
        ids = torch.randint(0, 6, (tokens, 2), generator=rng)
        arguments = (inner, weights, ids, layer.name)
        torch.library.opcheck(OPS.transformers_moe_forward.default, arguments)


def test_opcheck_with_strided_input_of_the_shared_experts(rng: torch.Generator) -> None:
    layer = made("shared", torch.float32, rng)
    given = draw_input(layer, 5, rng)
    strided = given.hidden.T.contiguous().T
    logits = layer.logits(given.hidden)
    arguments = (given.hidden, strided, logits, layer.name)
    torch.library.opcheck(OPS.moe_forward_shared.default, arguments)


@pytest.mark.parametrize("op", ["moe_forward", "moe_forward_shared", "transformers_moe_forward"])
def test_fakes_need_no_layer(op: str) -> None:
    """Shapes alone: tracing may happen where the weights are not."""
    hidden, logits = torch.empty(4, 12, device="meta"), torch.empty(4, 6, device="meta")
    if op == "moe_forward":
        assert OPS.moe_forward(hidden, logits, "nobody").shape == (4, 12)
    elif op == "moe_forward_shared":
        wide = torch.empty(4, 20, device="meta")
        shared, routed = OPS.moe_forward_shared(hidden, wide, logits, "nobody")
        assert (shared.shape, routed.shape) == ((4, 20), (4, 12))
    else:
        ids = torch.empty(4, 2, dtype=torch.int32, device="meta")
        weights = torch.empty(4, 2, device="meta")
        assert OPS.transformers_moe_forward(hidden, weights, ids, "nobody").shape == (4, 12)


def test_ops_are_the_layer(rng: torch.Generator) -> None:
    layer = made("shared", torch.float32, rng)
    given = draw_input(layer, 5, rng)
    assert layer.shared is not None
    logits = layer.logits(given.hidden)
    shared, routed = OPS.moe_forward_shared(given.hidden, given.hidden, logits, layer.name)
    assert torch.equal(routed, OPS.moe_forward(given.hidden, logits, layer.name))
    assert torch.equal(shared, layer.shared(given.hidden))
    assert torch.equal(routed + shared, layer(given.hidden))
    routing = layer.route(logits, torch.float32)
    arguments = (given.hidden, routing.topk_weights, routing.topk_ids, layer.name)
    assert torch.equal(routed, OPS.transformers_moe_forward(*arguments))


def test_every_form_has_a_name_for_its_table() -> None:
    """Reports print activations; no form may print as another."""
    labels = [case.config.activation.label for case in FORMS]
    forms = {case.config.activation for case in FORMS}
    assert len(set(labels)) == len(forms)
