"""Where the elements of a packed parameter come from: boxes of checkpoint tensors, moved about
without looking at a single value.

A `Layout` describes one tensor of a model as a set of boxes, each a box of one checkpoint tensor.
The operations by which checkpoints differ (stacking experts, joining gate and up, transposing,
undoing an interleaved order) and the cuts by which ranks differ (`select`) turn layouts into
layouts; only `Piece.read` touches a file. Shape letters: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

Slicer = Callable[[tuple[slice, ...]], Tensor]
"""Reads a box of one checkpoint tensor."""


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of a box: element i lies at `start + i * stride` of the described tensor, and at
    `offset + i * step` of axis `source` of the checkpoint's tensor.

    Attributes:
        source: None for an axis that the checkpoint's tensor lacks, such as that of the experts.
    """

    start: int
    size: int
    stride: int = 1
    source: int | None = None
    offset: int = 0
    step: int = 1

    def moved(self, by: int) -> Span:
        """The same elements, `by` places further on."""
        return replace(self, start=self.start + by)

    def within(self, start: int, stop: int) -> Span | None:
        """The elements that lie from `start` up to `stop`, counted from `start`."""
        first = max(0, -(-(start - self.start) // self.stride))
        last = min(self.size, -(-(stop - self.start) // self.stride))
        if last <= first:
            return None
        return replace(
            self,
            start=self.start + first * self.stride - start,
            size=last - first,
            offset=self.offset + first * self.step,
        )

    def halves(self, length: int) -> list[Span]:
        """Its even and its odd places, the odd ones behind the even ones, in an axis of `length`:
        what was interleaved is two blocks.
        """
        assert self.stride == 1, "an axis is taken apart before it is spread"
        parts = []
        for parity in (0, 1):
            first = (parity - self.start) % 2
            if first < self.size:
                parts.append(
                    replace(
                        self,
                        start=(self.start + first) // 2 + parity * (length // 2),
                        size=-(-(self.size - first) // 2),
                        offset=self.offset + first * self.step,
                        step=2 * self.step,
                    )
                )
        return parts

    @property
    def target(self) -> slice:
        """Its places in the described tensor."""
        return slice(self.start, self.start + (self.size - 1) * self.stride + 1, self.stride)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one checkpoint tensor, and its place in the described tensor.

    Attributes:
        key: name of the checkpoint's tensor.
        shape: of the checkpoint's tensor.
        spans: one for each axis of the described tensor.
    """

    key: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(span.size for span in self.spans)

    @property
    def target(self) -> tuple[slice, ...]:
        """The box in the described tensor."""
        return tuple(span.target for span in self.spans)

    def read(self, slicer: Slicer) -> Tensor:
        """The box, with the axes of the described tensor."""
        boxes: list[slice] = [slice(0, size) for size in self.shape]
        steps = [1] * len(self.shape)
        for span in self.spans:
            if span.source is not None:
                end = span.offset + (span.size - 1) * span.step + 1
                boxes[span.source] = slice(span.offset, end)
                steps[span.source] = span.step
        found = slicer(tuple(boxes))
        if any(step > 1 for step in steps):  # files are read without gaps
            found = found[tuple(slice(None, None, step) for step in steps)]
        order = [span.source for span in self.spans if span.source is not None]
        found = found.permute(order)
        for axis, span in enumerate(self.spans):
            if span.source is None:
                found = found.unsqueeze(axis)
        return found


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor as boxes of checkpoint tensors, which do not overlap.

    Operations raise `ValueError` where shapes do not fit.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, key: str, shape: Sequence[int]) -> Layout:
        """The checkpoint's tensor as it is."""
        spans = tuple(Span(0, size, source=axis) for axis, size in enumerate(shape))
        return cls(tuple(shape), (Piece(key, tuple(shape), spans),))

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the checkpoint tensors, each once."""
        return tuple(dict.fromkeys(piece.key for piece in self.pieces))

    @property
    def count(self) -> int:
        """Number of elements that the boxes hold."""
        return sum(piece.count for piece in self.pieces)

    def _with_axis(
        self, axis: int, size: int, change: Callable[[Span], Sequence[Span | None]]
    ) -> Layout:
        pieces = [
            replace(piece, spans=(*piece.spans[:axis], span, *piece.spans[axis + 1 :]))
            for piece in self.pieces
            for span in change(piece.spans[axis])
            if span is not None
        ]
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        return Layout(shape, tuple(pieces))

    def transpose(self, first: int, second: int) -> Layout:
        """Two axes swapped."""
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]
        return Layout(
            tuple(self.shape[axis] for axis in order),
            tuple(
                replace(piece, spans=tuple(piece.spans[axis] for axis in order))
                for piece in self.pieces
            ),
        )

    def deinterleave(self, axis: int) -> Layout:
        """Even places first, then odd ones: gate and up rows that alternate become two blocks."""
        length = self.shape[axis]
        if length % 2:
            raise ValueError(f"{length} rows of gate and up cannot alternate")
        return self._with_axis(axis, length, lambda span: span.halves(length))

    def interleave(self, axis: int) -> Layout:
        """The reverse: two blocks become rows that alternate."""
        length = self.shape[axis]
        half = length // 2

        def spread(span: Span) -> list[Span | None]:
            parts = [span.within(0, half), span.within(half, length)]
            return [
                part and replace(part, start=2 * part.start + odd, stride=2 * part.stride)
                for odd, part in enumerate(parts)
            ]

        if length % 2:
            raise ValueError(f"{length} rows of gate and up cannot alternate")
        return self._with_axis(axis, length, spread)

    def select(self, axis: int, ranges: Sequence[range]) -> Layout:
        """The elements of an axis that lie in these ranges, one range behind the other.

        A rank's share is a selection: experts of axis 0, or of the intermediate axis a range of
        gate and one of up.
        """
        starts = [sum(len(before) for before in ranges[:n]) for n in range(len(ranges))]

        def cut(span: Span) -> list[Span | None]:
            found = [span.within(wanted.start, wanted.stop) for wanted in ranges]
            return [
                None if part is None else part.moved(start)
                for part, start in zip(found, starts, strict=True)
            ]

        return self._with_axis(axis, sum(len(wanted) for wanted in ranges), cut)

    def by_row(self) -> list[Layout]:
        """One layout for each place of the first axis, such as each expert, of length 1 there."""
        rows: list[list[Piece]] = [[] for _ in range(self.shape[0])]
        for piece in self.pieces:
            span, *others = piece.spans
            for number in range(span.size):
                offset = span.offset + number * span.step
                row = replace(span, start=0, size=1, offset=offset)
                place = span.start + number * span.stride
                rows[place].append(replace(piece, spans=(row, *others)))
        return [Layout((1, *self.shape[1:]), tuple(row)) for row in rows]

    def chunks(self, axis: int, count: int) -> list[Layout]:
        """Equal parts along an axis."""
        size = self.shape[axis]
        if size % count:
            raise ValueError(f"{size} rows cannot be cut into {count} equal parts")
        length = size // count
        return [self.select(axis, [range(n * length, (n + 1) * length)]) for n in range(count)]


def stack(layouts: Sequence[Layout], axis: int) -> Layout:
    """Tensors of one shape along a new axis, as the experts of a list."""
    shape = layouts[0].shape
    for layout in layouts:
        if layout.shape != shape:
            raise ValueError(
                f"{layout.keys[0]} has shape {layout.shape} where {layouts[0].keys[0]} has {shape}"
            )
    pieces = [
        replace(piece, spans=(*piece.spans[:axis], Span(number, 1), *piece.spans[axis:]))
        for number, layout in enumerate(layouts)
        for piece in layout.pieces
    ]
    return Layout((*shape[:axis], len(layouts), *shape[axis:]), tuple(pieces))


def concatenate(layouts: Sequence[Layout], axis: int) -> Layout:
    """Tensors behind one another along an axis, as gate and up."""
    pieces: list[Piece] = []
    start = 0
    first = layouts[0].shape
    for layout in layouts:
        if (
            layout.shape[:axis] != first[:axis]
            or layout.shape[axis + 1 :] != first[axis + 1 :]
            or len(layout.shape) != len(first)
        ):
            raise ValueError(
                f"{layout.keys[0]} has shape {layout.shape}, which cannot stand behind "
                f"{layouts[0].keys[0]} of shape {first}"
            )
        for piece in layout.pieces:
            span = piece.spans[axis].moved(start)
            spans = (*piece.spans[:axis], span, *piece.spans[axis + 1 :])
            pieces.append(replace(piece, spans=spans))
        start += layout.shape[axis]
    return Layout((*first[:axis], start, *first[axis + 1 :]), tuple(pieces))
