"""Quantised weights in the native kernel: every format that it reads against the formulas in
float64, and the promises that it makes for any weights.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.quantized_cases import draw_quantized, random_matrix
from layer.expert_cases import EDGES, FORMS, ExpertsCase, draw
from moetor.config import ExpertsConfig
from moetor.errors import InputError
from moetor.kernels.base import KernelQuery
from moetor.kernels.dequantize import dequantize_expert
from moetor.kernels.formats import ActivationFormat, QuantizedExpertWeights, canonical
from moetor.kernels.native import library as native_library
from moetor.kernels.native.build import BuildError
from moetor.kernels.native.kernel import NativeKernel, native_experts
from moetor.kernels.reference import ReferenceKernel
from oracle import Tensors, assert_close

READ = (
    *("int8", "int8_g32", "int8_g128", "int4_g32", "int4_g64", "int4_g128"),
    *("int4_g32_zp", "int4_g128_zp", "mxfp4"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _isas() -> tuple[str, ...]:
    try:
        return native_library.load().isas
    except BuildError:
        return ()


ISAS = _isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernel cannot be built here")


def _runs(case: ExpertsCase) -> bool:
    return case.config.post_norm_eps is None and case.config.activation.function is None


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "int4_g32_zp", "mxfp4"])
@pytest.mark.parametrize("case", list(filter(_runs, FORMS + EDGES)), ids=lambda case: case.id)
def test_every_form_matches_the_oracle(
    case: ExpertsCase, name: str, isa: str, rng: torch.Generator
) -> None:
    config = canonical(case.config)
    drawn = draw(replace(case, config=config), torch.float32, rng)
    weights, tensors = draw_quantized(config, name, rng)
    drawn = replace(drawn, tensors=tensors)
    out = native_experts(drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, config, isa=isa)
    assert_close(out, drawn.expected(config))


def _sized(
    name: str,
    config: ExpertsConfig,
    rng: torch.Generator,
    activations: ActivationFormat = "unquantized",
) -> tuple[QuantizedExpertWeights, Tensors]:
    """Quantised experts of any size, and their numbers by the tested dequantiser."""
    count, hidden, size = config.num_experts, config.hidden_size, config.intermediate_size
    up = random_matrix(name, count, config.up_size, hidden, rng)
    down = random_matrix(name, count, hidden, size, rng)
    numbers = [
        torch.stack([dequantize_expert(one, expert, torch.float64) for expert in range(count)])
        for one in (up, down)
    ]
    weights = QuantizedExpertWeights(gate_up=up, down=down, activation_format=activations)
    return weights, Tensors(gate_up=numbers[0], down=numbers[1])


SIZES = ((64, 32), (97, 45), (33, 31), (1, 1), (160, 288))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", READ)
def test_every_format_size_and_dtype(
    name: str, size: tuple[int, int], dtype: torch.dtype, isa: str, rng: torch.Generator
) -> None:
    config = ExpertsConfig(num_experts=4, hidden_size=size[0], intermediate_size=size[1])
    case = replace(FORMS[0], config=config, tokens=17)
    weights, tensors = _sized(name, config, rng)
    drawn = replace(draw(case, dtype, rng), tensors=tensors)
    inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, config)
    out = native_experts(*inputs, isa=isa)
    assert out.dtype == dtype
    assert_close(out, drawn.expected(config))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "int4_g64", "int4_g32_zp"])
def test_a_token_does_not_see_its_batch(name: str, isa: str, rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=3, hidden_size=96, intermediate_size=64)
    case = replace(FORMS[0], config=config, tokens=70)
    for activations in ("unquantized", "int8_token"):
        weights, _ = _sized(name, config, rng, activations)
        drawn = draw(case, torch.bfloat16, rng)

        inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids)
        whole = native_experts(*inputs, weights, config, isa=isa, threads=2)
        assert torch.equal(whole, native_experts(*inputs, weights, config, isa=isa, threads=1))
        for start, stop in ((0, 1), (1, 2), (69, 70), (3, 9), (10, 41)):
            part = [one[start:stop] for one in inputs]
            out = native_experts(*part, weights, config, isa=isa)
            assert torch.equal(out, whole[start:stop])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("activations", ["unquantized", "int8_token"])
@pytest.mark.parametrize("name", ["int8", "int4_g32", "int4_g32_zp"])
def test_packed_inputs_serve_no_other_inputs(
    name: str,
    activations: ActivationFormat,
    weight_on_input: bool,
    isa: str,
    rng: torch.Generator,
) -> None:
    """A thread packs one token once for all its experts: only where they read the same, in the same
    layout. An expert named twice reads a block of two rows, weights on the inputs make each
    expert's own, and two tokens are two inputs even if every expert has one of them."""
    config = ExpertsConfig(
        num_experts=6, hidden_size=160, intermediate_size=64, weight_on_input=weight_on_input
    )
    weights, _ = _sized(name, config, rng, activations)
    drawn = draw(replace(FORMS[0], config=config, tokens=2, top_k=3), torch.bfloat16, rng)
    for ids in ([0, 1, 2], [0, 0, 1], [2, 1, 1], [1, 1, 1], [4, 6, 0]):
        pair_TK = torch.tensor([ids, [3, 4, 5]], dtype=torch.int32)
        inputs = (drawn.hidden, drawn.topk_weights, pair_TK)
        both = native_experts(*inputs, weights, config, isa=isa, threads=1)
        for row in (0, 1):
            one = [tensor[row : row + 1] for tensor in inputs]
            out = native_experts(*one, weights, config, isa=isa, threads=1)
            assert torch.equal(out[0], both[row])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounded_activations(
    dtype: torch.dtype, tokens: int, weight_on_input: bool, isa: str, rng: torch.Generator
) -> None:
    """Against the reference with the same rounding: a value between two codes may fall either way
    in float32, so the whole is compared, not each number."""
    config = ExpertsConfig(
        num_experts=4, hidden_size=97, intermediate_size=45, weight_on_input=weight_on_input
    )
    case = replace(FORMS[0], config=config, tokens=tokens)
    weights, _ = _sized("int8", config, rng, "int8_token")
    drawn = draw(case, dtype, rng)
    inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids)
    out = native_experts(*inputs, weights, config, isa=isa)
    expected = ReferenceKernel()(drawn.hidden.double(), *inputs[1:], weights, config)
    plain = native_experts(
        *inputs, replace(weights, activation_format="unquantized"), config, isa=isa
    )
    error = (out - expected).norm() / expected.norm()
    effect = (plain - expected).norm() / expected.norm()
    assert effect > 1e-3
    # bfloat16 inputs of half the largest one lie between two codes, and the output is rounded.
    share = 0.3 if dtype == torch.float32 else 0.8
    assert error < share * effect + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(97, 45), (160, 288)], ids=str)
