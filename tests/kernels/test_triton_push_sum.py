"""The sum over ranks in one launch: processes that share memory, under Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from interpreted import needs_triton, run_interpreted

BLOCK, MOST = 16, 64
# One program; several, the last one partly filled; fewer again, whose flags then lag behind.
SIZES = (16, 56, 8, 64, 64, 24)


@needs_triton
def test_ranks_get_the_same_sums() -> None:
    run_interpreted(Path(__file__))


def _part(rank: int, call: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * call + rank)
    return torch.randn(SIZES[call], generator=generator)


def _rank(
    rank: int, places: tuple[torch.Tensor, ...], flags: tuple[torch.Tensor, ...], told: torch.Tensor
) -> None:
    from moetor.kernels.triton.push_sum import push_sum

    # The counts are about to begin anew.
    epochs = torch.full((MOST // BLOCK,), 2**31 - 3, dtype=torch.int32)
    for call, size in enumerate(SIZES):
        told[rank, call, :size] = push_sum(
            _part(rank, call), places, flags, epochs, rank=rank, block=BLOCK
        )


def check_ranks(ranks: int) -> None:
    places = tuple(torch.full((2, ranks, MOST), float("nan")) for _ in range(ranks))
    flags = tuple(
        torch.full((MOST // BLOCK, ranks), 2**31 - 3, dtype=torch.int32) for _ in range(ranks)
    )
    told = torch.full((ranks, len(SIZES), MOST), float("nan"))
    for tensor in (*places, *flags, told):
        tensor.share_memory_()
    mp.spawn(_rank, args=(places, flags, told), nprocs=ranks)
    for call, size in enumerate(SIZES):
        parts = [_part(rank, call) for rank in range(ranks)]
        whole = torch.stack(parts).double().sum(0)
        for rank in range(ranks):
            found = told[rank, call, :size]
            assert torch.equal(found, told[0, call, :size])
            torch.testing.assert_close(found.double(), whole, rtol=2**-22, atol=2**-22)


if __name__ == "__main__":
    for count in (2, 3):
        check_ranks(count)
    sys.exit(0)
