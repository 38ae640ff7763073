"""Whether products over quantised weights make numbers in registers, and their tiles: computed from
shape, formats, dtype and device. Imports no Triton.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate; BM rows and BK depth of a
tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetor.config import ExpertsConfig
from moetor.kernels.formats import ActivationFormat, WeightFormat
from moetor.kernels.triton.choose import Device, cdiv

# Rows of an expert from which on this is the faster way on an H200; tiles of the other one have 128
# rows from here on, too.
_ROWS = 52


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterTile:
    """Tile and schedule of one product.

    Attributes:
        rows: BM, of the input.
        depth: BK of a step.
        stages: steps in shared memory at once.
        group: row tiles that walk the columns together.
    """

    rows: int
    depth: int
    stages: int
    group: int = 8


def _described(kind: WeightFormat, rows: int, depth: int) -> bool:
    """Whether rows of codes and of inputs begin at multiples of 16 bytes, and groups fit halves."""
    group = kind.group[1]
    grouped = group == 0 or (group >= 16 and group & (group - 1) == 0)
    return grouped and kind.value_shape(rows, depth)[1] % 16 == 0 and depth % 8 == 0 and depth >= 64


def has_register_form(
    config: ExpertsConfig,
    formats: tuple[WeightFormat, WeightFormat],
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: Device,
) -> bool:
    """Whether the kernels take such calls.

    Args:
        formats: of the first and of the second product.
        dtype: of the hidden states.
    """
    return (
        device.capability == (9, 0)
        and dtype == torch.bfloat16
        and activations == "unquantized"
        and config.activation.function is None
        and _described(formats[0], config.up_size, config.hidden_size)
        and _described(formats[1], config.hidden_size, config.intermediate_size)
    )


def enough_rows(config: ExpertsConfig, top_k: int, tokens: int) -> bool:
    """Whether experts have so many rows that products bound by arithmetic are the faster ones."""
    return tokens * top_k >= _ROWS * config.num_experts


def register_tile(depth: int) -> RegisterTile:
    """The tile of a product of this depth: two programs share a multiprocessor."""
    step = 64
    return RegisterTile(rows=128, depth=step, stages=min(4, cdiv(depth, step) + 1))
