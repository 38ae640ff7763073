"""Routings made to measure, for benchmarks and load tests: they look at no token.

Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from moetor.errors import ConfigError

Pattern = Literal["uniform", "zipf", "fixed"]


class SimulatedRouter:
    """A `RouterFunction` that draws ids by a pattern instead of reading logits.

    `uniform`: K different experts, all equally likely. `zipf`: K different experts, expert e drawn
    with weight 1 / (e + 1) ** exponent. `fixed`: always experts 0 .. K-1. Every weight is 1 / K.
    The draws follow `seed` and the number of calls, so two simulators of one seed agree.

    Raises:
        ConfigError: unknown pattern, or top_k > num_experts.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        pattern: Pattern = "uniform",
        *,
        exponent: float = 1.0,
        seed: int = 0,
    ) -> None:
        if pattern not in get_args(Pattern):
            raise ConfigError(
                f"routing pattern {pattern!r} is not one of {', '.join(get_args(Pattern))}"
            )
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.pattern = pattern
        self.exponent = exponent
        self.seed = seed
        self._calls = 0

    @property
    def __name__(self) -> str:
        return f"simulated {self.pattern}"

    def __call__(self, hidden_TH: Tensor, logits_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights float32 [T, K] and ids int32 [T, K] on the device of `hidden_TH`."""
        tokens = hidden_TH.shape[0]
        self._calls += 1
        if self.pattern == "fixed":
            ids = torch.arange(self.top_k).expand(tokens, -1)
        elif tokens == 0:
            ids = torch.empty((0, self.top_k), dtype=torch.int64)
        else:
            # Drawn on the host, so that a seed means the same ids on every device.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._calls)
            power = self.exponent if self.pattern == "zipf" else 0.0
            popularity = torch.arange(1, self.num_experts + 1, dtype=torch.float64) ** -power
            ids = torch.multinomial(
                popularity.expand(tokens, -1), self.top_k, replacement=False, generator=generator
            )
        weights = torch.full((tokens, self.top_k), 1.0 / self.top_k, device=hidden_TH.device)
        return weights, ids.to(device=hidden_TH.device, dtype=torch.int32).contiguous()
