"""Which of a token's experts a rank holds, and which copies it takes, in one launch each.

Shape letters: T tokens, K top_k, E logical experts, P physical ones, C copies of one at most.
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


def copies_in_turn(ids_TK: Tensor, copies_EC: Tensor, counts_E: Tensor) -> Tensor:
    """Physical ids int32 [T, K]: copy `(token + k) % counts[id]` of each expert.

    Args:
        ids_TK: int32 in [0, E], rows contiguous; E is a dropped slot.
        copies_EC: int32 [E + 1, C].
        counts_E: int32 [E + 1].
    """
    from moetor.kernels.triton import held_kernels

    tokens, top_k = ids_TK.shape
    found_TK = ids_TK.new_empty((tokens, top_k))
    if tokens == 0:
        return found_TK
    with support.on_device_of(ids_TK):
        held_kernels.copies_in_turn[(-(-tokens * top_k // _BLOCK),)](
            ids_TK,
            copies_EC,
            counts_E,
            found_TK,
            tokens * top_k,
            ids_TK.stride(0),
            K=top_k,
            E=copies_EC.shape[0] - 1,
            C=copies_EC.shape[1],
            BLOCK=_BLOCK,
        )
    return found_TK
