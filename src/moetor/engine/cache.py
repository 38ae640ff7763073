"""The paged cache behind a Transformers `Cache`: layers that write into blocks.

The model calls `update(keys, values, layer)` on it as on any cache. The layer writes the new keys
and values into its blocks and hands them back as they are; `attention.py` then reads the blocks.

Shape letters: T tokens, S sequences, N blocks, B tokens of a block, M blocks of the longest
sequence, Hkv heads, D width of keys, Dv width of values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache

from moetor.kernels import dense
from moetor.kernels.dense import CacheSlots, NewHeads


@dataclass(slots=True)
class Batch:
    """Where the tokens of one model call are.

    Attributes:
        slots_T: int64, place of each token in the cache: block * B + offset.
        block_table_SM: int32.
        seq_lens_S: int32, tokens of each sequence up to and with its new ones.
        query_start_S1: int32, first token of each sequence, and T.
        num_decodes: sequences with one new token, which come first.
        max_query_len: of any sequence.
        prompt_start_S1: of the sequences after the first `num_decodes`, from 0; None where there
            are none or only these.
        fresh: whether no sequence with more than one new token has older ones.
        padded: whether single tokens may stand anywhere among the sequences, some of which have no
            token, and some tokens, whose slots are negative, belong to none.
        lens, query_lens: the same as lists on the host, for code that reads them there; None
            inside a captured graph.
    """

    slots_T: Tensor
    block_table_SM: Tensor
    seq_lens_S: Tensor
    query_start_S1: Tensor
    num_decodes: int
    max_query_len: int
    prompt_start_S1: Tensor | None = None
    fresh: bool = False
    padded: bool = False
    lens: list[int] | None = None
    query_lens: list[int] | None = None

    def singles(self) -> Batch:
        """The sequences with one new token alone."""
        count = self.num_decodes
        return Batch(
            slots_T=self.slots_T[:count],
            block_table_SM=self.block_table_SM[:count],
            seq_lens_S=self.seq_lens_S[:count],
            query_start_S1=self.query_start_S1[: count + 1],
            num_decodes=count,
            max_query_len=1,
            lens=None if self.lens is None else self.lens[:count],
            query_lens=None if self.query_lens is None else self.query_lens[:count],
        )


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Geometry of one layer's keys and values.

    Attributes:
        window: keys that a token sees, itself among them; None for all.
        chunk: tokens see only those of their own chunk of this length; None for all.
    """

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    window: int | None = None
    chunk: int | None = None

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values."""
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(slots=True)
class LayerBlocks:
    """One layer's blocks: keys [N, B, Hkv, D], values [N, B, Hkv, Dv].

    Attributes:
        joined: [N, B, 1, D + Dv], of which keys and values are views, where a layer has one head
            of different widths: so are latents held, which are read together.
    """

    shape: LayerShape
    keys: Tensor
    values: Tensor
    joined: Tensor | None = None

    @classmethod
    def empty(
        cls, shape: LayerShape, num_blocks: int, block_size: int, device: torch.device
    ) -> LayerBlocks:
        """Blocks of zeros: an unwritten slot may be multiplied by a weight of zero."""
        size = (num_blocks, block_size, shape.heads)
        if shape.heads == 1 and shape.key_width != shape.value_width:
            width = shape.key_width + shape.value_width
            joined = torch.zeros((*size, width), dtype=shape.dtype, device=device)
            keys, values = joined.split([shape.key_width, shape.value_width], dim=-1)
            return cls(shape, keys, values, joined)
        keys = torch.zeros((*size, shape.key_width), dtype=shape.dtype, device=device)
        values = torch.zeros((*size, shape.value_width), dtype=shape.dtype, device=device)
        return cls(shape, keys, values)

    def write(self, keys_TD: Tensor, values_TD: Tensor, slots_T: Tensor) -> None:
        """Writes [T, Hkv, D] and [T, Hkv, Dv]."""
        if keys_TD.is_cuda and keys_TD.dtype == self.keys.dtype:
            dense.write_to_cache(keys_TD, values_TD, CacheSlots(self.keys, self.values, slots_T))
            return
        if bool((slots_T < 0).any()):  # tokens that belong to no sequence
            kept = slots_T >= 0
            keys_TD, values_TD, slots_T = keys_TD[kept], values_TD[kept], slots_T[kept]
        self.keys.flatten(0, 1).index_copy_(0, slots_T, keys_TD)
        self.values.flatten(0, 1).index_copy_(0, slots_T, values_TD)


class PagedUpdate:
    """What a cache layer of Transformers does differently when its keys are in blocks.

    Mixed in before the layer's own class, so that its states (of a layer that has both) stay.
    """

    owner: EngineCache
    layer_idx: int

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Writes [1, Hkv, T, D] or [S, Hkv, 1, D] and hands them back."""
        self.owner.write(self.layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens before the current ones, of the first sequence: models ask whether any are."""
        return self.owner.past_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask that nobody reads."""
        return self.owner.past_length + query_length, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1


PAGEABLE = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""Classes of Transformers' cache layers whose keys and values can be in blocks."""
STATEFUL = (
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""Classes with states that do not grow with the text."""
_paged_classes: dict[type, type] = {}


def paged_class(own: type) -> Any:
    """The layer class `own` with its keys in blocks."""
    if own not in _paged_classes:
        _paged_classes[own] = type(f"Paged{own.__name__}", (PagedUpdate, own), {})
    return _paged_classes[own]


class EngineCache(Cache):  # type: ignore[misc]
    """The cache that the model is called with: one layer object for each of the model's.

    Args:
        config: of the language model.
        shapes: geometry of the layers that have keys, by index.
        num_blocks, block_size, device: of the blocks.
    """

    def __init__(
        self,
        config: Any,
        shapes: dict[int, LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        layers = own_layers(config, max(shapes, default=-1) + 1)
        for index in shapes:
            paged = paged_class(type(layers[index]))
            layer = paged.__new__(paged)
            vars(layer).update(vars(layers[index]), owner=self, layer_idx=index)
            layers[index] = layer
        super().__init__(layers=layers)
        self.block_size = block_size
        self.blocks = {
            index: LayerBlocks.empty(shape, num_blocks, block_size, device)
            for index, shape in shapes.items()
        }
        self.batch: Batch | None = None
        # Made by the attention of layers with latents when they are first called.
        self.latents: dict[int, Any] = {}
        self.past_length = 0
        self.current = 0
        # What `leave_turning` was given last; the attention takes it.
        self.turning: NewHeads | None = None

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> None:
        """Writes one layer's new keys and values, and notes which layer attends next."""
        assert self.batch is not None, "the cache is written inside `running` only"
        self.current = layer
        self.blocks[layer].write(
            tokens_first(key_states), tokens_first(value_states), self.batch.slots_T
        )

    def write_target(self, layer: int, key: Tensor, value: Tensor) -> CacheSlots | None:
        """Where one layer's new keys [T, Hkv, D] and values [T, Hkv, Dv] go, for code that writes
        them itself instead of calling `update`; it is noted that this layer attends next.

        Returns:
            None where the cache holds something else than these keys and values.
        """
        blocks = self.blocks.get(layer)
        if blocks is None or self.batch is None:
            return None
        shape = blocks.shape
        held = (shape.heads, shape.key_width, shape.value_width, shape.dtype)
        if held != (key.shape[1], key.shape[2], value.shape[2], key.dtype):
            return None
        self.current = layer
        return CacheSlots(blocks.keys, blocks.values, self.batch.slots_T)

    def leave_turning(self, query: Tensor, new: NewHeads) -> bool:
        """Whether the attention of the layer that attends next turns the query and these heads, and
        writes them where `write_target` said: so it is on a GPU with few sequences, each of which
        has one new token. The attention is then called with the query as it is.
        """
        batch = self.batch
        assert batch is not None, "after `write_target`"
        singles = batch.max_query_len == 1 and not batch.padded
        self.turning = new if singles and dense.attention_turns(query, new) else None
        return self.turning is not None

    @contextmanager
    def running(self, batch: Batch, past_length: int) -> Iterator[None]:
        """For the time of one model call, on this thread."""
        self.batch, self.past_length, self.turning = batch, past_length, None
        _active.cache = self
        try:
            yield
        finally:
            self.batch = _active.cache = None


def own_layers(config: Any, count: int = 0) -> list[Any]:
    """The layer objects that Transformers itself would cache with; at least `count` of them."""
    layers = list(DynamicCache(config=config).layers)
    layers += [cache_utils.DynamicLayer() for _ in range(count - len(layers))]
    return layers


def tokens_first(states: Tensor) -> Tensor:
    """[1, H, T, D] or [S, H, 1, D] as [T, H, D]."""
    return states.transpose(1, 2).flatten(0, 1)


def active_cache() -> EngineCache | None:
    """The cache of the model call that this thread is in."""
    return getattr(_active, "cache", None)


_active = threading.local()
