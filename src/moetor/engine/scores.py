"""How queries and keys become weights, and values weighed by them.

Shape letters: T tokens, S sequences, Hq and Hkv heads, D width of queries and keys, Dv of values, L
keys of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """How queries and keys become weights.

    Attributes:
        scale: of the products.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        window, chunk: as in `LayerShape`.
        sinks_H: a further logit for each head, whose weight goes to no value (gpt-oss).
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    chunk: int | None = None
    sinks_H: Tensor | None = None

    def first_key(self, position: int) -> int:
        """The first key that a token at this position sees."""
        if self.window is not None:
            return max(0, position + 1 - self.window)
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0


def weigh(
    query_SHTD: Tensor,
    keys_SLHD: Tensor,
    values_SLHD: Tensor,
    mask: Tensor | None,
    scores: Scores,
) -> Tensor:
    """Values weighed by their scores, in torch: [S, Hq, T, Dv] for queries [S, Hq, T, D].

    Args:
        keys_SLHD, values_SLHD: [S, L, Hkv, D] and [S, L, Hkv, Dv].
        mask: true where a key is seen; [T, L] or [S, 1, 1, L]. None: all are.
    """
    keys_SHLD, values_SHLD = keys_SLHD.transpose(1, 2), values_SLHD.transpose(1, 2)
    if scores.softcap is None and scores.sinks_H is None:
        heads, tokens = query_SHTD.shape[1:3]
        if tokens == 1:
            # The heads that share keys as if they were tokens: on a CPU many times as fast.
            query_SHTD = query_SHTD.unflatten(1, (keys_SHLD.shape[1], -1)).squeeze(3)
            out = F.scaled_dot_product_attention(
                query_SHTD, keys_SHLD, values_SHLD, mask, scale=scores.scale
            )
            return out.reshape(out.shape[0], heads, 1, -1)
        return F.scaled_dot_product_attention(
            query_SHTD, keys_SHLD, values_SHLD, mask, scale=scores.scale, enable_gqa=True
        )
    seqs, heads, tokens, width = query_SHTD.shape
    groups = keys_SHLD.shape[1]
    grouped = query_SHTD.view(seqs, groups, heads // groups, tokens, width)
    raw = torch.einsum("shgtd,shld->shgtl", grouped, keys_SHLD).float() * scores.scale
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    if mask is not None:
        raw = raw.masked_fill(~(mask[:, :, None] if mask.dim() == 4 else mask), -torch.inf)
    if scores.sinks_H is not None:
        sinks = scores.sinks_H.float().view(1, groups, heads // groups, 1, 1)
        raw = torch.cat([raw, sinks.expand(seqs, -1, -1, tokens, 1)], dim=-1)
        weights = raw.softmax(-1)[..., :-1]
    else:
        weights = raw.softmax(-1)
    out = torch.einsum("shgtl,shld->shgtd", weights.to(values_SHLD.dtype), values_SHLD)
    return out.reshape(seqs, heads, tokens, -1)
