"""Rotary positions read from a table in decoding graphs, where computing them takes ten launches.

Shape letters: T tokens, P positions, R elements of a head that turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Their frequencies do not depend on the text's length.
_FIXED = ("default", "linear", "llama3", "yarn")
_MAX_BYTES = 64 * 2**20
_TRIED = 16


class RotaryTables:
    """The cosines and sines of a model's rotary modules for every position of a sequence.

    A module is left as it is where its frequencies depend on the text, where it is called with
    something else than positions, where its table would be large, or where a row of the table is
    not, to the last bit, what the module gives for that position alone.

    Args:
        model: whose modules are looked through.
        positions: P.
    """

    def __init__(self, model: nn.Module, positions: int) -> None:
        self._tables: list[tuple[nn.Module, Tensor]] = []
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        for module in model.modules():
            table = _table(module, positions, dtype)
            if table is not None:
                self._tables.append((module, table))

    def __len__(self) -> int:
        return len(self._tables)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Modules read their tables inside the `with` block; positions must be below P."""
        for module, table in self._tables:
            module.forward = partial(_look_up, module, table)
        try:
            yield
        finally:
            for module, _ in self._tables:
                del module.forward


def _look_up(
    module: nn.Module, table_PR: Tensor, x: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    if x.dtype != table_PR.dtype or position_ids.dim() != 2:
        found: tuple[Tensor, Tensor] = type(module).forward(module, x, position_ids)
        return found
    rows = table_PR.index_select(0, position_ids.flatten())
    cos, sin = rows.view(*position_ids.shape, -1).chunk(2, dim=-1)
    return cos, sin


def _table(module: nn.Module, positions: int, dtype: torch.dtype) -> Tensor | None:
    """Cosines beside sines [P, 2 R], where the module's answer is a function of the position."""
    frequencies: Any = getattr(module, "inv_freq", None)
    if not isinstance(frequencies, Tensor) or getattr(module, "rope_type", None) not in _FIXED:
        return None
    names = list(inspect.signature(type(module).forward).parameters)
    if names != ["self", "x", "position_ids"] or "forward" in vars(module):
        return None
    if positions * 4 * frequencies.numel() * dtype.itemsize > _MAX_BYTES:
        return None
    like = torch.empty(0, dtype=dtype, device=frequencies.device)
    places_1P = torch.arange(positions, device=frequencies.device)[None]
    tables = module(like, places_1P)
    if not _is_pair(tables, positions):
        return None
    table_PR = torch.cat([table[0] for table in tables], dim=-1).contiguous()
    for place in torch.linspace(0, positions - 1, _TRIED).long().tolist():
        alone = module(like, places_1P[:, place : place + 1])
        if not _is_pair(alone, 1) or not torch.equal(
            torch.cat(alone, dim=-1)[0, 0], table_PR[place]
        ):
            return None
    return table_PR if table_PR.dtype == dtype else None


def _is_pair(found: Any, positions: int) -> bool:
    """Whether it is cosines and sines, each [1, positions, R]."""
    return (
        isinstance(found, tuple)
        and len(found) == 2
        and all(isinstance(one, Tensor) and one.dim() == 3 for one in found)
        and found[0].shape == found[1].shape
        and found[0].shape[:2] == (1, positions)
    )
