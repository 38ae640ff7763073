"""Attention over a paged cache in torch operations: the twin of the Triton kernel, and its oracle.

Shape letters: T tokens, S sequences, N blocks, B tokens of a block, M blocks of a sequence,
Hq and Hkv heads, D width of queries and keys, Dv of values, L keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.errors import InputError


def check_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    *,
    window: int | None,
    chunk: int | None,
    sinks: Tensor | None,
) -> None:
    """Refuses shapes, dtypes and devices that paged attention cannot take.

    Raises:
        InputError: naming the tensor, what it is and what it must be.
    """
    if query.dim() != 3 or key_cache.dim() != 4 or value_cache.dim() != 4:
        raise InputError(
            f"query {list(query.shape)}, key_cache {list(key_cache.shape)} and value_cache "
            f"{list(value_cache.shape)} must be [T, Hq, D], [N, B, Hkv, D] and [N, B, Hkv, Dv]"
        )
    if key_cache.shape[:3] != value_cache.shape[:3] or key_cache.shape[3] != query.shape[2]:
        raise InputError(
            f"key_cache {list(key_cache.shape)} and value_cache {list(value_cache.shape)} do not "
            f"fit each other or queries of width {query.shape[2]}"
        )
    if query.shape[1] % key_cache.shape[2]:
        raise InputError(
            f"{query.shape[1]} query heads cannot share {key_cache.shape[2]} key heads evenly"
        )
    for tensor, name in ((query, "query"), (key_cache, "key_cache"), (value_cache, "value_cache")):
        if tensor.stride(-1) != 1:
            raise InputError(f"{name}'s last axis must be contiguous")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise InputError(
                f"{name} is {tensor.dtype} on {tensor.device}, the query is {query.dtype} on "
                f"{query.device}"
            )
    sequences = seq_lens.shape[0]
    for tensor, name, shape in (
        (block_table, "block_table", (sequences, block_table.shape[-1])),
        (seq_lens, "seq_lens", (sequences,)),
        (query_start, "query_start", (sequences + 1,)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int32:
            raise InputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, it must be int32 {list(shape)}"
            )
        if tensor.device != query.device:
            raise InputError(f"{name} is on {tensor.device}, the query is on {query.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise InputError(f"{name}'s last axis must be contiguous")
    if window is not None and chunk is not None:
        raise InputError("window and chunk are two ways to limit the keys; name one of them")
    for limit, name in ((window, "window"), (chunk, "chunk")):
        if limit is not None and limit < 1:
            raise InputError(f"{name}={limit} leaves no key to attend to; it must be at least 1")
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise InputError(f"sinks have shape {list(sinks.shape)}, not [{query.shape[1]}]")
    if sinks is not None and sinks.device != query.device:
        raise InputError(f"sinks are on {sinks.device}, the query is on {query.device}")


def visible(position_T: Tensor, key_L: Tensor, *, window: int | None, chunk: int | None) -> Tensor:
    """Which keys [T, L] a token at each position sees: causal, and within window or chunk."""
    seen_TL = key_L[None] <= position_T[:, None]
    if window is not None:
        seen_TL &= key_L[None] > position_T[:, None] - window
    if chunk is not None:
        seen_TL &= key_L[None] // chunk == position_T[:, None] // chunk
    return seen_TL


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of new tokens over their sequences' blocks, in float32 or float64.

    The new keys and values are in the blocks already. Lengths are read on the host.

    Args:
        query: [T, Hq, D]; head h attends with key head h // (Hq / Hkv).
        key_cache: [N, B, Hkv, D].
        value_cache: [N, B, Hkv, Dv].
        block_table: int32 [S, M], a sequence's blocks in their order.
        seq_lens: int32 [S], tokens with the new ones.
        query_start: int32 [S + 1], first new token of each sequence, and T.
        scale: of the products.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        window: keys that a token sees, itself among them.
        chunk: tokens see only those of their own chunk of this length (Llama 4).
        sinks: [Hq], a further logit whose weight goes to no value (gpt-oss).

    Returns:
        [T, Hq, Dv] in the query's dtype.

    Raises:
        InputError: wrong shapes, dtypes or devices.
    """
    check_paged(query, key_cache, value_cache, block_table, seq_lens, query_start,
                window=window, chunk=chunk, sinks=sinks)  # fmt: skip
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, groups = query.shape[1], query.shape[1] // key_cache.shape[2]
    size = key_cache.shape[1]
    out = query.new_zeros((*query.shape[:2], value_cache.shape[3]))
    starts = query_start.tolist()
    for seq, length in enumerate(seq_lens.tolist()):
        first, last = starts[seq], starts[seq + 1]
        if first == last or length == 0:
            continue
        table_M = block_table[seq, : -(-length // size)].long()
        keys_LHD = key_cache[table_M].flatten(0, 1)[:length].to(wide)
        values_LHD = value_cache[table_M].flatten(0, 1)[:length].to(wide)
        keys_LHD = keys_LHD.repeat_interleave(groups, dim=1)
        values_LHD = values_LHD.repeat_interleave(groups, dim=1)
        raw_HTL = torch.einsum("thd,lhd->htl", query[first:last].to(wide), keys_LHD) * scale
        if softcap is not None:
            raw_HTL = softcap * torch.tanh(raw_HTL / softcap)
        place_L = torch.arange(length, device=query.device)
        position_T = place_L[length - (last - first) :]
        seen_TL = visible(position_T, place_L, window=window, chunk=chunk)
        raw_HTL = raw_HTL.masked_fill(~seen_TL, -torch.inf)
        if sinks is not None:
            column = sinks.to(wide).view(heads, 1, 1).expand(-1, last - first, 1)
            weights_HTL = torch.cat([raw_HTL, column], dim=-1).softmax(-1)[..., :-1]
        else:
            weights_HTL = raw_HTL.softmax(-1)
        out[first:last] = torch.einsum("htl,lhd->thd", weights_HTL, values_LHD).to(out.dtype)
    return out
