"""A sum over the GPUs of one machine in one launch: each writes its part into the others' memory.

It is added up in float32, in the order of ranks: all of them get the same bits.

Shape letters: N elements, R ranks, P programs, M elements that a place has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.kernels.triton import support


def push_sum_refusal(device: str) -> str | None:
    """Why this kernel does not run on `device`, as half a sentence, or None."""
    return support.device_refusal(device)


def push_sum(
    part: Tensor,
    places_R: tuple[Tensor, ...],
    flags_R: tuple[Tensor, ...],
    epochs_P: Tensor,
    *,
    rank: int,
    block: int,
) -> Tensor:
    """The sum of all ranks' parts, a new tensor.

    Args:
        part: contiguous, N elements; every rank calls with as many, in the same order of calls.
        places_R: [2, R, M] of part's dtype in the memory of every rank, M at least N.
        flags_R: int32 [P, R] in the memory of every rank, zero at first; P at least N / block.
        epochs_P: int32 [P], zero at first; this rank's count of calls of every program.
        block: elements of a program, a power of two.
    """
    from moetor.kernels.triton import push_sum_kernels

    total = torch.empty_like(part)
    pdl = support.overlap(part)
    with support.on_device_of(part):
        push_sum_kernels.push_sum[(-(-part.numel() // block),)](
            part,
            total,
            places_R,
            flags_R,
            epochs_P,
            part.numel(),
            places_R[rank].shape[-1],
            RANK=rank,
            RANKS=len(places_R),
            BLOCK=block,
            PDL=pdl,
            num_warps=max(1, min(8, block // 256)),
            **support.chained(pdl),
        )
    return total
