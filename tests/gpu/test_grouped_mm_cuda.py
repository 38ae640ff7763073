"""torch's grouped product as a kernel, on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layer.expert_cases import EDGES, FORMS, ExpertsCase, draw
from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.grouped_mm import GroupedMMKernel
from oracle import assert_close

QUERY = KernelQuery(
    device="cuda",
    dtype=torch.bfloat16,
    experts=ExpertsConfig(num_experts=4, hidden_size=16, intermediate_size=8),
    top_k=2,
)
REFUSED = GroupedMMKernel().refusal(QUERY)
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=f"kernel grouped_mm {REFUSED}")


@pytest.mark.parametrize("case", FORMS + EDGES, ids=lambda case: case.id)
def test_matches_the_oracle(case: ExpertsCase, rng: torch.Generator) -> None:
    case = replace(case, config=replace(case.config, hidden_size=16, intermediate_size=8))
    drawn = draw(case, torch.bfloat16, rng)
    tensors = drawn.tensors._asdict()
    weights = ExpertWeights(
        **{name: one if one is None else one.cuda() for name, one in tensors.items()}
    )
    arguments = [one.cuda() for one in (drawn.hidden, drawn.topk_weights, drawn.topk_ids)]
    torch.full((2**16,), float("nan"), device="cuda")
    out = GroupedMMKernel()(*arguments, weights, case.config)
    assert_close(out.cpu(), drawn.expected(case.config))


def test_a_captured_graph_follows_its_routing(seed: int) -> None:
    torch.manual_seed(seed)
    config = ExpertsConfig(num_experts=16, hidden_size=256, intermediate_size=128)
    weights = ExpertWeights(
        torch.randn(config.gate_up_shape, device="cuda").bfloat16() / 16,
        torch.randn(config.down_shape, device="cuda").bfloat16() / 12,
    )
    hidden = torch.randn(40, 256, device="cuda").bfloat16()
    ids = torch.rand(40, 16, device="cuda").topk(4).indices.int()
    slots = torch.rand(40, 4, device="cuda")
    kernel = GroupedMMKernel()
    kernel(hidden, slots, ids, weights, config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(hidden, slots, ids, weights, config)
    for _ in range(3):
        hidden.normal_()
        ids.copy_(torch.rand(40, 16, device="cuda").topk(4).indices)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, kernel(hidden, slots, ids, weights, config))
