"""Reading a planned checkpoint into a model, with little more memory than the model has.

Every tensor of the model is allocated once, and its elements are copied to their places as they
are read: no expert is held a second time. Shape letters: E experts.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import set_param_for_module

from moetor.errors import CheckpointError
from moetor.huggingface.checkpoint import CheckpointReader
from moetor.huggingface.layout import Layout
from moetor.huggingface.load_steps import LoadPlan, Source, Streamed
from moetor.kernels.native.pages import prefer_huge_pages

READERS = min(4, os.cpu_count() or 1)
LoadProgress = Callable[[int, int, str], None]
"""`progress(done, total, item)` in tensors of the checkpoint; `item` is a line of figures."""
Parts = Sequence[tuple[int | None, Layout]]
"""Expert, or None for a whole tensor, and where its elements come from."""


class WeightSink(ABC):
    """Where streamed weights go. Called by several threads.

    A quantised format is a sink that hands out one expert's memory at a time and packs it in
    `done`; a rank of a group streams layouts of which it has selected its share.
    """

    @abstractmethod
    def by_expert(self, item: Streamed) -> bool:
        """Whether the tensor is handed over one expert at a time."""

    def takes(
        self, item: Streamed, expert: int | None, layout: Layout, reader: CheckpointReader
    ) -> bool:
        """Whether the sink has read this part itself, such as codes that are kept as they are."""
        return False

    @abstractmethod
    def place(self, item: Streamed, expert: int | None) -> Tensor:
        """Memory for the tensor, or for one expert's part of it, of length 1 on the first axis."""

    @abstractmethod
    def done(self, item: Streamed, expert: int | None) -> None:
        """What `place` gave is full."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The finished tensors, by name in the model."""


class PlainSink(WeightSink):
    """Tensors as the model has them, filled in place.

    Args:
        host: paths of experts modules whose matrices stay in host memory; in the model, stand-ins
            take their places.
    """

    def __init__(
        self, shapes: Mapping[str, Tensor], device: torch.device, host: Collection[str] = ()
    ) -> None:
        self._shapes = shapes
        self._device = device
        self._host = frozenset(host)
        self._made: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def stays_on_host(self, name: str) -> bool:
        """Whether the tensor of this name is a matrix of experts in host memory."""
        return name.rpartition(".")[0] in self._host and self._shapes[name].dim() == 3

    def by_expert(self, item: Streamed) -> bool:
        """Three dimensions and many boxes: threads share the work."""
        return len(item.layout.shape) == 3

    def place(self, item: Streamed, expert: int | None) -> Tensor:
        """A view of the tensor."""
        with self._lock:
            if item.name not in self._made:
                self._made[item.name] = self._new(item)
            whole = self._made[item.name]
        return whole if expert is None else whole[expert : expert + 1]

    def _new(self, item: Streamed) -> Tensor:
        shape = self._shapes[item.name].shape
        device = "cpu" if self.stays_on_host(item.name) else self._device
        made = torch.empty(shape, dtype=item.dtype, device=device)
        prefer_huge_pages(made)
        if tuple(shape) != item.layout.shape:
            made[item.layout.shape[0] :].zero_()  # rows of experts without weights
        return made

    def done(self, item: Streamed, expert: int | None) -> None:
        """Nothing is left to do."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSink.tensors`."""
        for name, tensor in self._made.items():
            stays = self.stays_on_host(name)
            yield name, stand_in(tensor.shape, tensor.dtype, self._device) if stays else tensor

    def host_tensors(self) -> dict[str, Tensor]:
        """What stays in host memory, by name in the model."""
        return {name: made for name, made in self._made.items() if self.stays_on_host(name)}


def stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One zero in every place."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What a load took.

    Attributes:
        tensors: of the checkpoint that were read.
        nbytes: of the model that were filled.
        seconds: from the first read to the last.
    """

    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.nbytes / max(self.seconds, 1e-9)
        return (
            f"{size_text(self.nbytes)}, {self.tensors / max(self.seconds, 1e-9):.0f} tensors/s, "
            f"{size_text(rate)}/s"
        )


def size_text(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def stream_weights(
    model: Any,
    plan: LoadPlan,
    reader: CheckpointReader,
    sink: WeightSink,
    *,
    device: torch.device,
    progress: LoadProgress | None = None,
) -> LoadFigures:
    """Reads everything that the plan lists and gives the model its tensors.

    Interrupted, it stops reading and raises; nothing was written anywhere.

    Raises:
        CheckpointError: a tensor cannot be converted.
    """
    meter = _Meter(plan.tensors, progress)
    _read(((item, _parts(sink, item)) for item in plan.streamed), reader, sink, meter)
    for name, tensor in sink.tensors():
        set_param_for_module(model, name, tensor, plan.info, None)
    for step in plan.converted:
        made = step.run(model, plan.info, _source(reader, step.dtype))
        if plan.info.conversion_errors:
            raise CheckpointError(
                f"{reader.checkpoint.folder}: {next(iter(plan.info.conversion_errors.values()))}"
            )
        for name, tensor in made.items():
            set_param_for_module(model, name, tensor.to(device), plan.info, None)
        reader.close()
        meter.add(
            sum(len(keys) for keys in step.keys.values()),
            sum(tensor.nbytes for tensor in made.values()),
        )
    return meter.figures


def read_parts(
    parts: Sequence[tuple[Streamed, Parts]],
    reader: CheckpointReader,
    sink: WeightSink,
    progress: LoadProgress | None = None,
) -> LoadFigures:
    """Reads parts of tensors into a sink.

    Args:
        parts: of each tensor those that are wanted, by the number under which the sink is asked for
            a place.
    """
    keys = {key for _, some in parts for _, layout in some for key in layout.keys}
    meter = _Meter(len(keys), progress)
    _read(parts, reader, sink, meter)
    return meter.figures


def _read(
    parts: Iterable[tuple[Streamed, Parts]],
    reader: CheckpointReader,
    sink: WeightSink,
    meter: _Meter,
) -> None:
    pool = ThreadPoolExecutor(READERS, "moetor-load")
    try:
        waiting = [
            (some, [pool.submit(_fill, sink, reader, item, *part) for part in some])
            for item, some in parts
        ]
        for some, futures in waiting:
            keys = {key for _, layout in some for key in layout.keys}
            meter.add(len(keys), sum(_results(futures)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _parts(sink: WeightSink, item: Streamed) -> Parts:
    if not sink.by_expert(item):
        return [(None, item.layout)]
    return list(enumerate(item.layout.by_row()))


def _fill(
    sink: WeightSink, reader: CheckpointReader, item: Streamed, expert: int | None, layout: Layout
) -> int:
    if sink.takes(item, expert, layout, reader):
        return layout.count * item.dtype.itemsize
    out = sink.place(item, expert)
    for piece in layout.pieces:
        out[piece.target].copy_(piece.read(partial(reader.read, piece.key)))
    sink.done(item, expert)
    return layout.count * item.dtype.itemsize


def _source(reader: CheckpointReader, dtype: torch.dtype) -> Source:
    """The checkpoint's tensors, each a copy of its own."""

    def read(key: str) -> Tensor:
        return reader.read(key).to(dtype, copy=True)

    return read


def _results(futures: list[Future[int]]) -> list[int]:
    return [future.result() for future in futures]


class _Meter:
    """Counts, and tells `progress`."""

    def __init__(self, total: int, progress: LoadProgress | None) -> None:
        self.total = total
        self.progress = progress
        self.tensors, self.nbytes = 0, 0
        self.start = time.perf_counter()

    @property
    def figures(self) -> LoadFigures:
        return LoadFigures(self.tensors, self.nbytes, time.perf_counter() - self.start)

    def add(self, tensors: int, nbytes: int) -> None:
        self.tensors += tensors
        self.nbytes += nbytes
        if self.progress is not None:
            done = min(self.tensors, self.total)  # one tensor may fill two of the model's
            self.progress(done, self.total, str(self.figures))
