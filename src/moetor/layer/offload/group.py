"""All layers of a model whose experts are in host memory, and the cache that they share.

Shape letters: T tokens, K top_k, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from moetor.errors import UnsupportedError
from moetor.layer.experts import Experts
from moetor.layer.offload.balance import Balance, measured_balance
from moetor.layer.offload.host import check_host
from moetor.layer.offload.hot import HotExperts, Move
from moetor.layer.offload.lane import HostLane
from moetor.layer.offload.layer import OffloadedLayer
from moetor.layer.offload.store import LayerStore, Staging, page_lock
from moetor.offload_config import OffloadConfig


class ExpertOffload:
    """Owns the lane to the host, the cache of hot experts and its tables, and moves experts between
    steps.

    A step begins with the first layer's call; whoever replays CUDA graphs calls `step` before each
    replay. Nothing waits: experts are copied on a stream of their own, and a table knows of one
    when it has arrived.

    Args:
        layers: routed experts, whose tensors are in host memory; from now on they must stay as
            they are.
        device: the accelerator.
        cache_experts: slots of each layer.

    Attributes:
        balance: which part of the experts is copied to the GPU for a call.

    Raises:
        ConfigError: host memory cannot be page-locked.
        KernelRefusedError: the native kernel does not have the experts' form or format.
    """

    def __init__(
        self,
        layers: Sequence[Experts],
        device: torch.device,
        config: OffloadConfig,
        cache_experts: int,
    ) -> None:
        for number, one in enumerate(layers):
            check_host(one.method, one.config, one.top_k, one.dtype, f"layer {number}")
        self.config, self.device = config, device
        self.cache_experts = cache_experts
        self.lane = HostLane(device)
        on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        if on_gpu:
            page_lock([tensor for one in layers for tensor in one.expert_tensors()], self)
        self.stores = [LayerStore.new(one, cache_experts, device) for one in layers]
        sizes = [one.config.num_experts for one in layers]
        self.hot = HotExperts(sizes, cache_experts, config.decay)
        self.tables = torch.from_numpy(self.hot.tables(cache_experts)).to(device)
        self._counts = torch.zeros((len(layers), max(sizes) + 1), dtype=torch.int64, device=device)
        self._read: Tensor | None = None
        self._read_event: torch.cuda.Event | None = None
        self._pending: list[Move] = []
        self._arrived: torch.cuda.Event | None = None
        self._staging: dict[tuple[object, ...], Staging] = {}
        made = [OffloadedLayer(self, store, n) for n, store in enumerate(self.stores)]
        for experts, layer in zip(layers, made, strict=True):
            experts.offload = layer
        self.balance = self._balance()

    def _balance(self) -> Balance:
        asked = self.config.stream_min_tokens
        if asked != "auto":
            return Balance(asked or None)
        if self.device.type != "cuda":
            return Balance(None)
        store = self.stores[0]
        return measured_balance(store, self.staging(store), self.device)

    @property
    def stream_min_tokens(self) -> int | None:
        """From how many tokens on experts are copied to the GPU; None: never."""
        return self.balance.min_tokens

    def staging(self, store: LayerStore) -> Staging:
        """Chunks for experts of this layer's form, made when they are first asked for."""
        config = store.experts.config
        key = (config, *((tensor.shape, tensor.dtype) for tensor in store.tensors))
        if key not in self._staging:
            self._staging[key] = Staging(store, self.device, self._copies)
        return self._staging[key]

    def streams(self, tokens: int) -> bool:
        """Whether experts are copied to the GPU for a call of so many tokens. A captured graph
        holds no such call: the cache may hold other experts when it is replayed.
        """
        least = self.balance.min_tokens
        return least is not None and tokens >= least and not self.capturing

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @property
    def moves(self) -> bool:
        """Whether the cache changes."""
        some = 0 < self.cache_experts < max(self.hot.num_experts)
        return some and self.config.moves_per_step > 0

    def count(self, layer: int, ids_TK: Tensor) -> None:
        """Notes a layer's choices."""
        if self.moves:
            ids = ids_TK.reshape(-1).long()
            self._counts[layer].index_add_(0, ids, torch.ones_like(ids))

    @torch.no_grad()
    def step(self) -> None:
        """Between two steps: experts that have arrived come into the tables, and others set out."""
        if not self.moves or self.capturing:
            return
        if self._pending and _done(self._arrived):
            self.hot.finish(self._pending)
            self._pending = []
            self._upload()
        if self._read is not None and _done(self._read_event):
            self.hot.note(self._read[:, :-1].numpy().astype(np.int32))
            self._read = None
            if not self._pending:
                self._set_out(self.hot.moves(self.config.moves_per_step))
        if self._read is None:
            self._fetch_counts()

    def _fetch_counts(self) -> None:
        on_gpu = self.device.type == "cuda"
        self._read = torch.empty(self._counts.shape, dtype=torch.int64, pin_memory=on_gpu)
        self._read.copy_(self._counts, non_blocking=True)
        self._counts.zero_()
        self._read_event = torch.cuda.current_stream(self.device).record_event() if on_gpu else None

    def _set_out(self, moves: list[Move]) -> None:
        if not moves:
            return
        self.hot.begin(moves)
        self._pending = moves
        self._upload()  # from here on no call reads the slots
        if self._copies is None:
            self._copy(moves)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            self._copy(moves)
        self._arrived = self._copies.record_event()

    def _copy(self, moves: list[Move]) -> None:
        for move in moves:
            self.stores[move.layer].copy(move.expert, move.slot)

    def _upload(self) -> None:
        tables = torch.from_numpy(self.hot.tables(self.cache_experts))
        if self.device.type == "cuda":
            tables = tables.pin_memory()
            if self._arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(self._arrived)
        self.tables.copy_(tables, non_blocking=True)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UnsupportedError(
            "a model with experts in host memory cannot be copied; load it twice"
        )

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError("a model with experts in host memory cannot be pickled")


def _done(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()
