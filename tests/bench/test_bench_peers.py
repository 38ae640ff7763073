from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moetor.bench.peers import PEERS, make_peer, refusal
from moetor.bench.shapes import SHAPES, LayerShape, parse_shapes
from moetor.bench.weights import make_weights
from moetor.errors import UnsupportedError
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
@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_what_the_reference_does(name: str, shape: LayerShape) -> None:
    (weights,) = make_weights(shape, 1, torch.float32, "cpu", seed=0)
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]], dtype=torch.int32)
    slots = torch.rand(6, 2, generator=torch.Generator().manual_seed(2))
    expected = ReferenceKernel()(hidden, slots, ids, weights, shape.experts)
    with torch.inference_mode():
        found = make_peer(name, shape, weights)(hidden, slots, ids.long())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_peers_hold_the_same_tensors() -> None:
    (weights,) = make_weights(GPT_OSS, 1, torch.float32, "cpu", seed=0)
    module = make_peer("eager", GPT_OSS, weights)._module
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
