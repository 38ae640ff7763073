"""Attention over latents (MLA, DeepSeek-V2, arXiv:2405.04434) without expanding what was cached.

The cache holds one latent c [R] and one rotated key k [Dr] a token. A head's key is W_k c beside k,
its value W_v c, so that q . (W_k c) = (W_k^T q) . c: queries go into the latent space, all heads
attend to the same keys [R + Dr] there, and what they gather comes out through W_v.

Shape letters: T tokens, H heads, R width of the latent, D = Dn + Dr width of a query, Dv of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetor.engine.cache import LayerBlocks, LayerShape


@dataclass(frozen=True, slots=True)
class LatentForm:
    """One layer's two projections: W_k as [H, Dn, R] and W_v as [H, R, Dv]."""

    into_HNR: Tensor
    out_HRV: Tensor

    @classmethod
    def of(cls, module: Any, blocks: LayerBlocks) -> LatentForm:
        """Read off the layer's own `expand_kv`, which is linear in the latent: each unit vector is
        expanded once.
        """
        width, turned = blocks.shape.key_width, blocks.shape.value_width
        dtype, device = blocks.keys.dtype, blocks.keys.device
        units = torch.eye(width, dtype=dtype, device=device)[None, None]
        nothing = torch.zeros((1, 1, width, turned), dtype=dtype, device=device)
        keys_HRD, values_HRV = (expanded[0] for expanded in module.expand_kv(units, nothing))
        into = keys_HRD[..., : keys_HRD.shape[2] - turned].transpose(1, 2)
        return cls(into.contiguous(), values_HRV.contiguous())

    def enter(self, query_THD: Tensor) -> Tensor:
        """Queries [T, H, R + Dr] in the latent space."""
        plain = self.into_HNR.shape[1]
        latent_THR = torch.einsum("thn,hnr->thr", query_THD[..., :plain], self.into_HNR)
        return torch.cat([latent_THR, query_THD[..., plain:]], dim=-1)

    def leave(self, gathered_THR: Tensor) -> Tensor:
        """Values [T, H, Dv] of what was gathered there."""
        return torch.einsum("thr,hrv->thv", gathered_THR, self.out_HRV)


def latent_blocks(blocks: LayerBlocks) -> LayerBlocks:
    """The same cache as keys [R + Dr] and values [R], which share their memory.

    Args:
        blocks: of a layer whose keys and values lie side by side.
    """
    assert blocks.joined is not None
    shape, width = blocks.shape, blocks.shape.key_width
    seen = LayerShape(
        1, width + shape.value_width, width, shape.dtype, window=shape.window, chunk=shape.chunk
    )
    return LayerBlocks(seen, blocks.joined, blocks.joined[..., :width])
