"""Attention over the paged cache, as a function of Transformers' attention interface.

Shape letters: T tokens, S sequences, Hq and Hkv heads, G = Hq / Hkv, D width of queries and keys,
Dv of values, L keys of a sequence, M blocks of a sequence.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moetor.engine.cache import Batch, EngineCache, LayerBlocks, active_cache, tokens_first
from moetor.engine.latent import LatentForm, latent_blocks
from moetor.engine.scores import Scores, weigh
from moetor.errors import UnsupportedError
from moetor.kernels import rows_apart
from moetor.kernels.dense import NewHeads
from moetor.kernels.native import dense as native
from moetor.kernels.triton.attention import Only

NAME = "moetor_paged"

# Arguments that say nothing about the scores: what they ask for is the engine's business.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "is_causal",
        "kwargs",
        "layer_idx",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
# The widest that a group of decoding sequences is padded: to this many times its own tokens.
_PADDING = 1.5


def paged_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the new tokens over their own sequences' blocks.

    Args:
        query: [1, Hq, T, D], or [S, Hq, 1, D] where each row is a sequence.
        key, value: the new ones; they are in the blocks already.
        attention_mask: must be None: which keys a token sees follows from the cache.

    Returns:
        [1, T, Hq, Dv] or [S, 1, Hq, Dv], and no weights.

    Raises:
        UnsupportedError: the family asks for something that paged attention does not do.
    """
    cache = active_cache()
    if cache is None or cache.batch is None:
        raise UnsupportedError(f"attention {NAME!r} runs inside moetor's engine only")
    if attention_mask is not None:
        raise UnsupportedError("paged attention takes no mask of the model's own")
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _WITHOUT_EFFECT]
    if unknown:
        raise UnsupportedError(f"paged attention does not know {', '.join(unknown)}")
    blocks = cache.blocks[cache.current]
    latent = key.shape[1] != blocks.shape.heads or key.shape[3] != blocks.shape.key_width
    if latent and (blocks.joined is None or not hasattr(module, "expand_kv")):
        raise UnsupportedError("keys are repeated between the cache and the attention")
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window if sliding_window is not None else blocks.shape.window,
        chunk=blocks.shape.chunk,
        sinks_H=s_aux,
    )
    states = tuple(tokens_first(x) for x in (query, key, value))
    if latent:
        out_THD = _attend_latent(module, states, blocks, cache, scores)
    else:
        new, cache.turning = cache.turning, None
        out_THD = attend(states[0], blocks, cache.batch, scores, new)
    return out_THD.view(query.shape[0], query.shape[2], *out_THD.shape[1:]), None


def _attend_latent(
    module: Any,
    states: tuple[Tensor, ...],
    blocks: LayerBlocks,
    cache: EngineCache,
    scores: Scores,
) -> Tensor:
    """Whole prompts by the expanded keys and values that the model made, all else in the latent
    space.

    Args:
        states: queries, new keys and new values, [T, Hq, ...] each.
    """
    batch, (query_THD, key_THD, value_THD) = cache.batch, states
    assert batch is not None
    if cache.current not in cache.latents:
        cache.latents[cache.current] = LatentForm.of(module, blocks)
    form: LatentForm = cache.latents[cache.current]
    whole = latent_blocks(blocks)
    if not _only_new_keys(batch, scores):
        return form.leave(attend(form.enter(query_THD), whole, batch, scores))
    first = batch.num_decodes
    prompts = _attend_fresh(query_THD[first:], key_THD[first:], value_THD[first:], batch, scores)
    if first == 0:
        return prompts
    singles = attend(form.enter(query_THD[:first]), whole, batch.singles(), scores)
    return torch.cat([form.leave(singles), prompts])


