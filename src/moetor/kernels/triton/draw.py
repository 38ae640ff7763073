"""The launch of `draw_kernels`. Shape letters: R rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.kernels.triton import support
from moetor.kernels.triton.choose import next_power_of_2

_BLOCK = 8192


def draw(
    logits_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, place_R: Tensor
) -> Tensor:
    """A token for each row, int64 [R].

    Args:
        logits_RV: float32, divided by the temperature; the largest of each row is 0.
        top_k_R: int32, V for no limit. top_p_R, min_p_R: float32.
        place_R: float32 in [0, 1), which of the kept tokens.
    """
    from moetor.kernels.triton import draw_kernels

    rows, size = logits_RV.shape
    logits_RV = logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()
    tokens_R = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    if rows == 0:
        return tokens_R
    with support.on_device_of(logits_RV):
        draw_kernels.draw[(rows,)](
            logits_RV,
            top_k_R,
            top_p_R,
            min_p_R,
            place_R,
            tokens_R,
            logits_RV.stride(0),
            V=size,
            BLOCK=min(_BLOCK, next_power_of_2(size)),
            num_warps=16,
        )
    return tokens_R
