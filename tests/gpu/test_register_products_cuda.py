"""Weights whose numbers are made in registers, on an NVIDIA GPU: every format and form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.quantized_cases import FORMATS, on_gpu, random_weights
from moetor.config import Activation, ExpertsConfig
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.triton import support
from moetor.kernels.triton.choose_registers import has_register_form
from moetor.kernels.triton.register_products import run_registers
from nvidia import needs_triton_gpu

pytestmark = [
    needs_triton_gpu,
    pytest.mark.skipif(
        not (
            torch.cuda.is_available()
            and torch.cuda.get_device_capability() == (9, 0)
            and support.have_gluon()
        ),
        reason="written for compute capability 9.0 and one version of Triton",
    ),
]

FORMS: list[dict[str, Any]] = [
    {},
    {"gated": False, "activation": Activation(name="relu2"), "weight_on_input": True},
    {"has_bias": True, "activation": Activation(alpha=1.702, limit=7.0, up_shift=1.0)},
    {"weight_on_input": True, "has_bias": True},
    {"post_norm_eps": 1e-5},
]


class Inputs:
    """A call of realistic size on the GPU, with a token that has a dropped slot."""

    def __init__(
        self, config: ExpertsConfig, top_k: int, tokens: int, name: str, rng: torch.Generator
    ) -> None:
        self.config = config
        self.hidden = torch.randn(tokens, config.hidden_size, generator=rng).bfloat16().cuda()
        scores = torch.rand(tokens, config.num_experts, generator=rng)
        ids = scores.topk(top_k, dim=-1).indices.int()
        self.routing = torch.rand(tokens, top_k, generator=rng) + 0.2
        if tokens > 1:
            ids[1, 0], self.routing[1, 0] = config.num_experts, 0.0
        self.ids, self.routing = ids.cuda(), self.routing.cuda()
        self.weights = on_gpu(random_weights(config, name, "unquantized", rng))

    def run(self) -> Tensor:
        for size in (2**12, 2**16, 2**20, 2**23):
            for _ in range(4):
                torch.full((size,), float("nan"), device="cuda")
        formats = (self.weights.gate_up.format, self.weights.down.format)
        device = support.device_of(self.hidden)
        assert has_register_form(self.config, formats, "unquantized", torch.bfloat16, device)
        inputs = (self.hidden, self.routing, self.ids)
        return run_registers(*inputs, self.weights, self.config)

    def check(self, out: Tensor) -> None:
        inputs = (self.hidden.double(), self.routing, self.ids)
        expected = ReferenceKernel()(*inputs, self.weights, self.config)
        size = expected.norm(dim=1)
        errors = (out.double() - expected).norm(dim=1) / size.clamp(min=1e-30)
        errors = errors[size > 0]
        assert out.isfinite().all()
        assert errors.median() < 8e-3, errors
        assert errors.max() < 1.6e-2, errors


@pytest.mark.parametrize("tokens", [1, 40, 300, 900])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8_block4x8"])
def test_every_format(name: str, tokens: int, rng: torch.Generator) -> None:
    for hidden, size in ((512, 320), (1008, 528)):
        config = ExpertsConfig(num_experts=8, hidden_size=hidden, intermediate_size=size)
        inputs = Inputs(config, 2, tokens, name, rng)
        out = inputs.run()
        inputs.check(out)
        assert torch.equal(out, inputs.run())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form) or "plain")
@pytest.mark.parametrize("name", ["int4_g32_zp", "nvfp4", "fp8"])
def test_every_form(name: str, form: dict[str, Any], rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=8, hidden_size=544, intermediate_size=288, **form)
    for tokens in (3, 130, 400):
        inputs = Inputs(config, 3, tokens, name, rng)
        inputs.check(inputs.run())


def test_many_tiles_give_the_same_bits(rng: torch.Generator) -> None:
    """More programs than a GPU runs at once, whose products are bound by arithmetic."""
    config = ExpertsConfig(num_experts=8, hidden_size=1024, intermediate_size=1536)
    for name in ("int4_g32", "int4_g64", "mxfp4", "int8"):
        inputs = Inputs(config, 2, 3000, name, rng)
        out = inputs.run()
        inputs.check(out)
        for _ in range(5):
            assert torch.equal(out, inputs.run())


def test_a_captured_graph_follows_the_routing(rng: torch.Generator) -> None:
    config = ExpertsConfig(num_experts=8, hidden_size=512, intermediate_size=256)
    inputs, other = (Inputs(config, 2, 200, "mxfp4", rng) for _ in "ab")
    inputs.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = inputs.run()
    inputs.hidden.copy_(other.hidden)
    inputs.routing.copy_(other.routing)
    inputs.ids.copy_(other.ids)
    out.fill_(float("nan"))
    graph.replay()
    other.weights = inputs.weights
    other.check(out)
