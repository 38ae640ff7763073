"""Rows of every GPU of one machine to all of them, and sums of rows back, in a launch each.

Shape letters: N rows of a rank, H width, K top_k, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.kernels.triton import support
from moetor.kernels.triton.push_sum import SharedMemory

PROGRAMS = 528
"""P at most: four for each multiprocessor of a Hopper GPU."""
_WORDS, _ELEMENTS = 1024, 2048


def push_gather(rows_NH: Tensor, routing_NK: Tensor, memory: SharedMemory) -> tuple[Tensor, Tensor]:
    """All ranks' rows [R * N, H] and routing [R * N, K], in rank order: views of the memory.

    Args:
        rows_NH: contiguous, rows of whole words of four bytes; as many on every rank.
        routing_NK: int32, contiguous.
        memory: places int32; `push_scatter` follows before the next call on it.
    """
    from moetor.kernels.triton import push_rows_kernels

    ranks, words = len(memory.places_R), rows_NH.view(torch.int32)
    own = memory.places_R[memory.rank]
    blocks = -(-words.numel() // _WORDS)
    pdl = support.overlap(own)
    with support.on_device_of(own):
        push_rows_kernels.push_gather[(min(blocks, PROGRAMS),)](
            words,
            routing_NK,
            memory.places_R,
            memory.flags_R,
            memory.epochs_P,
            words.numel(),
            routing_NK.numel(),
            RANK=memory.rank,
            RANKS=ranks,
            BLOCK=_WORDS,
            PDL=pdl,
            num_warps=8,
            **support.chained(pdl),
        )
    split = ranks * words.numel()
    rows = own[:split].view(rows_NH.dtype).view(ranks * rows_NH.shape[0], -1)
    return rows, own[split : split + ranks * routing_NK.numel()].view(ranks * len(routing_NK), -1)


def push_scatter(parts_NH: Tensor, memory: SharedMemory) -> Tensor:
    """This rank's [N, H] of the sum over ranks, in float32 and in the order of ranks; a new tensor.

    Args:
        parts_NH: [R * N, H], contiguous; as many on every rank.
        memory: places of its dtype; `push_gather` goes before each call on it.
    """
    from moetor.kernels.triton import push_rows_kernels

    ranks = len(memory.places_R)
    total = parts_NH.new_empty((parts_NH.shape[0] // ranks, *parts_NH.shape[1:]))
    blocks = -(-total.numel() // _ELEMENTS)
    pdl = support.overlap(total)
    with support.on_device_of(total):
        push_rows_kernels.push_scatter[(min(blocks, PROGRAMS),)](
            parts_NH,
            total,
            memory.places_R,
            memory.flags_R,
            memory.epochs_P,
            total.numel(),
            RANK=memory.rank,
            RANKS=ranks,
            BLOCK=_ELEMENTS,
            PDL=pdl,
            num_warps=8,
            **support.chained(pdl),
        )
    return total