def attend(
    query_THD: Tensor,
    blocks: LayerBlocks,
    batch: Batch,
    scores: Scores,
    new: NewHeads | None = None,
) -> Tensor:
    """[T, Hq, Dv] for queries [T, Hq, D]; with `new` they are not turned yet, and the new keys not
    written (`EngineCache.leave_turning`)."""
    if query_THD.is_cuda:
        return _attend_on_gpu(query_THD, blocks, batch, scores, new)
    if batch.lens is None or batch.query_lens is None:
        batch.lens = batch.seq_lens_S.tolist()
        batch.query_lens = batch.query_start_S1.diff().tolist()
    first = batch.num_decodes
    in_place = native.ready(query_THD) and query_THD.dtype == blocks.keys.dtype
    if in_place and first == len(query_THD):
        return _attend_in_place(query_THD, blocks, batch, scores)
    out_THD = query_THD.new_empty((*query_THD.shape[:2], blocks.shape.value_width))
    if in_place and first:
        out_THD[:first] = _attend_in_place(query_THD[:first], blocks, batch, scores)
    elif not in_place and rows_apart.wanted():
        with rows_apart.trusted():
            for row in range(first):
                out_THD[row] = _attend_apart(query_THD[row], blocks, batch, row, scores)
    elif not in_place:
        for rows in _decode_groups(batch):
            out_THD[rows] = _attend_decodes(query_THD[rows], blocks, batch, rows, scores)
    if _only_new_keys(batch, scores):
        keys_TD, values_TD = _new_keys(blocks, batch)
        out_THD[first:] = _attend_fresh(query_THD[first:], keys_TD, values_TD, batch, scores)
        return out_THD
    for row in range(batch.num_decodes, len(batch.lens)):
        last = first + batch.query_lens[row]
        if last == first:
            continue
        out_THD[first:last] = _attend_prompt(query_THD[first:last], blocks, batch, row, scores)
        first = last
    out_THD[first:] = 0  # tokens that belong to no sequence
    return out_THD


def _attend_in_place(
    query_SHD: Tensor, blocks: LayerBlocks, batch: Batch, scores: Scores
) -> Tensor:
    """The decoding sequences, each over its own blocks where they lie."""
    return native.paged_attention(
        query_SHD,
        blocks.keys,
        blocks.values,
        batch.block_table_SM,
        batch.seq_lens_S,
        scale=scores.scale,
        softcap=scores.softcap,
        window=scores.window,
        chunk=scores.chunk,
        sinks=scores.sinks_H,
    )


def _attend_on_gpu(
    query_THD: Tensor, blocks: LayerBlocks, batch: Batch, scores: Scores, new: NewHeads | None
) -> Tensor:
    """One launch for sequences with one token, and one for the others."""
    from moetor.kernels.triton.attention import paged_attention

    decodes, table, lens = batch.num_decodes, batch.block_table_SM, batch.seq_lens_S

    def part(
        query: Tensor,
        rows: slice,
        starts: Tensor,
        longest: int,
        only: Only = "all",
        out: Tensor | None = None,
    ) -> Tensor:
        return paged_attention(
            query,
            blocks.keys,
            blocks.values,
            table[rows],
            lens[rows],
            starts,
            max_query_len=longest,
            scale=scores.scale,
            softcap=scores.softcap,
            window=scores.window,
            chunk=scores.chunk,
            sinks=scores.sinks_H,
            only=only,
            out=out,
            new=new,
        )

    if batch.padded:
        whole = (query_THD, slice(None), batch.query_start_S1)
        out = part(*whole, longest=1, only="singles")
        return part(*whole, batch.max_query_len, only="longer", out=out)
    if batch.max_query_len > 1 and _only_new_keys(batch, scores):
        keys_TD, values_TD = _new_keys(blocks, batch)
        prompts = _attend_fresh(query_THD[decodes:], keys_TD, values_TD, batch, scores)
        if not decodes:
            return prompts
    elif batch.prompt_start_S1 is None:
        return part(query_THD, slice(None), batch.query_start_S1, batch.max_query_len)
    else:
        rows = slice(decodes, None)
        prompts = part(query_THD[decodes:], rows, batch.prompt_start_S1, batch.max_query_len)
    starts = batch.query_start_S1[: decodes + 1]
    return torch.cat([part(query_THD[:decodes], slice(decodes), starts, longest=1), prompts])


def _only_new_keys(batch: Batch, scores: Scores) -> bool:
    """Whether prompts see nothing but their own new tokens, and all of these: then torch's own
    attention needs no blocks and no mask.
    """
    if not batch.fresh or batch.query_lens is None:
        return False
    limits = [limit for limit in (scores.window, scores.chunk) if limit is not None]
    plain = scores.softcap is None and scores.sinks_H is None
    return plain and all(batch.max_query_len <= limit for limit in limits)


def _new_keys(blocks: LayerBlocks, batch: Batch) -> tuple[Tensor, Tensor]:
    """Keys and values of the prompts' new tokens, read where they were written: who writes into
    the cache may hand on something else.
    """
    slots = batch.slots_T[batch.num_decodes :]
    keys_TD = blocks.keys.flatten(0, 1).index_select(0, slots)
    return keys_TD, blocks.values.flatten(0, 1).index_select(0, slots)


