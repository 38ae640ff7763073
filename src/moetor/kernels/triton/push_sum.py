"""A sum over the GPUs of one machine in one launch: each writes its part into the others' memory.

It is added up in float32, in the order of ranks: all of them get the same bits.

Shape letters: H hidden, R ranks, P programs, M elements that a place has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetor.kernels.triton import support
from moetor.kernels.triton.choose import next_power_of_2

if TYPE_CHECKING:
    from moetor.kernels.dense import Norm


def push_sum_refusal(device: str) -> str | None:
    """Why this kernel does not run on `device`, as half a sentence, or None."""
    return support.device_refusal(device)


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """What ranks exchange through, for one dtype. Programs of one memory always have the same
    elements: a place may be written again when its own program's flag says so.

    Attributes:
        places_R: [2, R, M] in the memory of every rank.
        flags_R: int32 [P, R] in the memory of every rank, zero at first.
        epochs_P: int32 [P], zero at first; this rank's count of calls of every program.
        rank: this one's number.
    """

    places_R: tuple[Tensor, ...]
    flags_R: tuple[Tensor, ...]
    epochs_P: Tensor
    rank: int


def push_sum(part: Tensor, memory: SharedMemory, block: int) -> Tensor:
    """The sum of all ranks' parts, a new tensor.

    Args:
        part: contiguous, at most M elements; every rank calls with as many, in the same order.
        block: elements of a program, a power of two; for a memory always the same.
    """
    from moetor.kernels.triton import push_sum_kernels

    total = torch.empty_like(part)
    pdl = support.overlap(part)
    with support.on_device_of(part):
        push_sum_kernels.push_sum[(-(-part.numel() // block),)](
            part,
            total,
            memory.places_R,
            memory.flags_R,
            memory.epochs_P,
            part.numel(),
            memory.places_R[memory.rank].shape[-1],
            RANK=memory.rank,
            RANKS=len(memory.places_R),
            BLOCK=block,
            PDL=pdl,
            num_warps=_warps(block),
            **support.chained(pdl),
        )
    return total


def push_sum_norm(
    part: Tensor, residual: Tensor, norm: Norm, memory: SharedMemory
) -> tuple[Tensor, Tensor]:
    """The norm of the ranks' sum + residual [..., H], and that sum; a row is a program.

    Args:
        part, residual: contiguous, at most P rows of M elements in all.
        norm: the same on all ranks.
    """
    from moetor.kernels.triton import push_sum_kernels

    total, normed = torch.empty_like(part), torch.empty_like(part)
    width, pdl = part.shape[-1], support.overlap(part)
    block = next_power_of_2(width)
    with support.on_device_of(part):
        push_sum_kernels.push_sum_norm[(part.numel() // width,)](
            part,
            residual,
            support.flat(norm.weight, part),
            total,
            normed,
            memory.places_R,
            memory.flags_R,
            memory.epochs_P,
            memory.places_R[memory.rank].shape[-1],
            float(norm.eps),
            RANK=memory.rank,
            RANKS=len(memory.places_R),
            H=width,
            BLOCK=block,
            HAS_WEIGHT=norm.weight is not None,
            OFFSET=float(norm.offset),
            PDL=pdl,
            num_warps=_warps(block),
            **support.chained(pdl),
        )
    return normed, total


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))
