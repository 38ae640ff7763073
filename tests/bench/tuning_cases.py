"""A made-up GPU and a plan for it."""

from __future__ import annotations

from moetor.bench.shapes import SHAPES
from moetor.kernels.triton import choose

KB = 1024
H100 = choose.Device(sms=132, shared=227 * KB, capability=(9, 0))
START = choose.LargePlan(
    up=choose.Tile(rows=16, columns=32, depth=128, warps=4, stages=4),
    down=choose.Tile(rows=16, columns=64, depth=128, warps=4, stages=4),
)
CONFIG = SHAPES["qwen3-30b-a3b"].experts
