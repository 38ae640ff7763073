"""Which tokens may come next in the texts of a step that must have a form.

Shape letters: G rows with a grammar, W words of 32 bits for the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moetor.engine.sequence import Scheduled

Words = npt.NDArray[np.int32]


def allowed_tokens(parts: Items[Scheduled]) -> Tensor:
    """Bits of the tokens that may come next, int32 [G, W] on the host, the lowest bit first.

    End tokens are left out before `min_tokens` and under `ignore_eos`, unless nothing else may
    come.

    Args:
        parts: G of them, each with a grammar.
    """
    from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

    grammars = [part.sequence.grammar for part in parts]
    assert grammars[0] is not None
    compiler = grammars[0].compiler
    words = -(-compiler.tokens().vocab_size // 32)
    pinned = torch.cuda.is_available()
    masks = torch.empty((len(parts), words), dtype=torch.int32, pin_memory=pinned)
    view: Words = masks.numpy()
    if len(grammars) == 1:
        fill_next_token_bitmask(grammars[0].matcher, view)
    else:
        rows = [(grammar.matcher, row) for row, grammar in enumerate(grammars) if grammar]
        fill_next_token_bitmask_par(compiler.executor(), rows, view)
    for row, part in zip(view, parts, strict=True):
        params = part.sequence.params
        if part.position < params.min_tokens:
            _leave_out(row, part.sequence.ends)
        elif params.ignore_eos:
            _leave_out(row, compiler.ends)
    return masks


def _leave_out(row: Words, tokens: Iterable[int]) -> None:
    """Clears the bits of `tokens`, unless no bit would be left."""
    left = row.view(np.uint32).copy()
    for token in tokens:
        left[token // 32] &= ~np.uint32(1 << token % 32)
    if left.any():
        row[:] = left.view(np.int32)
