"""A rank's part of quantised experts: some of the experts, a slice of their intermediate size, or
both. A slice begins where a group begins that shares a scale, so that codes are only moved.

Shape letters as in `kernels/formats.py`: E experts, N outputs of a product, D its depth, H hidden,
I intermediate, J rows of the first product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import ConfigError
from moetor.kernels.formats import (
    NIBBLE_BLOCK,
    QuantizedExpertWeights,
    QuantizedMatrix,
    WeightFormat,
)
from moetor.parallel.shard import ExpertShard

Ranges = list[tuple[int, int]]


def slice_multiple(up: WeightFormat, down: WeightFormat, config: ExpertsConfig) -> int | None:
    """Slices of I begin at multiples of this; None where I cannot be cut at all: a scale covers
    gate and up rows.
    """
    unit = math.lcm(_depth_unit(down), up.group[0] or 1)
    shares = config.gated and config.intermediate_size % (up.group[0] or 1)
    return None if shares else unit


def _depth_unit(kind: WeightFormat) -> int:
    depth = kind.group[1] or 1
    return max(depth, NIBBLE_BLOCK) if kind.packed else depth


def check_quantized(
    weights: QuantizedExpertWeights, config: ExpertsConfig, shard: ExpertShard
) -> None:
    """Refuses a slice that would cut a group.

    Raises:
        ConfigError: says what is possible.
    """
    size = config.intermediate_size
    if (shard.start, shard.stop) == (0, size):
        return
    multiple = slice_multiple(weights.gate_up.format, weights.down.format, config)
    starts = multiple is not None and shard.start % multiple == 0
    if multiple is not None and starts and (shard.stop % multiple == 0 or shard.stop == size):
        return
    raise ConfigError(
        f"experts in the format {weights.weight_format!r} cannot be split by their intermediate "
        f"size of {size} at {shard.start}..{shard.stop}: a scale would be cut; possible: "
        + ("" if multiple is None else f"slices at multiples of {multiple}, or ")
        + "enable_expert_parallel=True, which splits them by expert"
    )


def take_quantized(
    weights: QuantizedExpertWeights, config: ExpertsConfig, shard: ExpertShard
) -> QuantizedExpertWeights:
    """Copies of a rank's part.

    Args:
        config: of the whole experts, in canonical form.
    """
    rows = shard.up_rows(config)
    down_bias = _experts(weights.down_bias, shard)
    if down_bias is not None and not shard.adds_bias:
        down_bias = torch.zeros_like(down_bias)
    gate_up_bias = _experts(weights.gate_up_bias, shard)
    if gate_up_bias is not None:
        gate_up_bias = _cut(gate_up_bias, 1, rows)
    return replace(
        weights,
        gate_up=_take_rows(weights.gate_up, shard, rows),
        down=_take_depth(weights.down, shard),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )


def _take_rows(matrix: QuantizedMatrix, shard: ExpertShard, rows: Ranges) -> QuantizedMatrix:
    height = matrix.format.group[0]
    by_block = [(start // height, -(-stop // height)) for start, stop in rows]

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name == "input_scales":
            return tensor
        return _cut(tensor, 1, by_block if name in ("scales", "zero_points") else rows)

    return _taken(matrix, shard, cut, matrix.depth)


def _take_depth(matrix: QuantizedMatrix, shard: ExpertShard) -> QuantizedMatrix:
    kind = matrix.format
    depth = shard.stop - shard.start
    begin, end = shard.start, shard.start + kind.padded(depth)
    bytes_ = (begin // 2, end // 2) if kind.packed else (begin, end)
    group = kind.group[1]

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name == "values":
            return _cut(tensor, 2, [bytes_])
        if name in ("scales", "zero_points") and group:
            return _cut(tensor, 2, [(begin // group, -(-end // group))])
        return tensor  # of whole rows, or of whole experts

    return _taken(matrix, shard, cut, depth)


def _taken(
    matrix: QuantizedMatrix,
    shard: ExpertShard,
    cut: Callable[[str, Tensor], Tensor],
    depth: int,
) -> QuantizedMatrix:
    parts = {}
    for name, tensor in matrix.tensors.items():
        own = _experts(tensor, shard)
        assert own is not None, "there is one"
        parts[name] = cut(name, own)
    return replace(matrix, depth=depth, **parts)  # type: ignore[arg-type]


def _cut(tensor: Tensor, axis: int, ranges: Ranges) -> Tensor:
    bits = _bits(tensor)
    parts = [bits.narrow(axis, start, stop - start) for start, stop in ranges]
    return torch.cat(parts, dim=axis).contiguous().view(tensor.dtype)


def _experts(tensor: Tensor | None, shard: ExpertShard) -> Tensor | None:
    if tensor is None:
        return None
    own = torch.tensor(shard.experts, device=tensor.device)
    return _bits(tensor.detach()).index_select(0, own).view(tensor.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The same without float8, which torch neither indexes nor joins on every device."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
