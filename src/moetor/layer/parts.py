"""What a layer is put together from: existing parts, and the names that they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from moetor.kernels.base import Weights

RowPart = Literal["gate", "input_transform", "output_transform"]
"""A part of a layer that acts on each row by itself."""


@dataclass(frozen=True, kw_only=True)
class ChildNames:
    """Names under which a layer registers its parts, so that a checkpoint's parameter names
    survive fusing.
    """

    gate: str = "gate"
    experts: str = "experts"
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"
    input_transform: str = "routed_input_transform"
    output_transform: str = "routed_output_transform"


@dataclass(kw_only=True)
class LayerParts:
    """Existing modules to build a layer from; whatever is None is made from the configuration."""

    gate: nn.Module | None = None
    experts: Weights | None = None
    shared: nn.Module | None = None
    shared_gate: nn.Module | None = None
    input_transform: nn.Module | None = None
    output_transform: nn.Module | None = None
