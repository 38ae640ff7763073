"""Random weights of a layer, made quickly: drawing billions of normal numbers takes minutes."""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.bench.shapes import LayerShape
from moetor.kernels.base import ExpertWeights
from moetor.kernels.native.pages import prefer_huge_pages

# A prime, so that repetitions of the pool start at another column in every row and expert: no two
# rows or experts are equal, and a kernel that mixes them up is found out.
_POOL = 2**22 - 3
_BIAS_SCALE = 0.1


def make_weights(
    shape: LayerShape, num_sets: int, dtype: torch.dtype, device: str, seed: int
) -> list[ExpertWeights]:
    """`num_sets` different sets of weights in the shape's storage form.

    Values are normal with variance 1 / fan_in, so that activations keep a sensible size.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator)
    experts = shape.experts

    def matrix(sizes: tuple[int, ...], fan_in: int, start: int) -> Tensor:
        tensor = torch.empty(sizes, dtype=dtype, device=device)
        prefer_huge_pages(tensor)  # as loaded models have them
        scaled = (pool.roll(start) * fan_in**-0.5).to(device=device, dtype=dtype)
        flat = tensor.view(-1)
        for at in range(0, flat.numel(), _POOL):
            part = flat[at : at + _POOL]
            part.copy_(scaled[: part.numel()])
        return tensor

    def bias(size: int, start: int) -> Tensor | None:
        if not experts.has_bias:
            return None
        drawn = torch.randn(
            (experts.num_experts, size), generator=torch.Generator().manual_seed(seed + start)
        )
        return (drawn * _BIAS_SCALE).to(device=device, dtype=dtype)

    def norm(number: int) -> Tensor | None:
        if experts.post_norm_eps is None:
            return None
        drawn = torch.rand(
            experts.hidden_size, generator=torch.Generator().manual_seed(seed + number)
        )
        return (0.5 + drawn).to(device=device, dtype=dtype)

    return [
        ExpertWeights(
            gate_up=matrix(experts.gate_up_shape, experts.hidden_size, 4 * number),
            down=matrix(experts.down_shape, experts.intermediate_size, 4 * number + 1),
            gate_up_bias=bias(experts.up_size, 4 * number + 2),
            down_bias=bias(experts.hidden_size, 4 * number + 3),
            post_norm=norm(number),
        )
        for number in range(num_sets)
    ]
