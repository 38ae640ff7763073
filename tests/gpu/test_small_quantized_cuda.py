"""Quantised weights on the path for few tokens, on an NVIDIA GPU: every format and form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.quantized_cases import FORMATS, ROUNDED, draw_quantized, on_gpu, random_weights
from layer.expert_cases import EDGES, FORMS, ExpertsCase, draw
from moetor.config import Activation, ExpertsConfig
from moetor.errors import KernelRefusedError
from moetor.kernels.formats import ActivationFormat, canonical
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.triton.choose_small_quantized import quantized_form
from moetor.kernels.triton.small import TritonSmallKernel
from nvidia import needs_triton_gpu
from oracle import assert_close

pytestmark = needs_triton_gpu

KERNEL = TritonSmallKernel()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZED_FORMS: list[dict[str, Any]] = [
    {},
    {"gated": False, "activation": Activation(name="relu2")},
    {"has_bias": True, "activation": Activation(alpha=1.702, limit=7.0, up_shift=1.0)},
    {"weight_on_input": True, "has_bias": True},
    {"post_norm_eps": 1e-5},
]


def poison() -> None:
    """Fills memory that the caching allocator will hand out with NaN."""
    for size in (2**12, 2**16, 2**20, 2**23):
        for _ in range(4):
            torch.full((size,), float("nan"), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_becomes_its_number(dtype: torch.dtype) -> None:
    import triton.language as tl

    from kernels.code_kernels import expected_codes, write_halves, write_numbers

    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    for element in ("int8", "e4m3"):
        made = torch.full((256,), float("nan"), dtype=dtype, device="cuda")
        write_numbers[(1,)](codes, made, element, names[dtype], 256)
        assert torch.equal(made.cpu().double(), expected_codes(element, 0)), element
    for element, offset in (("int4", 0), ("int4", 8), ("e2m1", 0)):
        made = torch.full((2, 256), float("nan"), dtype=dtype, device="cuda")
        write_halves[(1,)](codes, made[0], made[1], element, offset, names[dtype], 256)
        numbers = expected_codes(element, offset)
        assert torch.equal(made[0].cpu().double(), numbers[codes.cpu().long() & 15]), element
        assert torch.equal(made[1].cpu().double(), numbers[codes.cpu().long() >> 4]), element


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
        poison()
        inputs = (drawn.hidden.cuda(), drawn.topk_weights.cuda(), drawn.topk_ids.cuda())
        moved = on_gpu(weights)
        out = KERNEL(*inputs, moved, config)
        assert torch.equal(out, KERNEL(*inputs, moved, config))
        assert out.dtype == dtype
        assert_close(out.cpu(), replace(drawn, tensors=tensors).expected(config))


@pytest.mark.parametrize("case", FORMS + EDGES, ids=lambda case: case.id)
def test_every_form_matches_the_oracle(case: ExpertsCase, rng: torch.Generator) -> None:
    config = canonical(case.config)
    drawn = draw(replace(case, config=config), torch.bfloat16, rng)
    name = ("int4_g32_zp", "mxfp4", "fp8")[(FORMS + EDGES).index(case) % 3]
    weights, tensors = draw_quantized(config, name, rng, dtype=torch.bfloat16)
    poison()
    inputs = (drawn.hidden.cuda(), drawn.topk_weights.cuda(), drawn.topk_ids.cuda())
    call = (*inputs, on_gpu(weights), config)
    if quantized_form(config) is not None:
        with pytest.raises(KernelRefusedError, match="use kernel 'triton'"):
            KERNEL(*call)
        return
    assert_close(KERNEL(*call).cpu(), replace(drawn, tensors=tensors).expected(config))
    with pytest.raises(KernelRefusedError, match="depends on the batch; use kernel 'triton'"):
        KERNEL(*call, batch_invariant=True)


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
        self.weights = on_gpu(random_weights(config, name, activations, rng, dtype=dtype))

    def run(self) -> Tensor:
        poison()
        return KERNEL(self.hidden, self.routing, self.ids, self.weights, self.config)

    def errors(self, out: Tensor, activations: ActivationFormat | None = None) -> Tensor:
        """Of each row against the reference in float64; rounding activations otherwise where
        asked."""
        weights = self.weights
        if activations is not None:
            weights = replace(weights, activation_format=activations)
        inputs = (self.hidden.double(), self.routing, self.ids)
        expected = ReferenceKernel()(*inputs, weights, self.config)
        return (out.double() - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("form", SIZED_FORMS, ids=lambda form: "-".join(form) or "plain")
@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, (16, 4, 512, 640)), (7, (9, 3, 1000, 333)), (40, (8, 2, 544, 288))]
)
@pytest.mark.parametrize("name", ["int4_g128", "int4_g128_zp", "mxfp4", "nvfp4", "int8", "mxfp8"])
def test_matches_the_reference(
    name: str, tokens: int, shape: tuple[int, ...], form: dict[str, Any], rng: torch.Generator
) -> None:
    experts, top_k, hidden, size = shape
    config = ExpertsConfig(num_experts=experts, hidden_size=hidden, intermediate_size=size, **form)
    for dtype, limit in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float32, 2e-6)):
        inputs = Inputs(config, top_k, tokens, name, "unquantized", dtype, rng)
        out = inputs.run()
        assert torch.equal(out, inputs.run())
        errors = inputs.errors(out)
        assert errors.median() < limit, (dtype, errors)
        assert errors.max() < 2 * limit, (dtype, errors)


@pytest.mark.parametrize(("name", "activations"), ROUNDED)
def test_both_inputs_are_rounded(
    name: str, activations: ActivationFormat, rng: torch.Generator
) -> None:
    config = ExpertsConfig(num_experts=9, hidden_size=640, intermediate_size=328)
    for tokens in (1, 7):
        # A value that lies between two codes may fall to either side: of float32 ones very few. In
        # half precision the activation is rounded twice, and a hundredth of the codes differ.
        for dtype, most, median in (
            (torch.float32, 2e-2, 2e-3 if tokens == 1 else 2e-5),
            (torch.bfloat16, 6e-2, 3e-2),
            (torch.float16, 6e-2, 2e-2),
        ):
            inputs = Inputs(config, 3, tokens, name, activations, dtype, rng)
            out = inputs.run()
            assert torch.equal(out, inputs.run())
            errors = inputs.errors(out)
            assert errors.max() < most, (dtype, errors)
            if tokens > 1 or dtype == torch.float32:  # one token's is the largest
                assert errors.median() < median, (dtype, errors)
            if dtype == torch.float32 and tokens > 1:
                assert inputs.errors(out, "unquantized").median() > 1e-3


def test_a_captured_graph_sees_new_inputs(rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=16, hidden_size=512, intermediate_size=256)
    for tokens in (1, 6):
        inputs, other = (
            Inputs(config, 4, tokens, "mxfp4", "unquantized", torch.bfloat16, rng) for _ in "ab"
        )
        inputs.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = KERNEL(inputs.hidden, inputs.routing, inputs.ids, inputs.weights, config)
        inputs.hidden.copy_(other.hidden)
        inputs.routing.copy_(other.routing)
        inputs.ids.copy_(other.ids)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, inputs.run())
        assert inputs.errors(out).max() < 1.6e-2
