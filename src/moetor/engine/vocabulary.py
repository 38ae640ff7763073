"""The vocabulary of a model whose ranks hold a slice of the logits each.

Most rows take their likeliest token. For that each rank tells its own likeliest one, two numbers a
row, and the logits stay where they are; they are gathered for rows of which more is asked. The
ranks of a tensor-parallel group have the same rows and ask the same of them, so they communicate
alike.

Shape letters: S rows, V vocabulary, N columns of a rank, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from moetor.huggingface.dense_observe import random_ids, run
from moetor.huggingface.dense_spread import GatheredForward, all_agree
from moetor.parallel.collectives import all_gather, gather_columns
from moetor.parallel.groups import ParallelGroups

# Their values are float32 values.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SplitVocabulary:
    """Logits in parts, and what is asked of them.

    Args:
        head: of the product that makes logits.

    Attributes:
        size: V.
        share: columns of every rank but the last ones, which may have fewer.
    """

    def __init__(self, head: GatheredForward) -> None:
        self._head, self._group = head, head.group
        self.size = head.module.out_features
        self.share = -(-self.size // self._group.size())

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Calls of the model inside give this rank's logits [..., N]."""
        before, self._head.gathers = self._head.gathers, False
        try:
            yield
        finally:
            self._head.gathers = before

    def whole(self, part_SN: Tensor) -> Tensor:
        """All ranks' logits [S, V]."""
        return gather_columns(part_SN, self.size, self._group)

    def likeliest(self, part_SN: Tensor) -> Tensor:
        """What `whole(part_SN).argmax(-1)` gives, int64 [S]: of equal logits the first."""
        value_S, place_S = part_SN.max(-1)
        pair_S2 = torch.stack((value_S.float().view(torch.int32), place_S.int()), -1)
        pairs_RS2 = all_gather(pair_S2, self._group).view(-1, *pair_S2.shape)
        # The first rank with the largest value has the lower ids.
        rank_1S = pairs_RS2[..., 0].view(torch.float32).argmax(0, keepdim=True)
        place_S = pairs_RS2[..., 1].gather(0, rank_1S)[0]
        return place_S + rank_1S[0] * self.share


def split_vocabulary(model: Any, ranks: ParallelGroups | None) -> SplitVocabulary | None:
    """The model's vocabulary in parts, where trying shows that its logits are those of the parts,
    bit for bit; None where they are made otherwise. Every rank asks.

    Args:
        model: what generates text.
    """
    head = model.get_output_embeddings()
    made = None if head is None else head.__dict__.get("forward")
    if ranks is None or not isinstance(made, GatheredForward):
        return None
    split = SplitVocabulary(made)
    if split.size <= split.share * (made.group.size() - 1):
        return None  # a rank has nothing of it
    ids = random_ids(model.config)
    whole = run(model, ids).flatten(0, 1)
    part: Tensor | None = None
    with split.in_parts(), suppress(RuntimeError):  # something behind the product may want all
        part = run(model, ids).flatten(0, 1)
    width = made.module.weight.shape[0]
    fits = part is not None and part.shape[-1] == width and part.dtype in _DTYPES
    if not all_agree(fits, ranks) or part is None:
        return None
    same = torch.equal(split.whole(part), whole)
    same = torch.equal(split.likeliest(part), whole.argmax(-1)) and same
    return split if all_agree(same, ranks) else None
