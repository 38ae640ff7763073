"""Rows to all ranks and sums back in a launch each: processes that share memory, under Triton's
interpreter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from interpreted import needs_triton, run_interpreted

TOP_K = 3
# Rows and width: less than a block, several blocks with a rest, more blocks than programs.
SIZES = ((1, 4), (3, 1700), (2, 8), (9, 1024))
PROGRAMS = 6
FIRST = 2**31 - 3


@needs_triton
def test_ranks_exchange_rows() -> None:
    run_interpreted(Path(__file__))


def _drawn(rank: int, call: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * call + rank)
    return torch.randn((rows, width), generator=generator)


def _rank(rank: int, places: list[list[Tensor]], flags: list[list[Tensor]], told: Tensor) -> None:
    from interpreted import allow_loop_bounds
    from moetor.kernels.triton import push_rows
    from moetor.kernels.triton.push_sum import SharedMemory

    allow_loop_bounds()
    push_rows.PROGRAMS = PROGRAMS
    there, back = (
        SharedMemory(tuple(p), tuple(f), torch.full((len(f[0]),), FIRST, dtype=torch.int32), rank)
        for p, f in zip(places, flags, strict=True)
    )
    ranks = len(told)
    for call, (rows, width) in enumerate(SIZES):
        routing = _drawn(rank, call + 50, rows, TOP_K).view(torch.int32)
        found = push_rows.push_gather(_drawn(rank, call, rows, width), routing, there)
        wanted = [
            torch.cat([_drawn(r, call + more, rows, w) for r in range(ranks)])
            for more, w in ((0, width), (50, TOP_K))
        ]
        same = torch.equal(found[0], wanted[0])
        same = same and torch.equal(found[1].view(torch.float32), wanted[1])
        parts = [_drawn(r, call + 70, ranks * rows, width) for r in range(ranks)]
        summed = push_rows.push_scatter(parts[rank], back)
        whole = torch.stack(parts).double().sum(0).chunk(ranks)[rank]
        told[rank, call, 0] = float(same)
        told[rank, call, 1] = float((summed.double() - whole).abs().max())


def check_ranks(ranks: int) -> None:
    most = ranks * max(rows * (width + TOP_K) for rows, width in SIZES)
    places = [
        [torch.full((most,), torch.nan).view(dtype) for _ in range(ranks)]
        for dtype in (torch.int32, torch.float32)
    ]
    flags = [
        [torch.full((PROGRAMS, ranks), FIRST, dtype=torch.int32) for _ in range(ranks)]
        for _ in range(2)
    ]
    told = torch.full((ranks, len(SIZES), 2), torch.nan)
    for tensor in (*places[0], *places[1], *flags[0], *flags[1], told):
        tensor.share_memory_()
    mp.spawn(_rank, args=(places, flags, told), nprocs=ranks)
    assert told[..., 0].eq(1).all(), told
    assert told[..., 1].lt(2**-20).all(), told


if __name__ == "__main__":
    for count in (2, 3):
        check_ranks(count)
    sys.exit(0)
