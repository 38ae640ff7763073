"""A sum over the GPUs of one machine in one launch, in Triton.

A program has one row. It stores the row in every other rank's memory, then sets a flag there, waits
for the others' flags in its own, and adds the rows up in the order of ranks. Flags count calls, and
rows alternate between two places, so that a call needs no second barrier: a place is written again
only after the flag of the call between has come, which its reader sets when it is done.

Shape letters: N elements, R ranks, P programs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain


@triton.jit
def meet(flags_R, epoch, program, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Says that this rank's program has stored its blocks of call `epoch`, and waits until all
    ranks' have.
    """
    # The flag is set by one thread, behind what all of them have stored.
    tl.debug_barrier()
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            flag = flags_R[rank] + program * RANKS + RANK
            tl.atomic_xchg(flag, epoch, sem="release", scope="sys")
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            flag = flags_R[RANK] + program * RANKS + rank
            # By difference, for counts begin anew after 2^32.
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - epoch < 0:
                pass


@triton.jit
def push_sum(
    part_N,
    total_N,
    places_R,
    flags_R,
    epochs_P,
    size,
    place_size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """total = the sum of part over ranks."""
    chain(PDL)  # counts, too, are read behind the launches before
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    epoch = tl.load(epochs_P + program) + 1
    place = (epoch & 1) * RANKS
    own = tl.load(part_N + offsets, mask)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.store(places_R[rank] + (place + RANK) * place_size + offsets, own, mask)
    meet(flags_R, epoch, program, RANK, RANKS)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += own.to(tl.float32)
        else:
            row = places_R[RANK] + (place + rank) * place_size + offsets
            total += tl.load(row, mask, volatile=True).to(tl.float32)
    tl.store(total_N + offsets, total.to(own.dtype), mask)
    tl.store(epochs_P + program, epoch)


@triton.jit
def push_sum_norm(
    part,
    residual,
    weight,
    total_out,
    normed_out,
    places_R,
    flags_R,
    epochs_P,
    place_size,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """total = residual + the sum of part over ranks, rounded as it is stored, and its norm; a
    program has one row.
    """
    chain(PDL)
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    offsets = program * H + at
    epoch = tl.load(epochs_P + program) + 1
    place = (epoch & 1) * RANKS
    own = tl.load(part + offsets, at < H, other=0.0)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.store(places_R[rank] + (place + RANK) * place_size + offsets, own, at < H)
    total = tl.load(residual + offsets, at < H, other=0.0).to(tl.float32)
    meet(flags_R, epoch, program, RANK, RANKS)
    tl.store(epochs_P + program, epoch)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += own.to(tl.float32)
        else:
            row = places_R[RANK] + (place + rank) * place_size + offsets
            total += tl.load(row, at < H, other=0.0, volatile=True).to(tl.float32)
    rounded = total.to(own.dtype)
    tl.store(total_out + offsets, rounded, at < H)
    y = rounded.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / H + eps)
    if HAS_WEIGHT:
        y = y * (tl.load(weight + at, at < H, other=0.0).to(tl.float32) + OFFSET)
    tl.store(normed_out + offsets, y.to(own.dtype), at < H)
