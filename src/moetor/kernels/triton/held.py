"""Which of a token's experts a rank holds, in one launch instead of four.

Shape letters: T tokens, K top_k, P physical experts.
"""

from __future__ import annotations

from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.kernels.triton import support

_BLOCK = 256


def held_refusal(device: str) -> str | None:
    """Why this kernel does not run on `device`, as half a sentence, or None."""
    return support.device_refusal(device)


def held(weights_TK: Tensor, ids_TK: Tensor, table: Tensor, num_slots: int) -> Routing:
    """The slots `table[ids]`; those from `num_slots` on are held elsewhere, and weigh nothing.

    Args:
        weights_TK: float32, rows contiguous.
        ids_TK: int32 in [0, P], rows contiguous.
        table: int32 [P + 1].
    """
    from moetor.kernels.triton import held_kernels

    tokens, top_k = ids_TK.shape
    slots_TK = ids_TK.new_empty((tokens, top_k))
    kept_TK = weights_TK.new_empty((tokens, top_k))
    if tokens == 0:
        return Routing(kept_TK, slots_TK)
    with support.on_device_of(ids_TK):
        held_kernels.held_slots[(-(-tokens * top_k // _BLOCK),)](
            ids_TK,
            weights_TK,
            table,
            slots_TK,
            kept_TK,
            tokens * top_k,
            num_slots,
            ids_TK.stride(0),
            weights_TK.stride(0),
            K=top_k,
            P=table.shape[0] - 1,
            BLOCK=_BLOCK,
        )
    return Routing(kept_TK, slots_TK)
