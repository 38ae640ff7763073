"""Tokens to all GPUs of one machine and sums back, each in one launch, through shared memory.

Shape letters: N rows of a rank, H width, K top_k, R ranks.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moetor.kernels.triton.push_rows import PROGRAMS, push_gather, push_scatter
from moetor.kernels.triton.push_sum import SharedMemory
from moetor.parallel.small_sums import DTYPES, ERROR, SharedTensors, first_reason, why_not_shared

MOST_BYTES = 256 * 2**20
"""Of memory for the rows that arrive, and as much again for those that return."""


class DirectRows:
    """The all-gathers and reduce-scatters of one group, which take turns, on one stream.

    The memory grows with the longest exchange so far: what was captured in a graph keeps its own.

    Args:
        group: ranks of one machine; every rank must make it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._shared = group, SharedTensors(group, device)
        self._room = (0, 0)
        self._ways: tuple[SharedMemory, SharedMemory] | None = None
        self._sizes = (0, 0)
        self._busy = False

    def takes(self, rows_NH: Tensor, routing_NK: Tensor, like: Tensor) -> bool:
        """Whether an exchange of such rows goes this way; the same on all ranks.

        Args:
            rows_NH: what is sent.
            like: [N, H], of the width and dtype of what returns.
        """
        ranks = self._group.size()
        there = ranks * (rows_NH.numel() * rows_NH.element_size() + 4 * routing_NK.numel())
        back = ranks * like.shape[1] * rows_NH.shape[0] * like.element_size()
        return (
            not self._busy
            and 0 < max(there, back) <= MOST_BYTES
            and rows_NH.shape[1] * rows_NH.element_size() % 4 == 0
            and like.dtype in DTYPES
            and self._reserve(there, back)
        )

    def gather(self, rows_NH: Tensor, routing_NK: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' rows and routing, to be read before `scatter`, which must follow."""
        assert self._ways is not None, "takes comes first"
        self._busy = True
        return push_gather(rows_NH.contiguous(), routing_NK.contiguous(), self._ways[0])

    def scatter(self, parts_NH: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks."""
        assert self._ways is not None, "gather comes first"
        self._busy = False
        memory = self._ways[1]
        places_R = tuple(place.view(parts_NH.dtype) for place in memory.places_R)
        typed = SharedMemory(places_R, memory.flags_R, memory.epochs_P, memory.rank)
        return push_scatter(parts_NH.contiguous(), typed)

    def _reserve(self, there: int, back: int) -> bool:
        """Room for so many bytes; False while a graph is captured, which cannot wait for ranks."""
        if self._ways is not None and there <= self._room[0] and back <= self._room[1]:
            return True
        if torch.cuda.is_current_stream_capturing():
            return False
        self._room = max(there, self._room[0]), max(back, self._room[1])
        self._ways = self._way(self._room[0], torch.int32), self._way(self._room[1], torch.uint8)
        self._shared.meet()
        return True

    def _way(self, size: int, dtype: torch.dtype) -> SharedMemory:
        count = -(-size // 16) * 16 // dtype.itemsize
        return self._shared.memory((count,), dtype, PROGRAMS)


_of: WeakKeyDictionary[dist.ProcessGroup, DirectRows] = WeakKeyDictionary()


def direct_rows(group: dist.ProcessGroup) -> DirectRows | None:
    """How a group's tokens travel directly; None where `start_direct_rows` found no way."""
    return _of.get(group)


def start_direct_rows(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Makes and tries the direct way; why there is none, the same on every rank, or None."""
    reason = why_not_shared(group, device)
    if reason is not None:
        return reason
    made, failure = DirectRows(group, device), None
    tried: list[str] = []
    try:
        tried = _wrong(made, group, device)
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        failure = f"memory cannot be shared: {lines[0]}"
    reason = first_reason(failure or (tried[0] if tried else None), group)
    if reason is None:
        _of[group] = made
    return reason


def _wrong(rows: DirectRows, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """What differs from the group's own collectives."""
    generator = torch.Generator(device).manual_seed(group.rank())
    found: list[str] = []

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    for dtype in DTYPES:
        for count, width in ((1, 8), (3, 1000), (700, 2048)):
            own, routing = drawn(count, width).to(dtype), drawn(count, 6).view(torch.int32)
            assert rows.takes(own, routing, own), "so little has room"
            for ours, mine in zip(rows.gather(own, routing), (own, routing), strict=True):
                theirs = [torch.empty_like(mine) for _ in range(group.size())]
                dist.all_gather(theirs, mine, group=group)
                if not torch.equal(ours, torch.cat(theirs)):
                    found.append(f"of {count} x {width} {dtype} other rows arrive")
            parts = drawn(group.size() * count, width).to(dtype)
            whole = parts.double()
            dist.all_reduce(whole, group=group)
            wanted = whole.chunk(group.size())[group.rank()]
            allowed = group.size() * ERROR[dtype] * float(wanted.abs().max())
            if float((rows.scatter(parts).double() - wanted).abs().max()) > allowed:
                found.append(f"of {count} x {width} {dtype} other sums return")
    return found