@pytest.mark.parametrize("activations", ["unquantized", "int8_token"])
@pytest.mark.parametrize("name", ["int8", "int8_g32", "int4_g64", "int4_g32_zp", "mxfp4"])
def test_neither_scratch_nor_other_tokens_show(
    name: str,
    activations: ActivationFormat,
    size: tuple[int, int],
    isa: str,
    rng: torch.Generator,
) -> None:
    """What the scratch memory held before, and what is not a number in another token."""
    config = ExpertsConfig(num_experts=4, hidden_size=size[0], intermediate_size=size[1])
    weights, _ = _sized(name, config, rng, activations)
    drawn = draw(replace(FORMS[0], config=config, tokens=19), torch.bfloat16, rng)
    routing = (drawn.topk_weights, drawn.topk_ids, weights, config)
    clean = native_experts(drawn.hidden, *routing, isa=isa)
    native_library._kept.buffer.fill_(0xFF)  # every float a NaN
    assert torch.equal(native_experts(drawn.hidden, *routing, isa=isa), clean)
    hidden = drawn.hidden.clone()
    hidden[2, -1], hidden[4, 3] = torch.nan, torch.inf
    out = native_experts(hidden, *routing, isa=isa)
    assert out[2].isnan().all()
    assert not out[4].isfinite().all()
    keep = [row for row in range(19) if row not in (2, 4)]
    assert torch.equal(out[keep], clean[keep])


