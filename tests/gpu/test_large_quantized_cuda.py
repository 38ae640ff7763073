"""Quantised weights on the large path, on an NVIDIA GPU: every format, form and promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.quantized_cases import FORMATS, ROUNDED, on_gpu, random_weights
from layer.expert_cases import EDGES, FORMS, ExpertsCase, draw
from moetor.config import ExpertsConfig
from moetor.kernels.formats import (
    ActivationFormat,
    canonical,
)
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.triton.large_kernel import TritonLargeKernel
from nvidia import needs_triton_gpu

pytestmark = needs_triton_gpu

KERNEL = TritonLargeKernel()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PAIRS: list[tuple[str, ActivationFormat]] = [(name, "unquantized") for name in FORMATS]
PAIRS += ROUNDED


class Inputs:
    """One call's arguments on the GPU."""

    def __init__(
        self,
        case: ExpertsCase,
        name: str,
        activations: ActivationFormat,
        dtype: torch.dtype,
        rng: torch.Generator,
    ) -> None:
        self.config = canonical(case.config)
        drawn = draw(replace(case, config=self.config), dtype, rng)
        self.hidden, self.ids = drawn.hidden.cuda(), drawn.topk_ids.cuda()
        self.routing = drawn.topk_weights.cuda()
        weights = random_weights(self.config, name, activations, rng, dtype=dtype)
        self.weights = on_gpu(weights)

    def run(self, part: slice = slice(None), *, batch_invariant: bool = False) -> Tensor:
        poison = torch.full((1 << 22,), float("nan"), device="cuda")
        del poison
        return KERNEL(
            self.hidden[part],
            self.routing[part],
            self.ids[part],
            self.weights,
            self.config,
            batch_invariant=batch_invariant,
        )

    def check(self, out: Tensor) -> None:
        """Against the reference in float64, row by row."""
        inputs = (self.hidden.double(), self.routing, self.ids)
        expected = ReferenceKernel()(*inputs, self.weights, self.config)
        assert out.dtype == self.hidden.dtype
        assert out.isfinite().all()
        errors = (out.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-2)
        if errors.numel() == 0:
            return
        coded = self.weights.activation_format != "unquantized"
        limit = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 3e-6}[out.dtype]
        if coded:
            # Hopper's sums of fp8 products keep fewer digits, so that a value between two codes is
            # often rounded to the other one: medians from 4e-3 (256 terms) to 8e-3 (6144). Sums of
            # int8 products are exact.
            exact = self.weights.activation_format == "int8_token"
            in_float32 = 3e-6 if exact else 1e-2
            limit = {torch.bfloat16: 3e-2, torch.float16: 1.5e-2, torch.float32: in_float32}[
                out.dtype
            ]
        assert errors.median() < limit, f"median error {errors.median():.2e}"
        assert errors.max() < (0.15 if coded else 6 * limit), f"largest error {errors.max():.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("name", "activations"), PAIRS, ids=lambda one: str(one))
def test_every_format(
    name: str, activations: ActivationFormat, dtype: torch.dtype, rng: torch.Generator
) -> None:
    config = ExpertsConfig(num_experts=4, hidden_size=272, intermediate_size=144, has_bias=True)
    case = ExpertsCase(id="sized", config=config, tokens=60)
    inputs = Inputs(case, name, activations, dtype, rng)
    out = inputs.run()
    inputs.check(out)
    assert torch.equal(out, inputs.run())


@pytest.mark.parametrize(
    ("name", "activations"),
    [("fp8", "fp8_token"), ("int4_g32", "unquantized")],
    ids=lambda one: str(one),
)
@pytest.mark.parametrize("case", FORMS + EDGES, ids=lambda case: case.id)
def test_every_form(
    case: ExpertsCase, name: str, activations: ActivationFormat, rng: torch.Generator
) -> None:
    inputs = Inputs(case, name, activations, torch.bfloat16, rng)
    inputs.check(inputs.run())


@pytest.mark.parametrize("tokens", [3, 60, 300, 1500, 6000])
@pytest.mark.parametrize(
    ("name", "activations"), [*ROUNDED, ("mxfp4", "unquantized"), ("int8", "unquantized")]
)
def test_every_tile(
    name: str, activations: ActivationFormat, tokens: int, rng: torch.Generator
) -> None:
    config = ExpertsConfig(num_experts=8, hidden_size=640, intermediate_size=384)
    case = ExpertsCase(id="sized", config=config, tokens=tokens, routing="some_dropped")
    inputs = Inputs(case, name, activations, torch.bfloat16, rng)
    inputs.check(inputs.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("name", "activations"), [("fp8", "fp8_token"), ("int8", "int8_token")])
def test_wide_second_products_that_walk(
    name: str, activations: ActivationFormat, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Their results take the most shared memory in float32."""
    config = ExpertsConfig(num_experts=4, hidden_size=512, intermediate_size=1536)
    case = ExpertsCase(id="wide", config=config, tokens=1100)
    inputs = Inputs(case, name, activations, dtype, rng)
    inputs.check(inputs.run())


@pytest.mark.parametrize(
    ("name", "activations"), [*ROUNDED, ("mxfp4", "unquantized"), ("int8", "unquantized")]
)
def test_batch_invariance(name: str, activations: ActivationFormat, rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=6, hidden_size=320, intermediate_size=192)
    case = ExpertsCase(id="sized", config=config, tokens=300)
    inputs = Inputs(case, name, activations, torch.bfloat16, rng)
    together = inputs.run(batch_invariant=True)
    inputs.check(together)
    for part in (slice(0, 1), slice(7, 8), slice(100, 117), slice(150, 300)):
        assert torch.equal(inputs.run(part, batch_invariant=True), together[part])


@pytest.mark.parametrize(
    ("name", "activations"), [("fp8", "fp8_static"), ("fp8_block128x128", "fp8_group128")]
)
def test_a_captured_graph_follows_the_routing(
    name: str, activations: ActivationFormat, rng: torch.Generator
) -> None:
    config = ExpertsConfig(num_experts=6, hidden_size=256, intermediate_size=256)
    case = ExpertsCase(id="sized", config=config, tokens=50)
    inputs = Inputs(case, name, activations, torch.bfloat16, rng)
    inputs.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = KERNEL(inputs.hidden, inputs.routing, inputs.ids, inputs.weights, inputs.config)
    for _ in range(2):
        inputs.ids.copy_(torch.randint(0, 7, inputs.ids.shape, generator=rng).cuda())
        inputs.hidden.copy_(torch.randn(inputs.hidden.shape, generator=rng).cuda())
        out.fill_(float("nan"))
        graph.replay()
        inputs.check(out)
