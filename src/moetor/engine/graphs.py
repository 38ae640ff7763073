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


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Views of one buffer, in the dtypes that operations take, so that a graph converts nothing.

    Attributes:
        ids_S, positions_S, rows_S, slots_S: int64.
        lens_S: int32.
        table_SM: int32, blocks.
        pending_S: bool, whether the id is the token that the row sampled last.
    """

    ids_S: Tensor
    positions_S: Tensor
    rows_S: Tensor
    slots_S: Tensor
    lens_S: Tensor
    table_SM: Tensor
    pending_S: Tensor

    @classmethod
    def of(cls, buffer: Tensor, size: int, max_blocks: int) -> _Inputs:
        """Those of a buffer int32 of the length that `length` gives."""
        wide, lens, table, flags = buffer.split([8 * size, size, size * max_blocks, -(-size // 4)])
        ids, positions, rows, slots = wide.view(torch.int64).view(4, size)
        pending = flags.view(torch.bool)[:size]
        return cls(ids, positions, rows, slots, lens, table.view(size, max_blocks), pending)

    @staticmethod
    def length(size: int, max_blocks: int) -> int:
        """Of a buffer, in numbers of int32."""
        return 9 * size + size * max_blocks + -(-size // 4)

    def fill(self, host: HostInputs, spare_row: int) -> None:
        """Writes a step's inputs; rows behind them belong to nobody."""
        count = len(host.rows_S)
        ids: npt.NDArray[np.int64] = self.ids_S.numpy()
        pending: npt.NDArray[np.bool_] = self.pending_S.numpy()
        np.maximum(host.ids_T, 0, out=ids[:count])
        np.less(host.ids_T, 0, out=pending[:count])
        ids[count:], pending[count:] = 0, False
        columns = (
            (self.positions_S, host.positions_T, 0),
            (self.rows_S, host.rows_S, spare_row),
            (self.slots_S, host.slots_T, 0),
            (self.lens_S, host.lens_S, 1),
        )
        for tensor, given, nobody in columns:
            column: npt.NDArray[Any] = tensor.numpy()
            column[:count], column[count:] = given, nobody
        table: npt.NDArray[np.int32] = self.table_SM.numpy()
        table[:count, : host.table_SM.shape[1]] = host.table_SM
        table[count:, 0] = 0


@dataclass(slots=True)
class _Graph:
    """One captured size.

    Attributes:
        given: on the device, what the graph reads.
        hosts: pinned buffers that take turns, because a copy may still be waiting; and their views.
        kept: tensors from outside of the graph's own memory that it reads: they must live as long
            as it does.
    """

    size: int
    replay: Callable[[], None]
    given: Tensor
    hosts: list[tuple[Tensor, _Inputs]]
    logits: Tensor
    tokens: Tensor
    kept: tuple[Tensor, ...]
    turn: int = 0

    def fill(self, host: HostInputs, spare_row: int) -> None:
        """Gives the graph the inputs of a step, in one copy."""
        buffer, views = self.hosts[self.turn]
        self.turn = (self.turn + 1) % _BUFFERS
        views.fill(host, spare_row)
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
        likeliest: tokens [S] of what it gives.
        last_token_P: token that each row sampled last; its last row belongs to nobody.
        max_blocks: of a sequence.
        sizes: to capture.
    """

    def __init__(
        self,
        decode: Decode,
        likeliest: Callable[[Tensor], Tensor],
        last_token_P: Tensor,
        *,
        max_blocks: int,
        sizes: list[int],
    ) -> None:
        self._decode, self._likeliest, self._last_token_P = decode, likeliest, last_token_P
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
        length = _Inputs.length(size, self._max_blocks)
        given = torch.zeros(length, dtype=torch.int32, device=device)
        inputs = _Inputs.of(given, size, self._max_blocks)
        inputs.rows_S.fill_(self._last_token_P.shape[0] - 1)
        inputs.lens_S.fill_(1)
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)

        def step() -> tuple[Tensor, Tensor]:
            rows = inputs.rows_S
            ids = torch.where(inputs.pending_S, self._last_token_P[rows], inputs.ids_S)
            batch = Batch(
                slots_T=inputs.slots_S,
                block_table_SM=inputs.table_SM,
                seq_lens_S=inputs.lens_S,
                query_start_S1=starts,
                num_decodes=size,
                max_query_len=1,
            )
            logits = self._decode(ids, inputs.positions_S, rows, batch)
            tokens = self._likeliest(logits)
            self._last_token_P.index_copy_(0, rows, tokens)
            return logits, tokens

        replay, (logits, tokens) = record(step, device, pool)
        pinned = device.type == "cuda"
        hosts = []
        for _ in range(_BUFFERS):
            buffer = torch.zeros(length, dtype=torch.int32, pin_memory=pinned)
            hosts.append((buffer, _Inputs.of(buffer, size, self._max_blocks)))
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
