"""The Triton router on an NVIDIA GPU, against its twin in torch operations."""

from __future__ import annotations

import pytest
import torch

from layer.routing_cases import CASES, RoutingCase, draw
from moetor.config import RouterConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.routing import Routing
from moetor.kernels.routing import route as route_in_torch
from moetor.kernels.triton.routing import route, routing_refusal

REFUSED = routing_refusal(RouterConfig(num_experts=4, top_k=2), "cuda", torch.float32)
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=f"the Triton router {REFUSED}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEEPSEEK_V3 = RouterConfig(
    num_experts=256,
    top_k=8,
    num_groups=8,
    top_k_groups=4,
    scoring="sigmoid",
    group_score="top2_sum",
    selection_bias=True,
    renormalize=True,
    renormalize_eps=1e-20,
    scaling_factor=2.5,
)


def assert_same(found: Routing, expected: Routing, config: RouterConfig, eps: float) -> None:
    """The same experts with the same weights, whatever their order."""

    def dense(routing: Routing) -> torch.Tensor:
        made = torch.zeros(len(routing.topk_ids), config.num_experts + 1, device="cuda")
        ids = routing.topk_ids.long()
        return made.scatter_add_(1, ids, routing.topk_weights)

    order = found.topk_ids.sort(dim=1).values, expected.topk_ids.sort(dim=1).values
    assert torch.equal(*order)
    torch.testing.assert_close(dense(found), dense(expected), rtol=eps, atol=0)
    assert (found.identity_weights is None) == (expected.identity_weights is None)
    if found.identity_weights is not None and expected.identity_weights is not None:
        torch.testing.assert_close(
            found.identity_weights, expected.identity_weights, rtol=eps, atol=0
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_torch(case: RoutingCase, dtype: torch.dtype, rng: torch.Generator) -> None:
    logits, bias = draw(case, dtype, rng)
    logits, bias = logits.cuda(), None if bias is None else bias.cuda()
    before = logits.clone()
    found = route(logits, case.config, bias, dtype)
    expected = route_in_torch(logits, case.config, bias, dtype)
    assert torch.equal(logits, before)
    eps = 32 * torch.finfo(torch.float32).eps
    if case.config.weights_precision == "model":
        eps += torch.finfo(dtype).eps
    assert_same(found, expected, case.config, eps)


@pytest.mark.parametrize("tokens", [1, 7, 4096])
@pytest.mark.parametrize(
    "config",
    [
        RouterConfig(num_experts=128, top_k=8, renormalize=True),
        DEEPSEEK_V3,
        RouterConfig(num_experts=1024, top_k=64, num_groups=32, top_k_groups=8),
        RouterConfig(num_experts=512, num_zero_experts=256, top_k=12, scaling_factor=6.0),
    ],
    ids=["qwen3", "deepseek_v3", "1024", "identity"],
)
def test_large_routers(config: RouterConfig, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(tokens, config.num_logits, device="cuda")
    bias = torch.rand(config.num_logits, device="cuda") if config.selection_bias else None
    found = route(logits, config, bias, torch.bfloat16)
    expected = route_in_torch(logits, config, bias, torch.bfloat16)
    # Close scores may be ordered either way: judge the tokens whose choice is the same.
    same = (found.topk_ids.sort(dim=1).values == expected.topk_ids.sort(dim=1).values).all(dim=1)
    assert same.float().mean() > 0.99
    parts = [
        Routing(
            routing.topk_weights[same],
            routing.topk_ids[same],
            None if routing.identity_weights is None else routing.identity_weights[same],
        )
        for routing in (found, expected)
    ]
    assert_same(*parts, config, 1e-5)
    again = route(logits, config, bias, torch.bfloat16)
    assert torch.equal(again.topk_ids, found.topk_ids)
    assert torch.equal(again.topk_weights, found.topk_weights)


def test_a_captured_graph_follows_its_logits(seed: int) -> None:
    torch.manual_seed(seed)
    bias = torch.rand(256, device="cuda")
    logits = torch.randn(5, 256, device="cuda")
    route(logits, DEEPSEEK_V3, bias, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = route(logits, DEEPSEEK_V3, bias, torch.bfloat16)
    for _ in range(3):
        logits.normal_()
        graph.replay()
        fresh = route(logits, DEEPSEEK_V3, bias, torch.bfloat16)
        assert torch.equal(held.topk_ids, fresh.topk_ids)
        assert torch.equal(held.topk_weights, fresh.topk_weights)


def test_refusals() -> None:
    config = RouterConfig(num_experts=4, top_k=2)
    with pytest.raises(InputError, match="shape"):
        route(torch.zeros(3, 5, device="cuda"), config, None, torch.float32)
    with pytest.raises(InputError, match="selection_bias"):
        route(torch.zeros(3, 4, device="cuda"), config, torch.zeros(4), torch.float32)
    with pytest.raises(KernelRefusedError, match="float64"):
        route(torch.zeros(3, 4, device="cuda").double(), config, None, torch.float32)
    with pytest.raises(KernelRefusedError, match="cpu"):
        route(torch.zeros(3, 4), config, None, torch.float32)
