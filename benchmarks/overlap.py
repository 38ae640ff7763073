"""How much of reading and arithmetic the native CPU kernel overlaps at 64 tokens.

`python benchmarks/overlap.py` times one call with the weights in memory (`cold`) and one in which
all experts share one expert's weights, which then come from the cache (`hot`: arithmetic alone).
Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import statistics
import time

import torch

from moetor.config import ExpertsConfig
from moetor.kernels.base import ExpertWeights
from moetor.kernels.native.kernel import NativeKernel

SHAPES = {"qwen3-30b-a3b": (128, 8, 2048, 768), "olmoe": (64, 8, 2048, 1024)}
TOKENS, ROUNDS = 64, 12


def main() -> None:
    """Prints both times for each shape."""
    torch.set_num_threads(2)
    kernel = NativeKernel()
    for name, (experts, top_k, hidden, intermediate) in SHAPES.items():
        config = ExpertsConfig(
            num_experts=experts, hidden_size=hidden, intermediate_size=intermediate
        )
        gate_up = torch.randn(config.gate_up_shape).bfloat16()
        down = torch.randn(config.down_shape).bfloat16()
        forms = {
            "hot": ExpertWeights(
                gate_up=gate_up[:1].expand(experts, -1, -1), down=down[:1].expand(experts, -1, -1)
            ),
            "cold": ExpertWeights(gate_up=gate_up, down=down),
        }
        x_TH = torch.randn(TOKENS, hidden).bfloat16()
        ids_TK = torch.stack([torch.randperm(experts)[:top_k] for _ in range(TOKENS)]).int()
        weights_TK = torch.rand(TOKENS, top_k)
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        for _ in range(ROUNDS):
            for form, weights in forms.items():
                start = time.perf_counter()
                kernel(x_TH, weights_TK, ids_TK, weights, config)
                seconds[form].append(time.perf_counter() - start)
        medians = {form: statistics.median(times[2:]) for form, times in seconds.items()}
        print(name, ", ".join(f"{form} {1e3 * value:.1f} ms" for form, value in medians.items()))


if __name__ == "__main__":
    main()
