"""Library operations whose result for a token does not depend on the other tokens.

A library may round a row otherwise when a product has another number of rows, when an elementwise
operation meets it in the scalar tail of its vector loop, when a thread's part begins within it, or
when its first element lies elsewhere within a cache line (MKL on AMD processors). Blocks of a fixed
number of rows, every row at the start of a line, take all four away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# A multiple of every vector width, so that a block of this many rows has no scalar tail.
_ROWS = 32
_LINE_BYTES = 64
# Elementwise operations of torch on the CPU are cut between threads above this many elements.
_THREAD_GRAIN = 32768


def in_fixed_blocks(function: Callable[[Tensor], Tensor], rows_TX: Tensor, width: int) -> Tensor:
    """`function(rows_TX)`, computed in blocks of fixed size that are filled up with zero rows.

    Args:
        function: acts on each row by itself, [T, X] to [T, Y].
        width: the widest row that it makes on the way; others that it makes are as wide or half of
            it. Beyond 1024 a block is a single row, since more of them would be cut between
            threads; so it is on a CPU where rows do not fill whole cache lines.
    """
    tokens = rows_TX.shape[0]
    if tokens == 0:
        return function(rows_TX)
    size = rows_TX.element_size()
    whole = rows_TX.shape[1] * size % _LINE_BYTES == 0 and width * size % (2 * _LINE_BYTES) == 0
    if _ROWS * width > _THREAD_GRAIN or not (whole or rows_TX.is_cuda):
        # A copy of a row begins a cache line, as every new tensor does.
        return torch.cat([function(row.clone()) for row in rows_TX.split(1)])
    padded = F.pad(rows_TX, (0, 0, 0, -tokens % _ROWS))
    blocks: tuple[Tensor, ...] = padded.split(_ROWS)
    return torch.cat([function(block) for block in blocks])[:tokens]
