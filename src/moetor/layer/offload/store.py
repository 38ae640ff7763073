"""One layer's experts in host memory, and copies of some of them on the GPU.

Shape letters: E experts, S slots of the cache, C experts of a chunk.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moetor.errors import ConfigError
from moetor.layer.experts import Experts

# Of the experts of a chunk; two chunks are on the GPU at a time.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class LayerStore:
    """Where a layer's experts are.

    Attributes:
        experts: on the host.
        tensors: those of `experts` that hold one expert per row of their first dimension.
        cache: the same on the GPU with a row for each slot; empty without a cache.
        cached: experts that compute with these; None without a cache.
    """

    experts: Experts
    tensors: list[Tensor]
    cache: list[Tensor]
    cached: Experts | None

    @classmethod
    def new(cls, experts: Experts, slots: int, device: torch.device) -> LayerStore:
        """With the layer's first experts in the slots."""
        tensors = experts.expert_tensors()
        # Not the module itself: it holds what computes for it, which holds this.
        experts = with_tensors(experts, tensors, experts.config.num_experts)
        if not slots:
            return cls(experts, tensors, [], None)
        slots = min(slots, experts.config.num_experts)
        made = [rows_like(tensor, slots, device) for tensor in tensors]
        for tensor, rows in zip(tensors, made, strict=True):
            rows.copy_(tensor[:slots])
        return cls(experts, tensors, made, with_tensors(experts, made, slots))

    def copy(self, expert: int, slot: int) -> None:
        """Copies an expert into a slot, on the current stream."""
        for tensor, rows in zip(self.tensors, self.cache, strict=True):
            rows[slot].copy_(tensor[expert], non_blocking=True)

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return sum(tensor[0].nbytes for tensor in self.tensors)


def rows_like(tensor: Tensor, rows: int, device: torch.device) -> Tensor:
    """Memory for `rows` experts of what `tensor` holds."""
    return torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=device)


def with_tensors(experts: Experts, tensors: Sequence[Tensor], count: int) -> Experts:
    """Experts of the same form with other tensors.

    Args:
        tensors: in the order of `expert_tensors`, with `count` rows.
    """
    twin = copy.copy(experts)
    twin._parameters = dict(experts._parameters)
    twin._modules = {}
    twin.offload = None
    given = iter(tensors)
    for name in experts.names_by_expert:
        if experts._parameters[name] is not None:
            twin._parameters[name] = nn.Parameter(next(given), requires_grad=False)
    twin.config = replace(experts.config, num_experts=count)
    return twin


class Staging:
    """Two chunks of experts on the GPU: one is filled while the other one is computed with."""

    def __init__(self, store: LayerStore, device: torch.device, copies: torch.cuda.Stream | None):
        experts = store.experts.config.num_experts
        self.count = max(1, min(experts, CHUNK_BYTES // store.expert_bytes))
        self._device, self._copies = device, copies
        self._chunks: list[tuple[list[Tensor], Experts]] = []
        for _ in range(2):
            made = [rows_like(tensor, self.count, device) for tensor in store.tensors]
            # What no expert is copied to is not computed with, and must still be numbers.
            for rows in made:
                rows.view(torch.uint8).zero_()
            self._chunks.append((made, with_tensors(store.experts, made, self.count)))
        if copies is not None:
            copies.wait_stream(torch.cuda.current_stream(device))  # not zeroed after it is filled
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def chunks(self, store: LayerStore, wanted: Sequence[int]) -> Iterator[tuple[int, Experts]]:
        """Experts on the GPU, and the place of the first of them in `wanted`; each chunk is to be
        computed with before the next one is asked for.
        """
        for start in range(0, len(wanted), self.count):
            turn, self._turn = self._turn, 1 - self._turn
            rows, experts = self._chunks[turn]
            self._fill(store, wanted[start : start + self.count], rows, turn)
            yield start, experts
            if self._copies is not None:
                self._free[turn] = torch.cuda.current_stream(self._device).record_event()

    def _fill(
        self, store: LayerStore, wanted: Sequence[int], rows: Sequence[Tensor], turn: int
    ) -> None:
        def fill() -> None:
            for first, place, count in runs(wanted):
                for tensor, into in zip(store.tensors, rows, strict=True):
                    part = tensor[first : first + count]
                    into[place : place + count].copy_(part, non_blocking=True)

        if self._copies is None:
            fill()
            return
        free = self._free[turn]
        if free is not None:
            self._copies.wait_event(free)
        with torch.cuda.stream(self._copies):
            fill()
        torch.cuda.current_stream(self._device).wait_stream(self._copies)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Rising numbers as runs without a gap: first number, its place, length."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    for _, pairs in groups:
        run = list(pairs)
        yield run[0][1], run[0][0], len(run)


def page_lock(tensors: Sequence[Tensor], owner: object) -> None:
    """Locks host memory where it is, so that a GPU copies from it by itself; until `owner` is gone.

    Raises:
        ConfigError: the system does not allow it.
    """
    runtime = torch.cuda.cudart()
    locked: list[Tensor] = []
    weakref.finalize(owner, _unlock, locked)
    for tensor in tensors:
        if not tensor.nbytes or tensor.is_pinned():
            continue
        status = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if status != 0:
            raise ConfigError(
                f"{tensor.nbytes / 2**20:.0f} MiB of host memory cannot be page-locked for the "
                f"GPU (CUDA error {status}); raise the limit of locked memory (ulimit -l)"
            )
        locked.append(tensor)


def _unlock(locked: list[Tensor]) -> None:
    unregister: Callable[[int], object] = torch.cuda.cudart().cudaHostUnregister
    for tensor in locked:
        unregister(tensor.data_ptr())
