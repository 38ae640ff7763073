from __future__ import annotations

import pytest

from moetor.bench.floor import layer_floor, layer_work
from moetor.bench.shapes import SHAPES, parse_shapes


def test_qwen3_at_one_token_in_bfloat16() -> None:
    # 8 experts of (1536 + 768) * 2048 weights of 2 bytes.
    work = layer_work(SHAPES["qwen3-30b-a3b"], active_experts=8, slots=8, itemsize=2)
    assert work.read_bytes == 75_497_472
    assert work.flops == 75_497_472
    floor = layer_floor(work, read_bytes_per_s=37.1e9, flops_per_s=2.4e12)
    assert floor.bound == "bytes"
    assert floor.seconds == pytest.approx(0.0020349723, rel=1e-7)


def test_qwen3_at_512_tokens_is_bound_by_arithmetic() -> None:
    # 4096 slots of 4 718 592 weights, two flops each: 38.65 GFLOP against 1.208 GB.
    work = layer_work(SHAPES["qwen3-30b-a3b"], active_experts=128, slots=4096, itemsize=2)
    assert work.read_bytes == 1_207_959_552
    assert work.flops == 38_654_705_664
    floor = layer_floor(work, read_bytes_per_s=37.1e9, flops_per_s=0.34e12)
    assert floor.bound == "flops"
    assert floor.seconds == pytest.approx(0.11369031, rel=1e-7)


def test_biases_are_read_and_cost_no_flops() -> None:
    # gpt-oss: gate_up 5760 x 2880, down 2880 x 2880, biases 5760 and 2880.
    work = layer_work(SHAPES["gpt-oss-20b"], active_experts=4, slots=4, itemsize=2)
    assert work.read_bytes == 4 * (5760 * 2880 + 2880 * 2880 + 5760 + 2880) * 2
    assert work.flops == 2 * 4 * (5760 * 2880 + 2880 * 2880)


def test_a_mean_of_active_experts_and_float32() -> None:
    (shape,) = parse_shapes(["4,2,32,16"])
    work = layer_work(shape, active_experts=2.5, slots=6, itemsize=4)
    assert work.read_bytes == 2.5 * 1536 * 4
    assert work.flops == 2 * 6 * 1536
