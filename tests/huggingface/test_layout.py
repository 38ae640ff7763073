"""Layouts against the same operations on tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moetor.huggingface.layout import Layout, Piece, concatenate, stack

Pair = tuple[Layout, Tensor]


class Store:
    """Random tensors by name."""

    def __init__(self, rng: torch.Generator) -> None:
        self.rng = rng
        self.tensors: dict[str, Tensor] = {}

    def new(self, shape: Sequence[int]) -> Pair:
        key = f"t{len(self.tensors)}"
        self.tensors[key] = torch.randn(*shape, generator=self.rng)
        return Layout.of(key, shape), self.tensors[key]

    def fill(self, layout: Layout) -> Tensor:
        """The layout's tensor; places that no box covers stay NaN."""
        out = torch.full(layout.shape, float("nan"))
        for piece in layout.pieces:
            before = out[piece.target]
            assert bool(before.isnan().all()), "boxes overlap"
            out[piece.target] = piece.read(lambda box, piece=piece: self._read(piece, box))
        return out

    def _read(self, piece: Piece, box: tuple[slice, ...]) -> Tensor:
        tensor = self.tensors[piece.key]
        assert piece.shape == tuple(tensor.shape)
        assert len(box) == tensor.dim()
        for cut, size in zip(box, tensor.shape, strict=True):
            assert cut.step is None, "files are read without gaps"
            assert 0 <= cut.start < cut.stop <= size
        return tensor[box]


def step(pair: Pair, dice: random.Random) -> Pair:
    """One random operation on both sides."""
    layout, tensor = pair
    axis = dice.randrange(tensor.dim())
    length = tensor.shape[axis]
    kind = dice.choice(["transpose", "interleave", "select", "chunks", "stack", "concatenate"])
    if kind == "transpose":
        other = dice.randrange(tensor.dim())
        return layout.transpose(axis, other), tensor.transpose(axis, other)
    if kind == "interleave" and length % 2 == 0:
        halves = tensor.chunk(2, axis)
        mixed = torch.stack(halves, axis + 1).flatten(axis, axis + 1)
        return layout.interleave(axis), mixed
    if kind == "select" and length > 2:
        cuts = sorted(dice.sample(range(length + 1), 3))
        ranges = [range(cuts[0], cuts[1]), range(cuts[1], cuts[2])]
        index = [place for one in ranges for place in one]
        return layout.select(axis, ranges), tensor.index_select(axis, torch.tensor(index))
    if kind == "chunks" and length % 3 == 0:
        number = dice.randrange(3)
        return layout.chunks(axis, 3)[number], tensor.chunk(3, axis)[number]
    if kind == "stack" and tensor.dim() < 4:
        return stack([layout, layout], axis), torch.stack([tensor, tensor], axis)
    return concatenate([layout, layout], axis), torch.cat([tensor, tensor], axis)


@pytest.mark.parametrize("case", range(40))
def test_chains_as_torch(case: int, rng: torch.Generator, seed: int) -> None:
    dice, store = random.Random(seed + case), Store(rng)
    pair = store.new([dice.randint(1, 6) for _ in range(dice.randint(1, 3))])
    for _ in range(dice.randint(1, 6)):
        pair = step(pair, dice)
    layout, tensor = pair
    assert layout.shape == tuple(tensor.shape)
    assert layout.count == tensor.numel()
    assert torch.equal(store.fill(layout), tensor)
    rows = layout.by_row()
    assert torch.equal(torch.cat([store.fill(row) for row in rows]), tensor)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("starts", [1, 2])
def test_deinterleave(axis: int, starts: int, rng: torch.Generator) -> None:
    """Even places first, whether the tensor is one box or begins at an odd place of several."""
    store = Store(rng)
    shape = [4, 4, 4]
    first = [*shape]
    first[axis] = starts
    rest = [*shape]
    rest[axis] = 4 - starts
    (a, x), (b, y) = store.new(first), store.new(rest)
    tensor = torch.cat([x, y], axis)
    index = torch.tensor([0, 2, 1, 3])
    found = concatenate([a, b], axis).deinterleave(axis)
    assert torch.equal(store.fill(found), tensor.index_select(axis, index))


def test_a_rank_reads_its_own_bytes(rng: torch.Generator) -> None:
    """Two experts of eight, and of each a third of gate and of up."""
    store = Store(rng)
    experts = [(store.new([6, 5]), store.new([6, 5])) for _ in range(8)]
    gate = stack([pair[0][0] for pair in experts], 0)
    up = stack([pair[1][0] for pair in experts], 0)
    whole = concatenate([gate, up], 1)
    share = whole.select(0, [range(2, 4)]).select(1, [range(2, 4), range(8, 10)])
    assert share.shape == (2, 4, 5)
    assert set(share.keys) == {"t4", "t5", "t6", "t7"}
    full = store.fill(whole)
    assert torch.equal(store.fill(share), full[2:4][:, [2, 3, 8, 9]])
    assert share.count == 2 * 4 * 5


def test_shapes_that_do_not_fit(rng: torch.Generator) -> None:
    store = Store(rng)
    a, b = store.new([3, 4])[0], store.new([3, 5])[0]
    with pytest.raises(ValueError, match=r"t1 has shape \(3, 5\) where t0 has \(3, 4\)"):
        stack([a, b], 0)
    with pytest.raises(ValueError, match=r"t1 has shape \(3, 5\)"):
        concatenate([a, b], 0)
    for operation in (a.interleave, a.deinterleave):
        with pytest.raises(ValueError, match="3 rows of gate and up"):
            operation(0)
    with pytest.raises(ValueError, match="4 rows cannot be cut into 3"):
        a.chunks(1, 3)
