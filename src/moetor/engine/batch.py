"""From a step's parts to the tensors of a model call.

Shape letters: T tokens, S parts, M blocks of the longest sequence, P rows of the tables.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moetor.engine.cache import Batch
from moetor.engine.sequence import Scheduled

Ints = npt.NDArray[np.int32]


class BlockTable:
    """Host copy of every running sequence's blocks, int32 [P, M].

    Args:
        rows: P.
        max_blocks: M, of a sequence of the greatest length.
        block_size: tokens of a block.
    """

    def __init__(self, rows: int, max_blocks: int, block_size: int) -> None:
        self.table = np.zeros((rows, max_blocks), dtype=np.int32)
        self.block_size = block_size

    def update(self, parts: Items[Scheduled]) -> None:
        """Writes the blocks that the parts' sequences got since the last time."""
        for part in parts:
            sequence = part.sequence
            written, blocks = sequence.written_blocks, sequence.blocks
            if written < len(blocks):
                self.table[sequence.row, written : len(blocks)] = blocks[written:]
                sequence.written_blocks = len(blocks)


def kept_rows(part: Scheduled) -> int:
    """For how many of a part's last tokens logits are needed."""
    wants_prompt = part.sequence.params.prompt_logprobs is not None
    if wants_prompt and part.start < part.sequence.prompt_len:
        return part.count
    return int(part.samples)


@dataclass(frozen=True, slots=True)
class HostInputs:
    """A call's inputs on the host; int32 all.

    Attributes:
        ids_T: token ids, -1 where the token is known on the device alone.
        positions_T: in their sequences.
        rows_T: the table row of each token.
        slots_T: place in the cache.
        rows_S, lens_S, counts_S: of each part: its row, its tokens with the new ones, the new ones.
        table_SM: blocks of each part.
        keep: tokens whose logits are needed.
    """

    ids_T: Ints
    positions_T: Ints
    rows_T: Ints
    slots_T: Ints
    rows_S: Ints
    lens_S: Ints
    counts_S: Ints
    table_SM: Ints
    keep: Ints


def host_inputs(parts: Items[Scheduled], blocks: BlockTable) -> HostInputs:
    """The inputs of a model call over `parts`, single tokens first."""
    rows = np.array([part.sequence.row for part in parts], dtype=np.int32)
    starts = np.array([part.start for part in parts], dtype=np.int32)
    counts = np.array([part.count for part in parts], dtype=np.int32)
    ids: list[int] = []
    for part in parts:
        if part.pending:
            ids.append(-1)
        elif part.count == 1:
            ids.append(part.sequence.token_ids[part.start])
        else:
            ids += part.sequence.token_ids[part.start : part.start + part.count]
    firsts = np.cumsum(counts, dtype=np.int32) - counts
    positions = np.arange(len(ids), dtype=np.int32) + np.repeat(starts - firsts, counts)
    rows_T = np.repeat(rows, counts)
    size = blocks.block_size
    slots = blocks.table[rows_T, positions // size] * size + positions % size
    lens = starts + counts
    width = -(-int(lens.max()) // size)
    keep: list[int] = []
    for part, first in zip(parts, firsts.tolist(), strict=True):
        last = first + part.count
        keep += range(last - kept_rows(part), last)
    return HostInputs(
        ids_T=np.array(ids, dtype=np.int32),
        positions_T=positions,
        rows_T=rows_T,
        slots_T=slots.astype(np.int32),
        rows_S=rows,
        lens_S=lens,
        counts_S=counts,
        table_SM=blocks.table[rows, :width],
        keep=np.array(keep, dtype=np.int32),
    )


def no_inputs() -> HostInputs:
    """The inputs of a step in which nobody has a token."""
    none = np.zeros(0, dtype=np.int32)
    return HostInputs(
        ids_T=none,
        positions_T=none,
        rows_T=none,
        slots_T=none,
        rows_S=none,
        lens_S=none,
        counts_S=none,
        table_SM=np.zeros((0, 1), dtype=np.int32),
        keep=none,
    )


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """The same on the device: what the model is called with."""

    ids_T: Tensor
    positions_T: Tensor
    rows_S: Tensor
    keep: Tensor
    batch: Batch


def tokens_apart(host: HostInputs) -> HostInputs:
    """The same with each token as a part of its own, whose sequence ends with it: attention then
    computes it as it computes a single token, whatever came in the same step.
    """
    part_T = np.repeat(np.arange(len(host.counts_S)), host.counts_S)
    return replace(
        host,
        rows_S=host.rows_T,
        lens_S=host.positions_T + 1,
        counts_S=np.ones_like(host.rows_T),
        table_SM=host.table_SM[part_T],
    )


def device_inputs(host: HostInputs, last_token_P: Tensor, *, any_pending: bool) -> DeviceInputs:
    """Moves the inputs in one copy.

    Args:
        host: the inputs.
        last_token_P: the token that each row sampled last.
        any_pending: whether some token is known on the device alone.
    """
    device = last_token_P.device
    starts = np.concatenate(([0], np.cumsum(host.counts_S))).astype(np.int32)
    arrays = (
        host.ids_T,
        host.positions_T,
        host.rows_T,
        host.slots_T,
        host.rows_S,
        host.lens_S,
        starts,
        host.keep,
        host.table_SM.reshape(-1),
    )
    packed = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split([len(array) for array in arrays])
    ids, positions, rows_T, slots, rows_S, lens, begins, keep, table = parts
    ids = ids.long()
    if any_pending:
        ids = torch.where(ids < 0, last_token_P[rows_T.long()], ids)
    decodes = int((host.counts_S == 1).sum())
    mixed = device.type == "cuda" and 0 < decodes < len(host.counts_S)
    batch = Batch(
        slots_T=slots.long(),
        block_table_SM=table.view(len(host.rows_S), -1),
        seq_lens_S=lens,
        query_start_S1=begins,
        num_decodes=decodes,
        max_query_len=int(host.counts_S.max()),
        fresh=decodes < len(host.counts_S) and bool((host.lens_S == host.counts_S)[decodes:].all()),
        prompt_start_S1=begins[decodes:] - decodes if mixed else None,
        lens=host.lens_S.tolist(),
        query_lens=host.counts_S.tolist(),
    )
    return DeviceInputs(ids, positions.long(), rows_S.long(), keep.long(), batch)
