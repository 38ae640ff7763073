"""Checks of a draw among the likeliest tokens, for the CPU and the GPU.

Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# Of the sums of a row's weights, in float32.
_SLACK = 1e-5


def kept(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Weights in float64, 0 for what is left out, by a stable sort."""
    weights = logits_V.double().exp()
    order = weights.sort(descending=True, stable=True).indices[:top_k]
    before = 0.0
    total = float(weights[order].sum())
    found = torch.zeros_like(weights)
    for place, token in enumerate(order.tolist()):
        weight = float(weights[token])
        if place and (before >= top_p * total or weight < min_p * float(weights[order[0]])):
            break
        found[token] = weight
        before += weight
    return found


def check_draws(
    draw: Draw, rng: torch.Generator, *, size: int, rows: int, device: str = "cpu"
) -> None:
    """Random logits, sharp, flat and as at a tiny temperature, with each limit alone, with none and
    with all of them.
    """
    logits = torch.randn(rows, size, generator=rng) * torch.rand(rows, 1, generator=rng) * 6
    logits[0, 3] = logits[1, : size // 2] = -torch.inf
    logits[9] *= 1e4
    logits = logits - logits.amax(-1, keepdim=True)
    limits = [(size, 1.0, 0.0), (7, 1.0, 0.0), (size, 0.9, 0.0), (size, 1.0, 0.05), (9, 0.8, 0.02),
              (size, 0.3, 0.0), (1, 0.5, 0.0), (size, 1e-6, 0.0)]  # fmt: skip
    chosen = [limits[row % len(limits)] for row in range(rows)]
    places = torch.rand(rows, generator=rng)
    columns = [torch.tensor(x) for x in zip(*chosen, strict=True)]
    given = (logits, columns[0].int(), columns[1].float(), columns[2].float(), places)
    moved = [x.to(device) for x in given]
    tokens = draw(*moved)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, draw(*moved))
    for row, token in enumerate(tokens.tolist()):
        weights = kept(logits[row], *chosen[row])
        ends = weights.cumsum(0)
        target, slack = places[row].item() * float(ends[-1]), _SLACK * float(ends[-1])
        assert weights[token] > 0, (row, chosen[row])
        assert ends[token] > target - slack, (row, chosen[row])
        assert ends[token] - weights[token] <= target + slack, (row, chosen[row])


def check_ties(draw: Draw, device: str = "cpu") -> None:
    """Of equal tokens the first stay; sums are exact here."""
    size = 100
    logits = torch.zeros(1, size)
    logits[0, :10] = -torch.inf

    def last(top_k: int, top_p: float) -> int:
        given = (torch.tensor([top_k]).int(), torch.tensor([top_p]), torch.tensor([0.0]))
        near_one = torch.tensor([1 - 2.0**-24])
        return int(draw(*(x.to(device) for x in (logits, *given, near_one))))

    assert last(size, 1.0) == 99
    assert last(8, 1.0) == 17
    assert last(8, 0.5) == 13
    assert last(8, 0.51) == 14
    assert last(1, 1.0) == 10
