"""`MoELayer` against the oracle, with every option; and what holds for each of its calls."""

from __future__ import annotations

import pytest
import torch

import oracle
from layer.expert_cases import DTYPES
from layer.layer_cases import CASES, LayerCase, build, draw_input, draw_layer, expected
from oracle import Estimate, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_the_oracle(case: LayerCase, dtype: torch.dtype, rng: torch.Generator) -> None:
    config = case.config
    tensors = draw_layer(config, dtype, rng)
    layer = build(config, tensors)
    given = draw_input(layer, 6, rng, scale=case.scale)
    out = layer(given.hidden, given.logits)
    assert out.dtype == dtype
    # In float64, what is defined to be float32 decides: a float32 gate, a float32 addition, the sum
    # of the identity experts' weights.
    float32 = config.router.gate_precision == "float32" or config.router.num_zero_experts
    float32 = float32 or (config.shared is not None and config.shared.add_in_float32)
    judged = torch.float32 if float32 and dtype == torch.float64 else dtype
    assert_close(out, expected(config, tensors, given.hidden, given.routing), judged)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.id in ("mixtral", "gpt_oss", "float32_add", "longcat")],
    ids=lambda case: case.id,
)
def test_the_gate_matches_the_oracle(
    case: LayerCase, dtype: torch.dtype, rng: torch.Generator
) -> None:
    config = case.config
    tensors = draw_layer(config, dtype, rng)
    hidden = torch.randn(7, config.hidden_size, generator=rng).to(dtype)
    logits = build(config, tensors).logits(hidden)
    assert logits is not None
    wide = torch.float32 if config.router.gate_precision == "float32" else dtype
    assert logits.dtype == wide
    weight, bias = tensors.state["gate.weight"], tensors.state.get("gate.bias")
    exact = oracle.product(Estimate(hidden.double(), torch.zeros(7, config.hidden_size)), weight)
    if bias is not None:
        spread = bias.double().abs().expand_as(exact.spread)
        exact = oracle.add(exact, Estimate(bias.double().expand_as(spread), spread))
    assert_close(logits, exact)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_its_input_is_never_written_to(case: LayerCase, rng: torch.Generator) -> None:
    layer = build(case.config, draw_layer(case.config, torch.float32, rng))
    given = draw_input(layer, 5, rng)
    hidden, logits = given.hidden.clone(), None if given.logits is None else given.logits.clone()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    versions = given.hidden._version
    out = layer(given.hidden, given.logits)
    assert given.hidden._version == versions
    assert torch.equal(given.hidden, hidden)
    assert out.untyped_storage().data_ptr() != given.hidden.untyped_storage().data_ptr()
    if logits is not None and given.logits is not None:
        assert torch.equal(given.logits, logits)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gives_the_same_bits_twice(
    case: LayerCase, dtype: torch.dtype, rng: torch.Generator
) -> None:
    layer = build(case.config, draw_layer(case.config, dtype, rng))
    given = draw_input(layer, 9, rng)
    assert torch.equal(layer(given.hidden, given.logits), layer(given.hidden, given.logits))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (3, 1, 2), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c.id
        in (
            "mixtral",
            "deepseek_v3",
            "longcat",
            "external_logits_bias",
            "latent_shared",
            "padded_everything",
            "chunked",
            "monolithic",
            "reference",
        )
    ],
    ids=lambda case: case.id,
)
def test_any_number_of_leading_axes(
    case: LayerCase, shape: tuple[int, ...], rng: torch.Generator
) -> None:
    config = case.config
    tensors = draw_layer(config, torch.float32, rng)
    layer = build(config, tensors)
    tokens = int(torch.Size(shape).numel())
    given = draw_input(layer, tokens, rng)
    logits = given.logits
    if logits is not None:
        logits = logits.reshape(*shape, config.router.num_logits)
    out = layer(given.hidden.reshape(*shape, config.hidden_size), logits)
    assert out.shape == (*shape, config.hidden_size)
    flat = out.reshape(tokens, config.hidden_size)
    assert_close(flat, expected(config, tensors, given.hidden, given.routing))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_strided_input_is_the_same_input(case: LayerCase, rng: torch.Generator) -> None:
    layer = build(case.config, draw_layer(case.config, torch.float64, rng))
    given = draw_input(layer, 6, rng)
    plain = layer(given.hidden, given.logits)
    strided = given.hidden.T.contiguous().T
    assert not strided.is_contiguous()
    # A gate product in float32 may round otherwise for other strides.
    tolerance = 2e-6 if case.config.router.gate_precision == "float32" else 1e-12
    out = layer(strided, given.logits)
    torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)


def test_one_token_repeated_gives_one_result_repeated(rng: torch.Generator) -> None:
    """All tokens on the same experts, from an input without strides."""
    case = next(case for case in CASES if case.id == "deepseek_v3")
    tensors = draw_layer(case.config, torch.float32, rng)
    layer = build(case.config, tensors)
    given = draw_input(layer, 1, rng)
    out = layer(given.hidden.expand(5, -1))
    wanted = expected(case.config, tensors, given.hidden, given.routing)
    assert_close(out, Estimate(*(tensor.expand(5, -1) for tensor in wanted)))


def test_padding_the_hidden_size_changes_nothing(rng: torch.Generator) -> None:
    for case in CASES:
        if not case.id.startswith("padded"):
            continue
        tensors = draw_layer(case.config, torch.float64, rng)
        padded = build(case.config, tensors)
        plain = build(case.config.with_runner(hidden_multiple=1), tensors)
        multiple = case.config.runner.hidden_multiple
        assert padded.routed_experts.config.hidden_size % multiple == 0
        assert padded.routed_experts.config != plain.routed_experts.config
        given = draw_input(plain, 6, rng)
        torch.testing.assert_close(padded(given.hidden), plain(given.hidden), rtol=0, atol=1e-12)


def test_float32_add_is_a_float32_add(rng: torch.Generator) -> None:
    case = next(case for case in CASES if case.id == "float32_add")
    layer = build(case.config, draw_layer(case.config, torch.bfloat16, rng))
    assert layer.shared is not None
    routed, shared = torch.randn(2, 50, 12, generator=rng).bfloat16()
    exact = (routed.double() + shared.double()).bfloat16()
    assert torch.equal(layer.shared.combine(routed, shared), exact)
