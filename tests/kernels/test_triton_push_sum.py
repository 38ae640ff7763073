"""The sum over ranks in one launch: processes that share memory, under Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from interpreted import needs_triton, run_interpreted

BLOCK, MOST = 16, 64
# One program; several, the last one partly filled; fewer again, whose flags then lag behind.
SIZES = (16, 56, 8, 64, 64, 24)
# Rows of a width that is no power of two.
WIDTH, ROWS = 12, (1, 5, 2, 5, 3, 4)
# Counts are about to begin anew.
FIRST = 2**31 - 3


@needs_triton
def test_ranks_get_the_same_sums() -> None:
    run_interpreted(Path(__file__))


def _part(rank: int, call: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * call + rank)
    return torch.randn(shape, generator=generator)


def _rank(rank: int, places: list[Tensor], flags: list[Tensor], told: Tensor) -> None:
    from moetor.kernels.dense import Norm
    from moetor.kernels.triton.push_sum import SharedMemory, push_sum, push_sum_norm

    memories = [
        SharedMemory(tuple(p), tuple(f), torch.full((len(f[0]),), FIRST, dtype=torch.int32), rank)
        for p, f in zip(places, flags, strict=True)
    ]
    norm = Norm(_part(99, 0, WIDTH), 1e-6, 1.0)
    for call, (size, rows) in enumerate(zip(SIZES, ROWS, strict=True)):
        told[rank, call, 0, :size] = push_sum(_part(rank, call, size), memories[0], BLOCK)
        part, residual = _part(rank, call, rows, WIDTH), _part(98, call, rows, WIDTH)
        normed, total = push_sum_norm(part, residual, norm, memories[1])
        told[rank, call, 1, : rows * WIDTH] = normed.flatten()
        told[rank, call, 2, : rows * WIDTH] = total.flatten()


def _wanted(ranks: int, call: int) -> list[Tensor]:
    """What `_rank` notes of a call, in float64."""
    size, rows = SIZES[call], ROWS[call]
    sums = [
        torch.stack([_part(rank, call, *shape) for rank in range(ranks)]).double().sum(0)
        for shape in ((size,), (rows, WIDTH))
    ]
    total = sums[1] + _part(98, call, rows, WIDTH).double()
    normed = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed * (_part(99, 0, WIDTH).double() + 1)
    return [sums[0], normed.flatten(), total.flatten()]


def check_ranks(ranks: int) -> None:
    places = [[torch.full((2, ranks, MOST), torch.nan) for _ in range(ranks)] for _ in range(2)]
    flags = [
        [torch.full((count, ranks), FIRST, dtype=torch.int32) for _ in range(ranks)]
        for count in (MOST // BLOCK, max(ROWS))
    ]
    told = torch.full((ranks, len(SIZES), 3, MOST), torch.nan)
    for tensor in (*places[0], *places[1], *flags[0], *flags[1], told):
        tensor.share_memory_()
    mp.spawn(_rank, args=(places, flags, told), nprocs=ranks)
    assert torch.equal(told.nan_to_num(7.0), told[:1].expand_as(told).nan_to_num(7.0))
    for call in range(len(SIZES)):
        for found, wanted in zip(told[0, call], _wanted(ranks, call), strict=True):
            wanted_f = wanted.float()
            torch.testing.assert_close(found[: len(wanted)], wanted_f, rtol=2**-20, atol=2**-20)
            assert found[len(wanted) :].isnan().all()


if __name__ == "__main__":
    for count in (2, 3):
        check_ranks(count)
    sys.exit(0)
