from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moetor.bench import plan_variants
from moetor.bench.peers import TransformersPeer, make_peer, refusal
from moetor.bench.shapes import SHAPES, LayerShape, parse_shapes
from moetor.bench.weights import make_weights
from moetor.errors import UnsupportedError
from moetor.kernels.base import ExpertWeights
from moetor.kernels.reference import ReferenceKernel

PLAIN = parse_shapes(["4,2,32,16"])[0]
# The form of gpt-oss at a small size.
GPT_OSS = LayerShape(
    name="small gpt-oss",
    top_k=2,
    experts=replace(
        SHAPES["gpt-oss-20b"].experts, num_experts=4, hidden_size=32, intermediate_size=16
    ),
)


@pytest.mark.parametrize("shape", [PLAIN, GPT_OSS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_peers_compute_what_the_reference_does(name: str, shape: LayerShape) -> None:
    (weights,) = make_weights(shape, 1, torch.float32, "cpu", seed=0)
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]], dtype=torch.int32)
    slots = torch.rand(6, 2, generator=torch.Generator().manual_seed(2))
    expected = ReferenceKernel()(hidden, slots, ids, weights, shape.experts)
    with torch.inference_mode():
        found = make_peer(name, shape, weights)(hidden, slots, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_peers_hold_the_same_tensors() -> None:
    (weights,) = make_weights(GPT_OSS, 1, torch.float32, "cpu", seed=0)
    peer = make_peer("eager", GPT_OSS, weights)
    assert isinstance(peer, TransformersPeer)
    module = peer._module
    pointers = {name: tensor.data_ptr() for name, tensor in module.named_parameters()}
    assert pointers["gate_up_proj"] == weights.gate_up.data_ptr()
    assert pointers["down_proj"] == weights.down.data_ptr()


def test_a_form_that_no_module_has() -> None:
    shape = replace(PLAIN, experts=replace(PLAIN.experts, interleaved=True))
    (weights,) = make_weights(shape, 1, torch.float32, "cpu", seed=0)
    with pytest.raises(UnsupportedError, match="without peers"):
        make_peer("eager", shape, weights)


def test_batched_mm_is_refused_by_what_it_copies() -> None:
    qwen3 = SHAPES["qwen3-30b-a3b"]
    free = 10 * 2**30
    assert refusal("batched_mm", qwen3, 8, 2, "cpu", free) is None
    # 512 tokens * 8 slots * 4 718 592 weights * 2 bytes.
    reason = refusal("batched_mm", qwen3, 512, 2, "cpu", free)
    assert reason is not None
    assert "4096 experts" in reason
    assert "38.7 GB" in reason
    assert refusal("grouped_mm", qwen3, 512, 2, "cpu", free) is None
    assert refusal("batched_mm", qwen3, 8, 2, "cpu", 10**8) is not None
    assert refusal("batched_mm", qwen3, 64, 2, "cuda", free) is None


def test_weights_differ_between_rows_experts_and_sets() -> None:
    first, second = make_weights(PLAIN, 2, torch.bfloat16, "cpu", seed=0)
    assert first.gate_up.shape == PLAIN.experts.gate_up_shape
    assert first.gate_up.dtype == torch.bfloat16
    rows = first.gate_up.flatten(0, 1)
    assert len(rows.unique(dim=0)) == len(rows)
    assert not torch.equal(first.gate_up, second.gate_up)
    assert first.gate_up.float().std() == pytest.approx(32**-0.5, rel=0.1)
    assert first.gate_up_bias is None
    assert first.post_norm is None
    normed = replace(PLAIN, experts=replace(PLAIN.experts, post_norm_eps=1e-6))
    one, two = make_weights(normed, 2, torch.bfloat16, "cpu", seed=0)
    assert one.post_norm is not None
    assert two.post_norm is not None
    assert one.post_norm.shape == (32,)
    assert not torch.equal(one.post_norm, two.post_norm)


def test_vllm_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SHAPES["olmoe"]
    assert "not on cpu" in str(refusal("vllm", plain, 1, 2, "cpu", 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal("vllm", plain, 1, 2, "cuda", 0) == "vLLM is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert refusal("vllm", plain, 1, 2, "cuda", 0) is None
    assert refusal("vllm", SHAPES["gpt-oss-20b"], 1, 2, "cuda", 0) is None
    ungated = replace(plain, experts=replace(plain.experts, gated=False))
    assert "form" in str(refusal("vllm", ungated, 1, 2, "cuda", 0))


class Vllm:
    """Stands where vLLM is not installed: the same call, computed by the reference."""

    def __init__(self, shape: LayerShape) -> None:
        self.form = replace(shape.experts, transposed=False)

    def fused_experts(
        self,
        hidden: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        slots: torch.Tensor,
        ids: torch.Tensor,
        activation: str = "silu",
        quant_config: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        assert activation == ("swigluoai" if self.form.has_bias else "silu")
        bias = quant_config or {}
        weights = ExpertWeights(up, down, bias.get("w1_bias"), bias.get("w2_bias"))
        return ReferenceKernel()(hidden, slots, ids, weights, self.form)


@pytest.mark.parametrize("shape", [PLAIN, GPT_OSS], ids=lambda shape: shape.name)
def test_vllm_is_given_weights_in_its_own_order(
    shape: LayerShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = "vllm.model_executor.layers.fused_moe"
    vllm = ModuleType(root)
    vllm.fused_experts = Vllm(shape).fused_experts  # type: ignore[attr-defined]
    activation, config = ModuleType("activation"), ModuleType("config")
    activation.MoEActivation = SimpleNamespace(  # type: ignore[attr-defined]
        SWIGLUOAI="swigluoai"
    )
    config.biased_moe_quant_config = dict  # type: ignore[attr-defined]
    for name, module in ((root, vllm), (f"{root}.activation", activation)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, f"{root}.config", config)
    (weights,) = make_weights(shape, 1, torch.float32, "cpu", seed=0)
    hidden, slots = torch.randn(2, 32), torch.rand(2, 2)
    ids = torch.tensor([[0, 1], [1, 3]], dtype=torch.int32)
    expected = ReferenceKernel()(hidden, slots, ids, weights, shape.experts)
    torch.testing.assert_close(make_peer("vllm", shape, weights)(hidden, slots, ids), expected)


def test_dense_products_have_a_layers_arithmetic() -> None:
    (weights,) = make_weights(PLAIN, 1, torch.float32, "cpu", seed=0)
    hidden, slots = torch.randn(6, 32), torch.rand(6, 2)
    ids = torch.zeros(6, 2, dtype=torch.int32)
    peer = make_peer("dense", PLAIN, weights)
    with FlopCounterMode(display=False) as counter:
        out = peer(hidden, slots, ids)
    assert out.shape == (12, 32)
    assert counter.get_total_flops() == 12 * 2 * PLAIN.experts.params_per_expert
    assert refusal("dense", PLAIN, 4, 2, "cuda", 0) is not None
    assert refusal("dense", PLAIN, 128, 2, "cuda", 0) is None


def test_routing_with_experts_is_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """From logits that are made of the ids: what is timed is checked against what the ids say."""
    (weights,) = make_weights(PLAIN, 1, torch.float32, "cpu", seed=0)
    monkeypatch.setattr(plan_variants, "TritonKernel", ReferenceKernel)
    call = plan_variants.RoutedCall(PLAIN)
    hidden, slots = torch.randn(3, 32), torch.full((3, 2), 0.5)
    ids = torch.tensor([[3, 1], [0, 2], [2, 1]], dtype=torch.int32)
    expected = ReferenceKernel()(hidden, slots, ids, weights, PLAIN.experts)
    torch.testing.assert_close(call(hidden, slots, ids, weights), expected)
