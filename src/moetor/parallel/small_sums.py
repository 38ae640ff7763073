"""All-reduces of small tensors in one launch, through memory that the ranks of one machine share.

A rank writes its part into the others' memory, waits for theirs, and adds them up: one trip over
NVLink. For a few tokens this is what counts (one-shot all-reduce). The memory is that of
`torch.distributed._symmetric_memory`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moetor.kernels.triton.push_sum import push_sum, push_sum_refusal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Above this the library's own all-reduce is faster (docs/parallel.md).
MOST_BYTES = 512 * 2**10
_ALIGNED = 16
# Elements of the tensors that are tried: one vector, one row, and all.
_TRIALS = (8, 2048, 40 * 1024)
_ERROR = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-22}


@dataclass(frozen=True, slots=True)
class _Memory:
    """Of one dtype; see `push_sum`. `shared` keeps the other ranks' memory within reach."""

    places_R: tuple[Tensor, ...]
    flags_R: tuple[Tensor, ...]
    epochs_P: Tensor
    shared: list[Any]


class SmallSums:
    """The small all-reduces of one group, by `kernels.triton.push_sum`. Calls must follow one
    another, on one stream at a time, in the same order on all ranks.

    Args:
        group: ranks of one machine; every rank must make it.
        block: elements of a program.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, *, block: int = 2048
    ) -> None:
        self._rank, self._block = group.rank(), block
        self._memory = {dtype: self._made(dtype, group, device) for dtype in DTYPES}
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody writes flags before all have cleared them

    def _made(self, dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device) -> _Memory:
        from torch.distributed import _symmetric_memory as symmetric

        ranks, most = group.size(), MOST_BYTES // dtype.itemsize
        programs = -(-most // self._block)
        places = symmetric.empty(2, ranks, most, dtype=dtype, device=device)
        flags = symmetric.empty(programs, ranks, dtype=torch.int32, device=device)
        held = [symmetric.rendezvous(tensor, group) for tensor in (places, flags)]
        flags.zero_()
        places_R, flags_R = (
            tuple(
                tensor if rank == self._rank else one.get_buffer(rank, tensor.shape, tensor.dtype)
                for rank in range(ranks)
            )
            for tensor, one in zip((places, flags), held, strict=True)
        )
        epochs_P = torch.zeros(programs, dtype=torch.int32, device=device)
        return _Memory(places_R, flags_R, epochs_P, held)

    def takes(self, partial: Tensor) -> bool:
        """Whether a tensor is of a size, dtype and layout that this adds up."""
        size = partial.numel() * partial.element_size()
        return (
            0 < size <= MOST_BYTES
            and size % _ALIGNED == 0
            and partial.dtype in DTYPES
            and partial.is_contiguous()
            and partial.data_ptr() % _ALIGNED == 0
        )

    def __call__(self, partial: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on all of them; a new tensor."""
        held = self._memory[partial.dtype]
        return push_sum(
            partial,
            held.places_R,
            held.flags_R,
            held.epochs_P,
            rank=self._rank,
            block=self._block,
        )


_of: WeakKeyDictionary[dist.ProcessGroup, SmallSums] = WeakKeyDictionary()


def small_sums(group: dist.ProcessGroup) -> SmallSums | None:
    """What adds up small tensors of a group; None where `start_small_sums` found no way."""
    return _of.get(group)


def start_small_sums(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Makes and tries what adds up a group's small tensors; why there is none, the same on every
    rank, or None.
    """
    reason = _first(_missing(device), group)
    if reason is None and len(set(_told(platform.node(), group))) > 1:
        reason = "the ranks are on several machines"
    if reason is not None:
        return reason
    made: SmallSums | None = None
    try:
        made = SmallSums(group, device)
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"memory cannot be shared: {lines[0]}"
    reason = _first(reason, group)
    if made is None or reason is not None:
        return reason
    reason = _first(_wrong(made, group, device), group)
    if reason is None:
        _of[group] = made
    return reason


def _missing(device: torch.device) -> str | None:
    reason = push_sum_refusal(device.type)
    return None if reason is None else f"summing in one launch {reason}"


def _wrong(sums: SmallSums, group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Where a sum differs from the one of the group's own all-reduce, or between ranks. All ranks
    try everything, whatever one of them finds.
    """
    wrong: list[str] = []
    generator = torch.Generator(device).manual_seed(group.rank())
    for dtype in DTYPES:
        for count in _TRIALS:
            part = torch.randn(count, device=device, generator=generator).to(dtype)
            whole = part.double()
            dist.all_reduce(whole, group=group)
            ours = sums(part)
            bits = ours.view(torch.uint8).long()
            everyone = bits.clone()
            dist.all_reduce(everyone, group=group)
            allowed = group.size() * _ERROR[dtype] * float(whole.abs().max())
            if float((ours.double() - whole).abs().max()) > allowed:
                wrong.append(f"{count} elements of {dtype} gave another sum than the all-reduce")
            if not torch.equal(everyone, bits * group.size()):
                wrong.append(f"{count} elements of {dtype} gave different bits on the ranks")
    return wrong[0] if wrong else None


def _first(reason: str | None, group: dist.ProcessGroup) -> str | None:
    """The reason of the first rank that has one, on all ranks."""
    return next((told for told in _told(reason, group) if told is not None), None)


def _told(value: Any, group: dist.ProcessGroup) -> list[Any]:
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, value, group=group)
    return told