def _attend_fresh(
    query_THD: Tensor, keys_TD: Tensor, values_TD: Tensor, batch: Batch, scores: Scores
) -> Tensor:
    """Whole prompts; neighbours of equal length in one call."""
    assert batch.query_lens is not None
    out, first = [], 0
    for length, same in itertools.groupby(batch.query_lens[batch.num_decodes :]):
        last = first + length * sum(1 for _ in same)
        query, keys, values = (
            x[first:last].unflatten(0, (-1, length)).transpose(1, 2)
            for x in (query_THD, keys_TD, values_TD)
        )
        attended = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scores.scale, enable_gqa=True
        )
        out.append(attended.transpose(1, 2).flatten(0, 1))
        first = last
    return torch.cat(out) if len(out) > 1 else out[0]


def _decode_groups(batch: Batch) -> list[list[int]]:
    """The decoding sequences by similar length, so that padding stays small."""
    assert batch.lens is not None
    order = sorted(range(batch.num_decodes), key=batch.lens.__getitem__)
    groups: list[list[int]] = []
    tokens = 0
    for row in order:
        length = batch.lens[row]
        if groups and length * (len(groups[-1]) + 1) <= _PADDING * (tokens + length):
            groups[-1].append(row)
            tokens += length
        else:
            groups.append([row])
            tokens = length
    return groups


def _attend_decodes(
    query_SHD: Tensor, blocks: LayerBlocks, batch: Batch, rows: list[int], scores: Scores
) -> Tensor:
    assert batch.lens is not None
    size = blocks.keys.shape[1]
    lens = [batch.lens[row] for row in rows]
    starts = [scores.first_key(length - 1) for length in lens]
    firsts = [start // size for start in starts]
    count = max(-(-length // size) - first for length, first in zip(lens, firsts, strict=True))
    device = query_SHD.device
    first_S1 = torch.tensor(firsts, device=device)[:, None]
    columns_SM = first_S1 + torch.arange(count, device=device)
    table = batch.block_table_SM[torch.tensor(rows, device=device)]
    table_SM = table.gather(1, columns_SM.clamp_(max=table.shape[1] - 1)).long()
    keys_SLHD = blocks.keys[table_SM].flatten(1, 2)
    values_SLHD = blocks.values[table_SM].flatten(1, 2)
    mask: Tensor | None = None
    if len(set(lens)) > 1 or lens[0] % size or starts[0] % size:
        place_SL = first_S1 * size + torch.arange(count * size, device=device)
        begin_S1 = torch.tensor(starts, device=device)[:, None]
        seen_SL = place_SL < torch.tensor(lens, device=device)[:, None]
        mask = (seen_SL & (place_SL >= begin_S1))[:, None, None]
    out = weigh(query_SHD[:, :, None], keys_SLHD, values_SLHD, mask, scores)
    return out[:, :, 0]


def _attend_apart(
    query_HD: Tensor, blocks: LayerBlocks, batch: Batch, row: int, scores: Scores
) -> Tensor:
    """One token, over the keys that it sees and no others: all shapes follow from its place."""
    assert batch.lens is not None
    size, length = blocks.keys.shape[1], batch.lens[row]
    start = scores.first_key(length - 1)
    first = start // size
    table_M = batch.block_table_SM[row, first : -(-length // size)].long()
    seen = slice(start - first * size, length - first * size)
    keys_LHD, values_LHD = (
        cache[table_M].flatten(0, 1)[seen].clone() for cache in (blocks.keys, blocks.values)
    )
    query_1HTD = query_HD.clone()[None, :, None]
    return weigh(query_1HTD, keys_LHD[None], values_LHD[None], None, scores)[0, :, 0]


def _attend_prompt(
    query_THD: Tensor, blocks: LayerBlocks, batch: Batch, row: int, scores: Scores
) -> Tensor:
    assert batch.lens is not None
    size, length, count = blocks.keys.shape[1], batch.lens[row], query_THD.shape[0]
    past = length - count
    first = scores.first_key(past) // size
    table_M = batch.block_table_SM[row, first : -(-length // size)].long()
    keys_LHD = blocks.keys[table_M].flatten(0, 1)[: length - first * size]
    values_LHD = blocks.values[table_M].flatten(0, 1)[: length - first * size]
    device = query_THD.device
    position_T1 = torch.arange(past, length, device=device)[:, None]
    place_L = torch.arange(first * size, length, device=device)
    seen_TL = place_L <= position_T1
    if scores.window is not None:
        seen_TL &= place_L > position_T1 - scores.window
    if scores.chunk is not None:
        seen_TL &= place_L // scores.chunk == position_T1 // scores.chunk
    query_1HTD = query_THD.transpose(0, 1)[None]
    out_1HTD = weigh(query_1HTD, keys_LHD[None], values_LHD[None], seen_TL, scores)
    return out_1HTD[0].transpose(0, 1)


ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention_forward)
