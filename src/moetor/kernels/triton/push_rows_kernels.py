"""Rows of every GPU of one machine to all of them, and sums of rows back, in a launch each, in
Triton.

A program stores its blocks in the other ranks' memory, sets one flag there, and waits for theirs in
its own; flags count calls, as in `push_sum_kernels`. The two take turns, and that is what makes one
place for each enough: who begins the one has read what the other brought.

Shape letters: R ranks, P programs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain
from moetor.kernels.triton.push_sum_kernels import meet


@triton.jit
def push_gather(
    rows,
    routing,
    places_R,
    flags_R,
    epochs_P,
    rows_size,
    routing_size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every place = all ranks' rows, then all ranks' routing."""
    chain(PDL)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    for block in range(program, tl.cdiv(rows_size, BLOCK), programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(rows + at, at < rows_size)
        for rank in tl.static_range(RANKS):
            tl.store(places_R[rank] + RANK * rows_size + at, words, at < rows_size)
    for block in range(program, tl.cdiv(routing_size, BLOCK), programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(routing + at, at < routing_size)
        to = RANKS * rows_size + RANK * routing_size + at
        for rank in tl.static_range(RANKS):
            tl.store(places_R[rank] + to, words, at < routing_size)
    epoch = tl.load(epochs_P + program) + 1
    meet(flags_R, epoch, program, RANK, RANKS)
    tl.store(epochs_P + program, epoch)


@triton.jit
def push_scatter(
    parts,
    total_out,
    places_R,
    flags_R,
    epochs_P,
    size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """total = this rank's share, of `size` elements, of the sum of parts over ranks."""
    chain(PDL)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    for block in range(program, tl.cdiv(size, BLOCK), programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        for rank in tl.static_range(RANKS):
            if rank != RANK:
                part = tl.load(parts + rank * size + at, at < size)
                tl.store(places_R[rank] + RANK * size + at, part, at < size)
    epoch = tl.load(epochs_P + program) + 1
    meet(flags_R, epoch, program, RANK, RANKS)
    tl.store(epochs_P + program, epoch)
    for block in range(program, tl.cdiv(size, BLOCK), programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for rank in tl.static_range(RANKS):
            if rank == RANK:
                total += tl.load(parts + RANK * size + at, at < size, other=0.0).to(tl.float32)
            else:
                row = places_R[RANK] + rank * size + at
                total += tl.load(row, at < size, other=0.0, volatile=True).to(tl.float32)
        tl.store(total_out + at, total.to(total_out.dtype.element_ty), at < size)
