"""All-reduces of small tensors in one launch, through memory that the ranks of one machine share.

A rank writes its part into the others' memory, waits for theirs, and adds them up: one trip over
NVLink. For a few tokens this is what counts (one-shot all-reduce). The memory is that of
`torch.distributed._symmetric_memory`.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moetor.kernels import dense
from moetor.kernels.dense import Norm
from moetor.kernels.triton.push_sum import (
    SharedMemory,
    push_sum,
    push_sum_norm,
    push_sum_refusal,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MEASURED_BYTES, MOST_BYTES = 512 * 2**10, 2**20
MOST_ROWS = 256
_ALIGNED = 16
_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
# Rows and their width, of tensors that are tried.
_TRIALS = ((1, 8), (1, 2048), (128, 1000))
ERROR = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}


class SharedTensors:
    """Memory that all ranks of a group can write to.

    Args:
        group: ranks of one machine; every rank must ask for the same.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._held: list[Any] = []  # keeps the other ranks' memory within reach

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, programs: int) -> SharedMemory:
        """Places of this shape, with flags and counts of so many programs."""
        places_R = self._everyones(shape, dtype)
        flags_R = self._everyones((programs, self._group.size()), torch.int32)
        epochs_P = torch.zeros(programs, dtype=torch.int32, device=self._device)
        return SharedMemory(places_R, flags_R, epochs_P, self._group.rank())

    def meet(self) -> None:
        """To be called before memory is used: nobody writes flags before all have cleared them."""
        torch.cuda.synchronize(self._device)
        dist.barrier(self._group)

    def _everyones(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A tensor of every rank, this one's zero."""
        from torch.distributed import _symmetric_memory as symmetric

        own = symmetric.empty(*shape, dtype=dtype, device=self._device)
        handle = symmetric.rendezvous(own, self._group)
        self._held += [own, handle]
        own.zero_()
        return tuple(handle.get_buffer(rank, shape, dtype) for rank in range(self._group.size()))


class SmallSums:
    """The small all-reduces of one group, by `kernels.triton.push_sum`. Calls must follow one
    another, on one stream at a time, in the same order on all ranks.

    Args:
        group: ranks of one machine; every rank must make it.
        block: elements of a program.
        most_bytes: of a tensor.
        norms: whether it also adds residuals and norms.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        block: int = 2048,
        most_bytes: int = MOST_BYTES,
        norms: bool = True,
    ) -> None:
        self._block, self._most_bytes, self.norms = block, most_bytes, norms
        shared = self._shared = SharedTensors(group, device)
        self._sums, self._norms = (
            {
                dtype: shared.memory((2, group.size(), most_bytes // dtype.itemsize), dtype, count)
                for dtype in (DTYPES if wanted else ())
            }
            for count, wanted in ((-(-most_bytes // (2 * block)), True), (MOST_ROWS, norms))
        )
        shared.meet()

    def takes(self, partial: Tensor) -> bool:
        """Whether a tensor is of a size, dtype and layout that this adds up."""
        size = partial.numel() * partial.element_size()
        return (
            0 < size <= self._most_bytes
            and size % _ALIGNED == 0
            and partial.dtype in DTYPES
            and partial.is_contiguous()
            and partial.data_ptr() % _ALIGNED == 0
        )

    def takes_rows(self, hidden: Tensor) -> bool:
        """Whether `add_rms_norm` is for tensors of this one's shape and dtype."""
        size, rows = hidden.numel() * hidden.element_size(), hidden.numel() // hidden.shape[-1]
        return (
            self.norms
            and 0 < size <= self._most_bytes
            and rows <= MOST_ROWS
            and hidden.shape[-1] * hidden.element_size() % _ALIGNED == 0
            and hidden.dtype in DTYPES
        )

    def __call__(self, partial: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on all of them; a new tensor."""
        return push_sum(partial, self._sums[partial.dtype], self._block)

    def add_rms_norm(self, partial: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """As `dense.add_rms_norm` of the sum over the ranks; in a launch."""
        memory = self._norms[partial.dtype]
        return push_sum_norm(partial.contiguous(), residual.contiguous(), norm, memory)


_of: WeakKeyDictionary[dist.ProcessGroup, SmallSums] = WeakKeyDictionary()


def small_sums(group: dist.ProcessGroup) -> SmallSums | None:
    """What adds up small tensors of a group; None where `start_small_sums` found no way."""
    return _of.get(group)


def start_small_sums(
    group: dist.ProcessGroup, device: torch.device, *, everything: bool
) -> str | None:
    """Makes and tries what adds up a group's small tensors; why there is none, the same on every
    rank, or None.

    Args:
        everything: also what has not been measured: more than 512 KiB, and norms.
    """
    reason = why_not_shared(group, device)
    if reason is not None:
        return reason
    made: SmallSums | None = None
    try:
        most = MOST_BYTES if everything else MEASURED_BYTES
        made = SmallSums(group, device, most_bytes=most, norms=everything)
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"memory cannot be shared: {lines[0]}"
    reason = first_reason(reason, group)
    if made is None or reason is not None:
        return reason
    reason = first_reason(_wrong(made, group, device), group)
    if reason is None:
        _of[group] = made
    return reason


def why_not_shared(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why ranks have no memory in common, the same on every rank, or None."""
    refused = push_sum_refusal(device.type)
    reason = first_reason(None if refused is None else f"a direct collective {refused}", group)
    if reason is not None:
        return reason
    places = _told((platform.node(), torch.cuda.current_device()), group)
    if len({node for node, _ in places}) > 1:
        return "the ranks are on several machines"
    gpus = [gpu for _, gpu in places]
    return first_reason(no_link(gpus[group.rank()], gpus), group)


def no_link(own: int, gpus: Sequence[int]) -> str | None:
    """Why a GPU cannot set flags in the memory of the others, or None: that takes atomic operations
    on it, which NVLink has and PCI Express need not have.

    Args:
        gpus: of all ranks, as numbered in their processes.
    """
    if len(set(gpus)) < len(gpus):
        return "a rank does not see the other ranks' GPUs (CUDA_VISIBLE_DEVICES)"
    for other in gpus:
        if other != own and not _has_atomics(own, other):
            return f"GPU {own} has no atomic operations on the memory of GPU {other} (no NVLink?)"
    return None


def _has_atomics(own: int, other: int) -> bool:
    found = ctypes.c_int()
    failed = ctypes.CDLL("libcuda.so.1").cuDeviceGetP2PAttribute(
        ctypes.byref(found), _NATIVE_ATOMICS, own, other
    )
    return not failed and bool(found.value)


def _wrong(sums: SmallSums, group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Where a result differs from that of the group's own all-reduce, or between ranks. All ranks
    try everything, whatever one of them finds.
    """
    wrong: list[str] = []
    generator = torch.Generator(device).manual_seed(group.rank())
    alike = torch.Generator(device).manual_seed(group.size())

    def compare(what: str, ours: Tensor, wanted: Tensor) -> None:
        bits = ours.flatten().view(torch.uint8).long()
        everyone = bits.clone()
        dist.all_reduce(everyone, group=group)
        allowed = group.size() * ERROR[ours.dtype] * float(wanted.abs().max())
        if float((ours.double() - wanted).abs().max()) > allowed:
            wrong.append(f"{what} is not that of the all-reduce")
        if not torch.equal(everyone, bits * group.size()):
            wrong.append(f"{what} has other bits on another rank")

    for dtype in DTYPES:
        for rows, width in _TRIALS:
            part = torch.randn(rows, width, device=device, generator=generator).to(dtype)
            residual = torch.randn(rows, width, device=device, generator=alike).to(dtype)
            whole = part.double()
            dist.all_reduce(whole, group=group)
            what = f"of {rows} x {width} {dtype} the sum"
            compare(what, sums(part), whole)
            if not sums.norms:
                continue
            normed, total = sums.add_rms_norm(part, residual, Norm(None, 1e-6))
            compare(what + " with a residual", total, whole + residual.double())
            compare(
                what + "'s norm",
                normed,
                dense.rms_norm((whole + residual.double()), Norm(None, 1e-6), in_torch=True),
            )
    return wrong[0] if wrong else None


def first_reason(reason: str | None, group: dist.ProcessGroup) -> str | None:
    """The reason of the first rank that has one, on all ranks."""
    return next((told for told in _told(reason, group) if told is not None), None)


def _told(value: Any, group: dist.ProcessGroup) -> list[Any]:
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, value, group=group)
    return told