@pytest.mark.skipif("avx512_bf16" not in ISAS, reason="needs AVX512_BF16")
def test_sums_of_bytes_that_32_bits_do_not_hold_are_of_floats(rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=1, hidden_size=70_000, intermediate_size=1)
    weights, _ = _sized("int8", config, rng, "int8_token")
    drawn = draw(replace(FORMS[0], config=config, tokens=2, top_k=1), torch.bfloat16, rng)
    inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, config)
    out = native_experts(*inputs, isa="avx512_bf16")
    assert torch.equal(out, native_experts(*inputs, isa="avx512"))


def test_what_is_refused(rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=4, hidden_size=64, intermediate_size=32)
    query = KernelQuery(device="cpu", dtype=torch.float32, experts=config, top_k=2)
    kernel = NativeKernel()
    for changes, words in (
        ({"weight_format": "fp8"}, "not fp8"),
        ({"weight_format": "nvfp4"}, "not nvfp4"),
        ({"weight_format": "int8_g16"}, "multiple of 32"),
        ({"weight_format": "int8+int4_g32"}, "one format in both"),
        ({"weight_format": "int8", "activation_format": "fp8_token"}, "fp8_token"),
    ):
        assert words in str(kernel.refusal(replace(query, **changes)))
    assert kernel.refusal(replace(query, weight_format="int4_g32_zp")) is None
    good, _ = _sized("int4_g32_zp", config, rng)
    case = replace(FORMS[0], config=config, tokens=3)
    drawn = draw(case, torch.float32, rng)
    up = good.gate_up
    other, _ = _sized("int8", config, rng)
    for bad, words in (
        (replace(good, gate_up=replace(up, values=up.values[:, :-1])), "gate_up.values"),
        (replace(good, gate_up=replace(up, values=up.values.view(torch.int8))), "int8"),
        (replace(good, gate_up=replace(up, scales=up.scales[..., :1])), "gate_up.scales"),
        (replace(good, gate_up=replace(up, zero_points=None)), "no zero points"),
        (replace(good, gate_up=replace(up, depth=63)), "depth of 63"),
        (replace(good, down=other.down), "one format"),
        (replace(good, activation_format="fp8_token"), "fp8_token"),
        (_sized("fp8", config, rng)[0], "not fp8"),
    ):
        with pytest.raises(InputError, match=words):
            native_experts(drawn.hidden, drawn.topk_weights, drawn.topk_ids, bad, config)


def test_a_tensor_that_is_swapped_or_moved_is_noticed(rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=4, hidden_size=64, intermediate_size=32)
    weights, _ = _sized("int4_g32", config, rng)
    drawn = draw(replace(FORMS[0], config=config, tokens=3), torch.float32, rng)
    inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, config)
    native_experts(*inputs)  # whatever a call remembers, it remembers now
    other, tensors = _sized("int4_g32", config, rng)
    for matrix, new in ((weights.gate_up, other.gate_up), (weights.down, other.down)):
        matrix.values.data, matrix.scales.data = new.values.clone(), new.scales.clone()
    assert_close(native_experts(*inputs), replace(drawn, tensors=tensors).expected(config))
    for tensor, bad in (
        (weights.down.scales, other.down.scales[:, :-1]),
        (weights.down.scales, other.down.scales.double()),
        (weights.gate_up.values, other.gate_up.values.transpose(1, 2).contiguous().mT),
    ):
        good = tensor.data
        tensor.data = bad
        with pytest.raises(InputError, match=r"gate_up\.values|down\.scales"):
            native_experts(*inputs)
        tensor.data = good
