"""Quantised expert weights in the kernels written in torch: every format against a dequantiser of
its own, every form against the oracle, and the rounding of activations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.quantized_cases import FORMATS, dense, draw_quantized, e2m1, e4m3, random_matrix
from layer.expert_cases import EDGES, FORMS, Drawn, ExpertsCase, draw
from moetor.errors import ConfigError, InputError
from moetor.kernels.base import ExpertsKernel, KernelQuery
from moetor.kernels.dequantize import (
    dequantize_expert,
    pack_nibbles,
    round_activations,
    unpack_nibbles,
)
from moetor.kernels.formats import ActivationFormat, canonical, find_format
from moetor.kernels.grouped import GroupedKernel
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.select import KERNELS
from oracle import assert_close

BOTH = [GroupedKernel(), ReferenceKernel()]
ROUNDED: tuple[ActivationFormat, ...] = (
    *("int8_token", "fp8_token", "fp8_group128", "fp8_static", "mxfp8"),
)


@pytest.fixture(params=BOTH, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> ExpertsKernel:
    found: ExpertsKernel = request.param
    return found


@pytest.mark.parametrize("size", [(3, 64), (6, 13), (5, 129)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantises_as_the_format_says(
    name: str, size: tuple[int, int], rng: torch.Generator
) -> None:
    matrix = random_matrix(name, 2, *size, rng)
    numbers = dense(matrix)
    assert numbers.std() > 0
    for expert in range(2):
        exact = dequantize_expert(matrix, expert, torch.float64)
        torch.testing.assert_close(exact, numbers[expert], rtol=1e-14, atol=0)
        single = dequantize_expert(matrix, expert)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), numbers[expert], rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_what_it_stores(name: str, rng: torch.Generator) -> None:
    kind = find_format(name)
    assert kind.name == name
    matrix = random_matrix(name, 1, 6, 70, rng)
    assert matrix.values.dtype == kind.value_dtype
    assert matrix.scales.dtype in kind.scale_dtypes
    if not kind.by_group or kind.scale != "float":
        assert matrix.nbytes == kind.bytes_of(6, 70)


@pytest.mark.parametrize(
    "name", ["runes", "int4", "int4_g16", "int8_g32_zp", "int4_g48", "fp8_g32", "int8_g0"]
)
def test_unknown_formats_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        find_format(name)
    query = KernelQuery(
        device="cpu", dtype=torch.float32, experts=FORMS[0].config, top_k=2, weight_format=name
    )
    for one in KERNELS:
        assert one.refusal(query) is not None


def test_nibbles_come_back_in_their_places(rng: torch.Generator) -> None:
    codes = torch.randint(0, 16, (3, 2, 96), generator=rng, dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (3, 2, 48)
    assert torch.equal(unpack_nibbles(packed), codes)
    assert int(packed[1, 1, 16 + 3]) == int(codes[1, 1, 32 + 3]) + 16 * int(codes[1, 1, 32 + 19])


def _drawn(case: ExpertsCase, dtype: torch.dtype, rng: torch.Generator) -> Drawn:
    return draw(replace(case, config=canonical(case.config)), dtype, rng)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["int8", "int4_g32_zp", "fp8_block4x8", "mxfp4"])
@pytest.mark.parametrize("case", FORMS + EDGES, ids=lambda case: case.id)
def test_every_form_matches_the_oracle(
    kernel: ExpertsKernel, case: ExpertsCase, name: str, rng: torch.Generator
) -> None:
    config = canonical(case.config)
    drawn = _drawn(case, torch.float32, rng)
    weights, tensors = draw_quantized(config, name, rng)
    drawn = replace(drawn, tensors=tensors)
    for batch_invariant in (False, True):
        out = kernel(
            drawn.hidden,
            drawn.topk_weights,
            drawn.topk_ids,
            weights,
            config,
            batch_invariant=batch_invariant,
        )
        assert_close(out, drawn.expected(config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_every_dtype(
    kernel: ExpertsKernel, name: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    case = next(case for case in FORMS if case.id == "bias")
    drawn = _drawn(case, dtype, rng)
    weights, tensors = draw_quantized(case.config, name, rng, dtype=dtype)
    drawn = replace(drawn, tensors=tensors)
    out = kernel(drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, case.config)
    assert out.dtype == dtype
    assert_close(out, drawn.expected(case.config))


def _nearest(x: float, numbers: list[float]) -> set[float]:
    """The nearest of `numbers`; both where x lies between two as near as float32 can tell."""
    best = min(abs(x - number) for number in numbers)
    return {number for number in numbers if abs(x - number) <= best * (1 + 1e-5) + 1e-12}


@pytest.mark.parametrize("width", [1, 40, 300])
@pytest.mark.parametrize("activations", ROUNDED)
def test_activations_are_rounded_as_the_format_says(
    activations: ActivationFormat, width: int, rng: torch.Generator
) -> None:
    rows = torch.randn(3, width, generator=rng) * torch.tensor([[1.0], [1e-3], [40.0]])
    rows[1, : width // 2] = 0
    static = torch.tensor(0.02)
    rounded = round_activations(rows, activations, static)
    floats = [e4m3(code) for code in range(256) if code & 127 != 127]
    grid = [float(n) for n in range(-127, 128)] if activations == "int8_token" else floats
    run = {"fp8_group128": 128, "mxfp8": 32}.get(activations, width)
    for row, start in itertools.product(range(3), range(0, width, run)):
        values = rows[row, start : start + run].tolist()
        largest = max(abs(value) for value in values)
        ours = rounded[row, start : start + run].tolist()
        if largest == 0:
            assert ours == values
            continue
        if activations == "fp8_static":
            scale = float(static)
        elif activations == "mxfp8":
            scale = next(2.0**k for k in range(-127, 128) if largest <= 448 * 2.0**k)
        else:
            scale = largest / max(grid)
        for value, mine in zip(values, ours, strict=True):
            wanted = _nearest(min(max(value / scale, min(grid)), max(grid)), grid)
            assert any(mine == pytest.approx(scale * one, rel=1e-5) for one in wanted)


def test_a_row_of_zeros_stays_zero() -> None:
    for activations in ROUNDED:
        zeros = round_activations(torch.zeros(2, 40), activations, torch.tensor(0.5))
        assert torch.equal(zeros, torch.zeros(2, 40))


@pytest.mark.parametrize("activations", ROUNDED)
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_both_products_see_rounded_activations(
    kernel: ExpertsKernel, name: str, activations: ActivationFormat, rng: torch.Generator
) -> None:
    """One expert with the identity as second product and relu between: the output shows both
    roundings."""
    case = next(case for case in EDGES if case.id == "one_expert")
    config = replace(case.config, gated=False, hidden_size=12, intermediate_size=12)
    case = replace(case, config=config, tokens=4)
    drawn = draw(case, torch.float64, rng)
    weights, tensors = draw_quantized(config, name, rng, activations=activations)
    if activations == "fp8_static":
        scale = torch.tensor([0.013])
        weights = replace(
            weights,
            gate_up=replace(weights.gate_up, input_scales=scale),
            down=replace(weights.down, input_scales=2 * scale),
        )
    up, down = tensors.gate_up[0], tensors.down[0]
    hidden = round_activations(drawn.hidden, activations, weights.gate_up.input_scales)
    assert (hidden != drawn.hidden).any()
    between = torch.nn.functional.silu(hidden @ up.T)
    rounded = round_activations(between, activations, weights.down.input_scales)
    expected = drawn.topk_weights.double() * (rounded @ down.T)
    out = kernel(drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, config)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_formats_of_the_two_products_may_differ(
    kernel: ExpertsKernel, rng: torch.Generator
) -> None:
    case = FORMS[0]
    drawn = draw(case, torch.float32, rng)
    first, first_numbers = draw_quantized(case.config, "int4_g32", rng)
    second, second_numbers = draw_quantized(case.config, "int8_g16", rng)
    weights = replace(first, down=second.down)
    assert weights.weight_format == "int4_g32+int8_g16"
    query = KernelQuery(
        device="cpu",
        dtype=torch.float32,
        experts=case.config,
        top_k=2,
        weight_format=weights.weight_format,
    )
    assert kernel.refusal(query) is None
    drawn = replace(drawn, tensors=first_numbers._replace(down=second_numbers.down))
    out = kernel(drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, case.config)
    assert_close(out, drawn.expected(case.config))


def test_a_kernel_for_unquantised_weights_refuses_others(rng: torch.Generator) -> None:
    case = FORMS[0]
    drawn = draw(case, torch.float32, rng)
    weights, _ = draw_quantized(case.config, "fp8_block128x128", rng)
    for one in KERNELS:
        query = KernelQuery(
            device="cpu",
            dtype=torch.float32,
            experts=case.config,
            top_k=2,
            weight_format=weights.weight_format,
        )
        if one.refusal(query) is not None and "NVIDIA" not in str(one.refusal(query)):
            with pytest.raises(InputError, match="fp8_block128x128"):
                one(drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, case.config)


def test_tables_of_small_floats() -> None:
    """The test's own definitions against torch and the published list."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    expected: Tensor = codes.view(torch.float8_e4m3fn).float()
    assert [e4m3(int(code)) for code in codes] == expected.tolist()
    assert [e2m1(code) for code in range(8)] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
