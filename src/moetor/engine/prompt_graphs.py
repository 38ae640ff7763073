"""CUDA graphs of steps with prompts, one for each of some numbers of tokens.

Launching a model's kernels one by one takes the host about as long as a GPU needs for some thousand
tokens, so that short prompts wait for the host, and the texts that grow beside them too. A graph
holds a step of up to T tokens of up to S sequences; tokens and sequences that are not there write
nowhere, and nobody reads what they compute.

Shape letters: T tokens, S sequences, M blocks of the longest sequence, P rows of the tables.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moetor.engine import graphs
from moetor.engine.batch import HostInputs
from moetor.engine.cache import Batch

_SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_BUFFERS = 3
# ids, positions, rows, slots of a token; length and first token of a sequence, and of what is
# sampled its token and its row.
_OF_TOKEN, _OF_SEQUENCE = 4, 4

Prompts = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
"""ids [T], positions [T], tokens whose logits are needed [S], batch -> logits [S, V]."""


def prompt_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens to capture, for steps of at most `max_tokens`."""
    sizes = [size for size in _SIZES if size < max_tokens]
    return [*sizes, max_tokens] if max_tokens <= _SIZES[-1] else sizes


@dataclass(slots=True)
class _Graph:
    """One captured size; see `graphs._Graph`."""

    replay: Callable[[], None]
    given: Tensor
    hosts: list[Tensor]
    turn: int = 0


class PromptGraphs:
    """Captures and replays.

    Args:
        compute: the model call.
        likeliest: tokens [S] of what it gives.
        last_token_P: token that each row sampled last; its last row belongs to nobody.
        sequences: S.
        max_blocks: M.
        sizes: numbers of tokens to capture.
    """

    def __init__(
        self,
        compute: Prompts,
        likeliest: Callable[[Tensor], Tensor],
        last_token_P: Tensor,
        *,
        sequences: int,
        max_blocks: int,
        sizes: list[int],
    ) -> None:
        self._compute, self._likeliest, self._last_token_P = compute, likeliest, last_token_P
        self._sequences, self._max_blocks, self._sizes = sequences, max_blocks, sizes
        self._graphs: dict[int, _Graph] = {}
        # All graphs fill the same ones: a vocabulary's logits for each would be a lot of memory.
        self._logits_SV: Tensor | None = None
        self._tokens_S = last_token_P.new_zeros(sequences)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Captures every size."""
        graphs.capture_all(
            self._sizes, self._capture, self._graphs, self._last_token_P.device, progress
        )

    def holds(self, tokens: int, sequences: int) -> bool:
        """Whether some graph has room for so many."""
        return tokens <= self._sizes[-1] and sequences <= self._sequences

    def run(self, host: HostInputs) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and likeliest tokens [N] of the N tokens `host.keep`, of a step that a
        graph has room for; they last until the next run.
        """
        size = self._sizes[bisect.bisect_left(self._sizes, len(host.ids_T))]
        graph = self._graphs[size]
        buffer = graph.hosts[graph.turn]
        graph.turn = (graph.turn + 1) % _BUFFERS
        end = self._fill(buffer.numpy(), host, size)
        graph.given[:end].copy_(buffer[:end], non_blocking=True)
        graph.replay()
        assert self._logits_SV is not None
        return self._logits_SV[: len(host.keep)], self._tokens_S[: len(host.keep)]

    def _fill(self, view: npt.NDArray[np.int32], host: HostInputs, size: int) -> int:
        """Writes a step's inputs; how many numbers of the buffer are to be copied."""
        tokens, sequences, kept = len(host.ids_T), len(host.rows_S), len(host.keep)
        spare = self._last_token_P.shape[0] - 1
        at = _OF_TOKEN * size
        columns = view[:at].reshape(_OF_TOKEN, size)
        given = (host.ids_T, host.positions_T, host.rows_T, host.slots_T)
        for row, array in enumerate(given):
            columns[row, :tokens] = array
        columns[:, tokens:] = np.array([[0], [0], [spare], [-1]], dtype=np.int32)
        table_at = at + _OF_SEQUENCE * self._sequences + 1
        lens, keep, rows, starts = self._parts(view[at:table_at])
        lens[:sequences], lens[sequences:] = host.lens_S, 1
        keep[:kept], keep[kept:] = host.keep, 0
        # The row of a kept token is the one of the sequence that it belongs to.
        rows[:kept], rows[kept:] = host.rows_T[host.keep], spare
        starts[0] = 0
        np.cumsum(host.counts_S, out=starts[1 : sequences + 1])
        starts[sequences + 1 :] = tokens
        width = host.table_SM.shape[1]
        end = table_at + sequences * self._max_blocks
        table = view[table_at:end].reshape(sequences, self._max_blocks)
        table[:, :width] = host.table_SM
        return end

    def _parts(self, view: Any) -> tuple[Any, Any, Any, Any]:
        """Lengths, kept tokens and their rows, S each, and S + 1 starts, of an array or tensor."""
        size = self._sequences
        return view[:size], view[size : 2 * size], view[2 * size : 3 * size], view[3 * size :]

    def _capture(self, size: int, pool: Any) -> _Graph:
        device, sequences = self._last_token_P.device, self._sequences
        at = _OF_TOKEN * size
        table_at = at + _OF_SEQUENCE * sequences + 1
        length = table_at + sequences * self._max_blocks
        given = torch.zeros(length, dtype=torch.int32, device=device)
        columns = given[:at].view(_OF_TOKEN, size)
        lens, keep, rows, starts = self._parts(given[at:table_at])
        # Tokens of no sequence, whose keys go nowhere.
        columns[3], lens[:] = -1, 1
        rows[:] = self._last_token_P.shape[0] - 1
        table = given[table_at:].view(sequences, self._max_blocks)

        def step() -> tuple[Tensor, Tensor]:
            ids, positions, token_rows, slots = columns.unbind()
            ids = torch.where(ids < 0, self._last_token_P[token_rows.long()], ids.long())
            batch = Batch(
                slots_T=slots.long(),
                block_table_SM=table,
                seq_lens_S=lens,
                query_start_S1=starts,
                num_decodes=0,
                max_query_len=size,
                padded=True,
            )
            logits = self._compute(ids, positions.long(), keep.long(), batch)
            if self._logits_SV is None:  # in the first run, which is not captured
                self._logits_SV = torch.empty_like(logits)
            self._tokens_S.copy_(self._likeliest(logits))
            self._last_token_P.index_copy_(0, rows.long(), self._tokens_S)
            return self._logits_SV.copy_(logits), self._tokens_S

        replay, _ = graphs.record(step, device, pool)
        pinned = device.type == "cuda"
        hosts = [torch.zeros(length, dtype=torch.int32, pin_memory=pinned) for _ in range(_BUFFERS)]
        return _Graph(replay, given, hosts)
