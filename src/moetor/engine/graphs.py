"""CUDA graphs of the decoding step, one for each of some batch sizes.

A graph holds the copy of the sampled tokens from the step before, the model, and the choice of the
likeliest token; the host only fills one buffer. Steps between two sizes run in the larger one, with
rows that belong to nobody: they read and write block 0 and the last row of the tables.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moetor.engine.batch import HostInputs
from moetor.engine.cache import Batch

_BUFFERS = 3
# ids, positions, rows, slots, lengths
_COLUMNS = 5

Captured = TypeVar("Captured")
Decode = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
"""ids [S], positions [S], rows [S], batch -> logits [S, V]."""


def graph_sizes(most: int) -> list[int]:
    """Batch sizes to capture: all small ones, then steps of about an eighth."""
    sizes = [size for size in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32) if size < most]
    size = 40
    while size < most:
        sizes.append(size)
        size += 8 if size < 64 else 16 if size < 128 else 32 if size < 512 else 64
    return [*sizes, most]


@dataclass(slots=True)
class _Graph:
    """One captured size.

    Attributes:
        given: int32, on the device: columns of each row, then the block table.
        hosts: pinned buffers that take turns, because a copy may still be waiting.
        kept: tensors from outside of the graph's own memory that it reads: they must live as long
            as it does.
    """

    size: int
    replay: Callable[[], None]
    given: Tensor
    hosts: list[Tensor]
    logits: Tensor
    tokens: Tensor
    kept: tuple[Tensor, ...]
    turn: int = 0

    def fill(self, host: HostInputs, spare_row: int) -> None:
        """Gives the graph the inputs of a step."""
        buffer = self.hosts[self.turn]
        self.turn = (self.turn + 1) % _BUFFERS
        view: npt.NDArray[np.int32] = buffer.numpy()
        count, size = len(host.rows_S), self.size
        columns = view[: _COLUMNS * size].reshape(_COLUMNS, size)
        given = (host.ids_T, host.positions_T, host.rows_S, host.slots_T, host.lens_S)
        for row, array in enumerate(given):
            columns[row, :count] = array
        columns[:, count:] = np.array([[0], [0], [spare_row], [0], [1]], dtype=np.int32)
        table = view[_COLUMNS * size :].reshape(size, -1)
        table[:count, : host.table_SM.shape[1]] = host.table_SM
        table[count:, 0] = 0
        self.given.copy_(buffer, non_blocking=True)


def capture_all(
    sizes: list[int],
    capture: Callable[[int, Any], Captured],
    graphs: dict[int, Captured],
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills `graphs` with every size, the largest first: the smaller ones fit into its memory.

    Args:
        capture: a graph of a size, from the size and the pool of memory that all share.
        progress: called with (sizes done, sizes in all).
    """
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for done, size in enumerate(sorted(sizes, reverse=True)):
        if progress is not None:
            progress(done, len(sizes))
        graphs[size] = capture(size, pool)
    if progress is not None:
        progress(len(sizes), len(sizes))


class DecodeGraphs:
    """Captures and replays.

    Args:
        decode: the model call.
        last_token_P: token that each row sampled last; its last row belongs to nobody.
        max_blocks: of a sequence.
        sizes: to capture.
    """

    def __init__(
        self, decode: Decode, last_token_P: Tensor, *, max_blocks: int, sizes: list[int]
    ) -> None:
        self._decode, self._last_token_P = decode, last_token_P
        self._max_blocks, self._sizes = max_blocks, sizes
        self._graphs: dict[int, _Graph] = {}

    @property
    def sizes(self) -> list[int]:
        """The captured ones."""
        return sorted(self._graphs)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Captures every size."""
        capture_all(self._sizes, self._capture, self._graphs, self._last_token_P.device, progress)

    def run(self, host: HostInputs, at_least: int = 0) -> tuple[Tensor, Tensor] | None:
        """Logits [S, V] and likeliest tokens [S] of a step in which every sequence has one token;
        they last until the next run. None where the step is larger than any graph.

        Args:
            at_least: the graph's size, where other ranks replay a larger one.
        """
        count = len(host.rows_S)
        place = bisect.bisect_left(self._sizes, max(count, at_least))
        if place == len(self._sizes):
            return None
        graph = self._graphs[self._sizes[place]]
        graph.fill(host, self._last_token_P.shape[0] - 1)
        graph.replay()
        return graph.logits[:count], graph.tokens[:count]

    def _capture(self, size: int, pool: Any) -> _Graph:
        device = self._last_token_P.device
        length = size * (_COLUMNS + self._max_blocks)
        given = torch.zeros(length, dtype=torch.int32, device=device)
        columns = given[: _COLUMNS * size].view(_COLUMNS, size)
        columns[2] = self._last_token_P.shape[0] - 1
        columns[4] = 1
        table = given[_COLUMNS * size :].view(size, self._max_blocks)
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)

        def step() -> tuple[Tensor, Tensor]:
            ids, positions, rows, slots, lens = columns.unbind()
            rows = rows.long()
            ids = torch.where(ids < 0, self._last_token_P[rows], ids.long())
            batch = Batch(
                slots_T=slots.long(),
                block_table_SM=table,
                seq_lens_S=lens,
                query_start_S1=starts,
                num_decodes=size,
                max_query_len=1,
            )
            logits = self._decode(ids, positions.long(), rows, batch)
            tokens = logits.argmax(-1)
            self._last_token_P.index_copy_(0, rows, tokens)
            return logits, tokens

        replay, (logits, tokens) = record(step, device, pool)
        pinned = device.type == "cuda"
        hosts = [torch.zeros(length, dtype=torch.int32, pin_memory=pinned) for _ in range(_BUFFERS)]
        return _Graph(size, replay, given, hosts, logits, tokens, (starts, self._last_token_P))


def record(
    step: Callable[[], tuple[Tensor, ...]], device: torch.device, pool: Any
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Captures what `step` launches.

    Args:
        pool: memory that graphs share which never run at the same time.

    Returns:
        A call that launches it again, and the tensors that it fills each time.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # kernels are compiled and workspaces made outside of the capture
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events from another thread meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        filled = step()
    return graph.replay, filled
