"""Whole layers and fused models on an NVIDIA GPU: routing, streams, captured graphs, compilation.

Shape letters: T tokens, K top_k, H hidden.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moetor
from layer.layer_cases import CASES, LayerCase, build, draw_input, draw_layer, expected
from moetor.config import (
    ExpertsConfig,
    MoEConfig,
    RouterConfig,
    RunnerConfig,
    SharedExpertsConfig,
)
from moetor.kernels.select import select_router
from moetor.layer import MoELayer
from moetor.layer.context import ForwardContext, forward_context
from moetor.layer.recording import RoutingRecorder, RoutingReplay
from moetor.tools.tiny.calls import logits_of, tiny_inputs
from moetor.tools.tiny.models import tiny_model
from oracle import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

ROUTER = RouterConfig(
    num_experts=32,
    top_k=4,
    scoring="sigmoid",
    num_groups=4,
    top_k_groups=2,
    group_score="top2_sum",
    renormalize=True,
    scaling_factor=2.5,
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def make_layer(**options: Any) -> MoELayer:
    """A layer of a few MB with shared experts, in bfloat16."""
    options.setdefault("shared", SharedExpertsConfig(intermediate_size=128, sigmoid_gate=True))
    config = MoEConfig(
        hidden_size=256,
        router=ROUTER,
        experts=ExpertsConfig(num_experts=32, hidden_size=256, intermediate_size=128),
        **options,
    )
    return MoELayer(config, device="cuda", dtype=torch.bfloat16).eval().requires_grad_(False)


def hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, 256, device="cuda").bfloat16()


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_layer_matches_the_oracle(case: LayerCase, tokens: int, rng: torch.Generator) -> None:
    """In float32: in half precision another device's gate product may choose other experts."""
    kernel = case.config.runner.kernel
    config = case.config.with_runner(kernel="auto" if kernel == "torch" else kernel)
    tensors = draw_layer(config, torch.float32, rng)
    layer = build(config, tensors)
    given = draw_input(layer, tokens, rng, scale=case.scale)
    wanted = expected(config, tensors, given.hidden, given.routing)
    logits = None if given.logits is None else given.logits.cuda()
    with torch.no_grad():
        out = layer.cuda()(given.hidden.cuda(), logits)
    assert_close(out.cpu(), wanted)


def test_layers_route_in_one_launch() -> None:
    assert select_router(ROUTER, "cuda", torch.bfloat16).name == "triton"


