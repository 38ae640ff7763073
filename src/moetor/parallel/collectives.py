"""The collectives that dispatchers use, started and awaited apart.

`torch.distributed` renames two of them in newer releases; this is the one place that knows. Shape
letters: R ranks, N rows, H row width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from moetor.errors import UnsupportedError
from moetor.parallel.small_sums import small_sums

_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_traced_gather: Callable[..., Tensor] = getattr(
    functional, "all_gather_single", functional.all_gather_tensor
)


class Started:
    """A collective under way: its result, and the input that must live until then."""

    def __init__(self, result: Tensor, work: Any, source: Tensor) -> None:
        self._result = result
        self._work = work
        self._source: Tensor | None = source

    def wait(self) -> Tensor:
        """The result; on CUDA the current stream waits, not the host."""
        if self._source is not None:
            self._work.wait()
            self._source = None
        return self._result


def start_all_gather(rows_NH: Tensor, group: dist.ProcessGroup) -> Started:
    """[N, H] of every rank as [R * N, H], in rank order."""
    rows_NH = rows_NH.contiguous()
    shape = (rows_NH.shape[0] * group.size(), *rows_NH.shape[1:])
    result = rows_NH.new_empty(shape)
    return Started(result, _gather(result, rows_NH, group=group, async_op=True), rows_NH)


def start_reduce_scatter(rows_NH: Tensor, group: dist.ProcessGroup) -> Started:
    """This rank's [N / R, H] of the sum over ranks."""
    rows_NH = rows_NH.contiguous()
    result = rows_NH.new_empty((rows_NH.shape[0] // group.size(), *rows_NH.shape[1:]))
    return Started(result, _scatter(result, rows_NH, group=group, async_op=True), rows_NH)


def start_all_to_all(
    rows_NH: Tensor,
    group: dist.ProcessGroup,
    sent: list[int] | None = None,
    received: list[int] | None = None,
) -> Started:
    """Rows to every rank, in rank order: equal shares, or as many as the lists say."""
    rows_NH = rows_NH.contiguous()
    count = rows_NH.shape[0] if received is None else sum(received)
    result = rows_NH.new_empty((count, *rows_NH.shape[1:]))
    work = dist.all_to_all_single(result, rows_NH, received, sent, group=group, async_op=True)
    return Started(result, work, rows_NH)


def all_reduce(partial_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' partial results, which may take the argument's own memory: for a tensor
    that nobody else reads. `torch.compile` traces it, as a new tensor.
    """
    if torch.compiler.is_compiling():
        return _waited(functional.all_reduce(partial_TH, "sum", group))
    # The traceable one would copy first, and on CUDA go over another stream and back.
    partial_TH = partial_TH.contiguous()
    sums = small_sums(group)
    if sums is not None and sums.takes(partial_TH):
        return sums(partial_TH)
    dist.all_reduce(partial_TH, group=group)
    return partial_TH


def all_gather(rows_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, H] of every rank as [R * T, H]; traceable by `torch.compile`."""
    if torch.compiler.is_compiling():
        return _waited(_traced_gather(rows_TH, 0, group))
    result = rows_TH.new_empty((rows_TH.shape[0] * group.size(), *rows_TH.shape[1:]))
    _gather(result, rows_TH.contiguous(), group=group)
    return result


def gather_columns(part: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
    """[..., N] of every rank side by side, as [..., width].

    Args:
        part: its columns; each rank has width / R of them, rounded up, and what remains is on the
            last ones, as `torch.chunk` gives them.
    """
    ranks = group.size()
    most = -(-width // ranks)
    rows = part.reshape(-1, part.shape[-1])
    if rows.shape[1] < most:
        rows = torch.nn.functional.pad(rows, (0, most - rows.shape[1]))
    gathered_RTN = all_gather(rows, group).view(ranks, -1, most)
    side_by_side = gathered_RTN.transpose(0, 1).reshape(-1, ranks * most)
    return side_by_side[:, :width].reshape(*part.shape[:-1], width)


def _waited(result: Tensor) -> Tensor:
    """A plain tensor: one that waits when it is first used must not leave a layer, since whoever
    gets it may send its memory elsewhere without using it.
    """
    if isinstance(result, functional.AsyncCollectiveTensor):
        waited: Tensor = result.wait()
        return waited
    return result


def host_agree(value: int, op: Any, group: dist.ProcessGroup, device: torch.device) -> int:
    """The least or largest of the ranks' values, on the host.

    Raises:
        UnsupportedError: while a CUDA graph is captured, which must not wait for the host.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "ranks exchange their token counts on the host, which a CUDA graph cannot hold; give "
            "ParallelConfig(max_tokens_per_rank=...) or run the call inside agreed_rows(...)"
        )
    told = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(told, op=op, group=group)
    return int(told.item())
