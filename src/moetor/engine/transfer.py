"""Copies between host and device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

# Columns of one copy begin at multiples of 16 bytes: kernels are compiled for such addresses.
_ALIGNED = 4


def to_device(
    values: Items[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Numbers as a tensor [N] on the device. From memory that is not pinned, such a copy waits for
    all that the device has to do before it.
    """
    made = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        made = made.pin_memory()
    return made.to(device, non_blocking=True)


def columns_to_device(columns: Items[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors [N] of float32 or int32 on the device, in one copy."""
    size = columns[0].shape[0]
    packed = torch.zeros(
        (len(columns), -(-size // _ALIGNED) * _ALIGNED),
        dtype=torch.int32,
        pin_memory=device.type == "cuda",
    )
    for row, column in zip(packed, columns, strict=True):
        row[:size] = column.view(torch.int32)
    found = packed.to(device, non_blocking=True)
    return [found.view(column.dtype)[row, :size] for row, column in enumerate(columns)]


def to_host(found: Tensor) -> Tensor:
    """The tensor on the host, to be read when an event that is recorded later has come."""
    if found.device.type != "cuda":
        return found
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    return host.copy_(found, non_blocking=True)