@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_the_monolithic_method_gives_the_same_bits(tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = make_layer()
    other = make_layer(quantization="unquantized_monolithic")
    other.load_state_dict(layer.state_dict())
    x = hidden(tokens)
    assert torch.equal(layer(x), other(x))


def test_recorded_routing_is_replayed(seed: int) -> None:
    torch.manual_seed(seed)
    layer = make_layer()
    x = hidden(20)
    recorder = RoutingRecorder()
    with forward_context(ForwardContext(recorder=recorder)):
        out = layer(x)
    ids = recorder.ids([layer.name])[:, 0]
    assert ids.shape == (20, 4)
    assert torch.equal(out, layer(x))
    with forward_context(ForwardContext(replay=RoutingReplay({layer.name: ids}))):
        torch.testing.assert_close(layer(x), out, rtol=2e-2, atol=2e-2)
    turned = ids.flip(0)
    with forward_context(ForwardContext(replay=RoutingReplay({layer.name: turned}))):
        assert not torch.allclose(layer(x), out, rtol=2e-2, atol=2e-2)


def test_batch_invariant_layers_do_not_see_their_batch(seed: int) -> None:
    torch.manual_seed(seed)
    layer = make_layer(runner=RunnerConfig(batch_invariant=True))
    x = hidden(70)
    whole = layer(x)
    for start, stop in [(0, 1), (33, 34), (69, 70), (5, 47)]:
        assert torch.equal(layer(x[start:stop]), whole[start:stop])


# --- streams and graphs --------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 17, 256])
def test_the_second_stream_changes_no_bit(tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    plain = make_layer(
        shared=SharedExpertsConfig(intermediate_size=128, sigmoid_gate=True, order="no_overlap")
    )
    other = make_layer(
        shared=SharedExpertsConfig(
            intermediate_size=128, sigmoid_gate=True, order="multi_stream_overlapped"
        )
    )
    other.load_state_dict(plain.state_dict())
    for _ in range(50):
        x = hidden(tokens)
        torch.full_like(x, float("nan"))
        assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize("order", ["auto", "no_overlap", "multi_stream_overlapped"])
@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_a_captured_layer_follows_its_input(order: str, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = make_layer(
        shared=SharedExpertsConfig(intermediate_size=128, sigmoid_gate=True, order=order)
    )
    x = hidden(tokens)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(layer(x)) + x  # two calls: memory of the first is taken again
        chosen = []
        for _ in range(4):
            x.normal_()
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, layer(layer(x)) + x)
            chosen.append(layer.route(layer.logits(x), x.dtype).topk_ids.clone())
    assert not torch.equal(chosen[0], chosen[1])


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="other processes take memory meanwhile"
)
def test_memory_comes_from_the_caching_allocator(seed: int) -> None:
    torch.manual_seed(seed)
    layer = make_layer()
    inputs = [hidden(tokens) for tokens in (1, 16, 300, 3000)]

    def taken_elsewhere() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    with torch.no_grad():
        for x in inputs:  # loads the compiled code, and the libraries their workspace
            layer(x)
        before = taken_elsewhere()
        for _ in range(20):
            for x in inputs:
                layer(x)
    assert taken_elsewhere() <= before


# --- compilation ---------------------------------------------------------------------------------


def compiled_checks(
    model: Callable[[Tensor], Tensor], make: Callable[[int], Tensor], limit: float
) -> None:
    """One graph, CUDA graphs inside, and no compilation for a third number of tokens; the relative
    error of every token below `limit`."""
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for tokens in (7, 12):
            compiled(make(tokens))
        with torch.compiler.set_stance("fail_on_recompile"):
            for tokens in (19, 33, 7, 19):
                for _ in range(3):  # warm-up, recording, replay
                    x = make(tokens)
                    torch.compiler.cudagraph_mark_step_begin()
                    out = compiled(x).clone()
                    wanted = model(x)
                    errors = (out.float() - wanted.float()).norm(dim=-1)
                    error = float((errors / wanted.float().norm(dim=-1)).max())
                    assert error < limit, f"{tokens} tokens: {error:.1e}"


@pytest.mark.parametrize("order", ["no_overlap", "multi_stream_overlapped"])
def test_a_compiled_layer_with_cuda_graphs(order: str, seed: int) -> None:
    torch.manual_seed(seed)
    shared = SharedExpertsConfig(intermediate_size=128, sigmoid_gate=True, order=order)
    # In float32: half-precision logits of a compiled gate product may choose other experts.
    layer = make_layer(shared=shared).float()
    compiled_checks(layer, lambda tokens: hidden(tokens).float(), 1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_a_whole_fused_model_compiles_with_cuda_graphs(family: str, seed: int) -> None:
    """In float32: in half precision a rounding may choose other experts, here and in the compiled
    model."""
    model = tiny_model(family, torch.float32, seed).cuda()
    original = copy.deepcopy(model)
    report = moetor.fuse(model)
    assert all(block.kernel == "triton" for block in report.blocks)
    inputs = {name: value.cuda() for name, value in tiny_inputs(family, model).items()}
    wanted = logits_of(family, original, inputs)
    got = logits_of(family, model, inputs)
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() < 1e-4

    def logits(input_ids: Tensor) -> Tensor:
        out: Tensor = model(input_ids=input_ids, use_cache=False).logits
        return out

    def draw(tokens: int) -> Tensor:
        return torch.randint(3, model.config.vocab_size - 8, (1, tokens), device="cuda")

    compiled_checks(logits, draw, 1e-3)
