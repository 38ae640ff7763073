"""The small path over quantised weights on an NVIDIA GPU: the hand-written instructions, every
format, form, edge case and promise of `ExpertsKernel`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.quantized_cases import FORMATS, ROUNDED, draw_quantized, random_weights
from layer.expert_cases import EDGES, FORMS, ExpertsCase, draw
from moetor.config import Activation, ExpertsConfig
from moetor.errors import KernelRefusedError
from moetor.kernels.base import KernelQuery
from moetor.kernels.formats import (
    ActivationFormat,
    QuantizedExpertWeights,
    QuantizedMatrix,
    canonical,
)
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.triton import support
from moetor.kernels.triton.choose_small_quantized import quantized_form
from moetor.kernels.triton.small import TritonSmallKernel
from oracle import assert_close

REFUSED = support.refusal(
    KernelQuery(
        device="cuda",
        dtype=torch.bfloat16,
        experts=ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=8),
        top_k=2,
    )
)
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=f"the Triton kernel {REFUSED}")

KERNEL = TritonSmallKernel()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZED_FORMS: list[dict[str, Any]] = [
    {},
    {"gated": False, "activation": Activation(name="relu2")},
    {"has_bias": True, "activation": Activation(alpha=1.702, limit=7.0, up_shift=1.0)},
    {"weight_on_input": True, "has_bias": True},
    {"post_norm_eps": 1e-5},
]


def on_gpu(matrix: QuantizedMatrix) -> QuantizedMatrix:
    moved = {name: tensor.cuda() for name, tensor in matrix.tensors.items()}
    return replace(matrix, **moved)


def weights_on_gpu(weights: QuantizedExpertWeights) -> QuantizedExpertWeights:
    moved: dict[str, Any] = {}
    for field in fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, QuantizedMatrix):
            moved[field.name] = on_gpu(value)
        elif isinstance(value, Tensor):
            moved[field.name] = value.cuda()
    return replace(weights, **moved)


def poison() -> None:
    """Fills memory that the caching allocator will hand out with NaN."""
    for size in (2**12, 2**16, 2**20, 2**23):
        for _ in range(4):
            torch.full((size,), float("nan"), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_becomes_its_number(dtype: torch.dtype) -> None:
    import triton.language as tl

    from kernels.code_kernels import expected_codes, write_halves, write_numbers
    from moetor.kernels.dequantize import unpack_nibbles

    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    for element in ("int8", "e4m3"):
        made = torch.full((256,), float("nan"), dtype=dtype, device="cuda")
        write_numbers[(1,)](codes, made, element, names[dtype], 256)
        assert torch.equal(made.cpu().double(), expected_codes(element, 0)), element
    for element, offset in (("int4", 0), ("int4", 8), ("e2m1", 0)):
        made = torch.full((2, 256), float("nan"), dtype=dtype, device="cuda")
        write_halves[(1,)](codes, made[0], made[1], element, offset, names[dtype], 256)
        numbers = expected_codes(element, offset)[unpack_nibbles(codes.cpu()).long()]
        halves = numbers.view(-1, 2, 16).transpose(0, 1).reshape(2, -1)
        assert torch.equal(made.cpu().double(), halves), element


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_matches_the_oracle(
    name: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    case = next(case for case in FORMS if case.id == "bias")
    for hidden, size in ((44, 37), (160, 96)):
        config = replace(case.config, hidden_size=hidden, intermediate_size=size)
        drawn = draw(replace(case, config=config), dtype, rng)
        weights, tensors = draw_quantized(config, name, rng, dtype=dtype)
        drawn = replace(drawn, tensors=tensors)
        poison()
        inputs = (drawn.hidden.cuda(), drawn.topk_weights.cuda(), drawn.topk_ids.cuda())
        moved = weights_on_gpu(weights)
        out = KERNEL(*inputs, moved, config)
        assert torch.equal(out, KERNEL(*inputs, moved, config))
        assert out.dtype == dtype
        assert_close(out.cpu(), drawn.expected(config))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("case", FORMS + EDGES, ids=lambda case: case.id)
def test_every_form_matches_the_oracle(
    case: ExpertsCase, batch_invariant: bool, rng: torch.Generator
) -> None:
    config = canonical(case.config)
    drawn = draw(replace(case, config=config), torch.bfloat16, rng)
    name = ("int4_g32_zp", "mxfp4", "fp8")[(FORMS + EDGES).index(case) % 3]
    weights, tensors = draw_quantized(config, name, rng, dtype=torch.bfloat16)
    poison()
    call = (
        drawn.hidden.cuda(), drawn.topk_weights.cuda(), drawn.topk_ids.cuda(),
        weights_on_gpu(weights), config,
    )  # fmt: skip
    if quantized_form(config) is not None:
        with pytest.raises(KernelRefusedError, match="use kernel 'triton'"):
            KERNEL(*call)
        return
    out = KERNEL(*call, batch_invariant=batch_invariant)
    assert_close(out.cpu(), replace(drawn, tensors=tensors).expected(config))


class Inputs:
    """A call of realistic size on the GPU."""

    def __init__(
        self,
        config: ExpertsConfig,
        top_k: int,
        tokens: int,
        name: str,
        activations: ActivationFormat,
        dtype: torch.dtype,
        rng: torch.Generator,
    ) -> None:
        self.config = config
        self.hidden = torch.randn(tokens, config.hidden_size, generator=rng).to(dtype).cuda()
        scores = torch.rand(tokens, config.num_experts, generator=rng)
        self.ids = scores.topk(top_k, dim=-1).indices.int().cuda()
        self.routing = (torch.rand(tokens, top_k, generator=rng) + 0.2).cuda()
        made = random_weights(config, name, activations, rng, dtype=dtype)
        self.weights = weights_on_gpu(made)

    def run(self, start: int = 0, stop: int | None = None, **options: bool) -> Tensor:
        poison()
        rows = slice(start, stop)
        return KERNEL(
            self.hidden[rows], self.routing[rows], self.ids[rows], self.weights, self.config,
            **options,
        )  # fmt: skip

    def expected(self, activations: ActivationFormat | None = None) -> Tensor:
        """The reference in float32; rounding activations otherwise where asked."""
        weights = self.weights
        if activations is not None:
            weights = replace(weights, activation_format=activations)
        return ReferenceKernel()(self.hidden.float(), self.routing, self.ids, weights, self.config)


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", SIZED_FORMS, ids=lambda form: "-".join(form) or "plain")
@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, (16, 4, 512, 640)), (7, (9, 3, 1000, 333)), (40, (8, 2, 544, 288))]
)
@pytest.mark.parametrize("name", ["int4_g128", "mxfp4", "nvfp4", "int8", "mxfp8"])
def test_matches_the_reference(
    name: str, tokens: int, shape: tuple[int, ...], form: dict[str, Any], rng: torch.Generator
) -> None:
    experts, top_k, hidden, size = shape
    config = ExpertsConfig(num_experts=experts, hidden_size=hidden, intermediate_size=size, **form)
    for dtype, limit in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float32, 2e-6)):
        inputs = Inputs(config, top_k, tokens, name, "unquantized", dtype, rng)
        out = inputs.run()
        assert torch.equal(out, inputs.run())
        assert relative(out, inputs.expected()) < limit, dtype


@pytest.mark.parametrize(("name", "activations"), ROUNDED)
def test_both_inputs_are_rounded(
    activations: ActivationFormat, name: str, rng: torch.Generator
) -> None:
    config = ExpertsConfig(num_experts=9, hidden_size=640, intermediate_size=328)
    for tokens in (1, 7):
        inputs = Inputs(config, 3, tokens, name, activations, torch.float32, rng)
        out = inputs.run()
        # A number that lies between two codes may fall to either side.
        error, rounding = (
            relative(out, inputs.expected()),
            relative(inputs.expected("unquantized"), inputs.expected()),
        )
        assert error < 2e-4, error
        assert rounding > 10 * error
        half = Inputs(config, 3, tokens, name, activations, torch.bfloat16, rng)
        assert relative(half.run(), half.expected()) < 2e-2


@pytest.mark.parametrize("name", ["int4_g32", "mxfp4", "fp8"])
def test_a_token_does_not_depend_on_its_batch(name: str, rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=8, hidden_size=512, intermediate_size=384)
    inputs = Inputs(config, 3, 40, name, "unquantized", torch.bfloat16, rng)
    together = inputs.run(batch_invariant=True)
    for start, stop in ((0, 1), (5, 6), (17, 39), (0, 16)):
        part = inputs.run(start, stop, batch_invariant=True)
        assert torch.equal(part, together[start:stop])


def test_a_captured_graph_sees_new_inputs(rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=16, hidden_size=512, intermediate_size=256)
    inputs = Inputs(config, 4, 6, "mxfp4", "unquantized", torch.bfloat16, rng)
    inputs.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = KERNEL(inputs.hidden, inputs.routing, inputs.ids, inputs.weights, config)
    other = Inputs(config, 4, 6, "mxfp4", "unquantized", torch.bfloat16, rng)
    for tensor, new in zip(
        (inputs.hidden, inputs.routing, inputs.ids),
        (other.hidden, other.routing, other.ids),
        strict=True,
    ):
        tensor.copy_(new)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, inputs.run())
    assert relative(out, inputs.expected()) < 8e-3
