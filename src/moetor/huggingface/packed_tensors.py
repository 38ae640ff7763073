"""Quantised matrices as other programs store them, turned into the codes of our own formats: bits
are moved, no weight is rounded anew.

Shape letters: E experts, N outputs of a product, D its depth, G group size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moetor.errors import CheckpointError
from moetor.kernels.dequantize import pack_nibbles
from moetor.kernels.formats import WeightFormat
from moetor.quantization.quantize import Codes

Read = Callable[[str, int | None], Tensor]
"""Gives a tensor of the checkpoint, or one expert's part of it."""

# The column that each 4-bit place of an AWQ word holds, lowest bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class PackedTensor(ABC):
    """One quantised matrix of a checkpoint, or those of all experts in one tensor.

    Attributes:
        name: under which the model knows the matrix.
        rows, depth: N and D.
        kind: the format it becomes.
        experts: E where all are in one tensor.
        transposed: whether the model has it as [.., D, N].
        input_scale: name of the static scale of its input.
    """

    name: str
    rows: int
    depth: int
    kind: WeightFormat
    experts: int | None = None
    transposed: bool = False
    input_scale: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As the model has it."""
        matrix = (self.depth, self.rows) if self.transposed else (self.rows, self.depth)
        return matrix if self.experts is None else (self.experts, *matrix)

    @abstractmethod
    def codes(self, read: Read, expert: int | None) -> Codes:
        """One matrix.

        Raises:
            CheckpointError: names a scale that is zero or not finite.
        """


def checked_scales(name: str, scales: Tensor) -> Tensor:
    """The scales, which must be usable.

    Raises:
        CheckpointError: one is zero, NaN or infinite.
    """
    if scales.dtype == torch.uint8:  # e8m0
        if bool((scales == 255).any()):
            raise CheckpointError(f"tensor {name} holds a scale that is NaN")
        return scales
    wide = scales.float()
    if not bool(torch.isfinite(wide).all()):
        raise CheckpointError(f"tensor {name} holds a scale that is NaN or infinite")
    if bool((wide == 0).any()):
        raise CheckpointError(f"tensor {name} holds a scale of zero")
    return scales


def by_group(scales_NG: Tensor, repeat: int) -> Tensor:
    """Scales of a coarser group for each of our groups."""
    return scales_NG.repeat_interleave(repeat, 1) if repeat > 1 else scales_NG.contiguous()


@dataclass(frozen=True, kw_only=True)
class Plain8Bit(PackedTensor):
    """A tensor of int8 or float8 e4m3 [N, D], with one scale, one a row, or one a block.

    Attributes:
        weight, scale: names of the tensors.
    """

    weight: str
    scale: str

    def codes(self, read: Read, expert: int | None) -> Codes:
        """See `PackedTensor.codes`."""
        values = read(self.weight, expert)
        # Of float8 e4m3, all bits but the sign set are NaN.
        if values.dtype == torch.float8_e4m3fn and bool(
            ((values.view(torch.uint8) & 127) == 127).any()
        ):
            raise CheckpointError(f"tensor {self.weight} holds a NaN")
        scales = checked_scales(self.scale, read(self.scale, expert)).float()
        if self.kind.group[1]:
            return Codes(values=values, scales=scales.reshape(self.kind.scale_shape(*values.shape)))
        return Codes(values=values, scales=scales.flatten().expand(self.rows).contiguous())


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """[..., W] int32 to [..., W * 32 / bits] uint8, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    numbers: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return numbers.to(torch.uint8).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class Integers(PackedTensor):
    """Whole numbers of 4 or 8 bits in groups: base of GPTQ, AWQ and packed compressed-tensors.

    Attributes:
        bits: 4 or 8.
        repeat: how many of our groups one of theirs makes.
        scale: name of the scales.
    """

    bits: int
    repeat: int
    scale: str

    @abstractmethod
    def numbers(self, read: Read, expert: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unsigned codes [N, D], scales and zero points [N, D / (G * repeat)]; None: the middle."""

    def codes(self, read: Read, expert: int | None) -> Codes:
        """See `PackedTensor.codes`."""
        numbers_ND, scales, zeros = self.numbers(read, expert)
        scales = by_group(checked_scales(self.scale, scales), self.repeat)
        if scales.dtype not in self.kind.scale_dtypes:
            scales = scales.float()
        if self.bits == 8:
            values = (numbers_ND.to(torch.int16) - 128).to(torch.int8)
            return Codes(values=values, scales=scales)
        values = pack_nibbles(numbers_ND)
        if not self.kind.zero_points:
            return Codes(values=values, scales=scales)
        if zeros is None:
            zeros = torch.full_like(scales, 8)
        else:
            zeros = by_group(zeros, self.repeat).to(scales.dtype)
        return Codes(values=values, scales=scales, zero_points=zeros)


@dataclass(frozen=True, kw_only=True)
class CompressedIntegers(Integers):
    """compressed-tensors' `pack-quantized`: int32 words along the depth, codes shifted to be
    unsigned; zero points packed along the rows.
    """

    packed: str
    zero_point: str | None = None

    def numbers(self, read: Read, expert: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Integers.numbers`."""
        numbers = unpack_words(read(self.packed, expert), self.bits)[:, : self.depth]
        scales = read(self.scale, expert)
        if self.zero_point is None:
            return numbers, scales, None
        zeros = unpack_words(read(self.zero_point, expert).T.contiguous(), self.bits)
        return numbers, scales, zeros.T[: self.rows].contiguous()


@dataclass(frozen=True, kw_only=True)
class Gptq(Integers):
    """GPTQ: qweight [D / 8, N] with the depth in words, scales [D / G, N], qzeros [D / G, N / 8].

    Attributes:
        prefix: of the tensors' names.
        zero_shift: 1 in the first version of the format, which stores zero points less one.
        grouped: whether there is a g_idx, which must be i // G.
    """

    prefix: str
    zero_shift: int
    grouped: bool
    group_size: int

    def numbers(self, read: Read, expert: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Integers.numbers`."""
        if self.grouped:
            order = read(f"{self.prefix}.g_idx", expert)
            plain = torch.arange(self.depth, device=order.device) // self.group_size
            if not torch.equal(order.long(), plain):
                raise CheckpointError(
                    f"tensor {self.prefix}.g_idx orders the depth by activations (act-order), "
                    "which is not read; take a checkpoint with desc_act=false"
                )
        words = read(f"{self.prefix}.qweight", expert).T.contiguous()
        numbers = unpack_words(words, self.bits)
        scales = read(self.scale, expert).T.contiguous()
        zeros = unpack_words(read(f"{self.prefix}.qzeros", expert), self.bits)
        shifted = (zeros.to(torch.int16) + self.zero_shift).T
        if not self.kind.zero_points:
            middle = 2 ** (self.bits - 1)
            if bool((shifted != middle).any()):
                raise CheckpointError(
                    f"tensor {self.prefix}.qzeros has zero points other than {middle}, and the "
                    "configuration says sym=true"
                )
            return numbers, scales, None
        return numbers, scales, shifted.contiguous()


@dataclass(frozen=True, kw_only=True)
class Awq(Integers):
    """AWQ: qweight [D, N / 8] with the rows in words, in an order of their own, scales [D / G, N],
    qzeros [D / G, N / 8] alike.
    """

    prefix: str

    def numbers(self, read: Read, expert: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Integers.numbers`."""
        numbers = self._unpack(read(f"{self.prefix}.qweight", expert)).T.contiguous()
        scales = read(self.scale, expert).T.contiguous()
        zeros = self._unpack(read(f"{self.prefix}.qzeros", expert)).T.contiguous()
        return numbers, scales, zeros

    @staticmethod
    def _unpack(words: Tensor) -> Tensor:
        places: Tensor = unpack_words(words, 4).unflatten(-1, (-1, 8))
        return places[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(-2)


@dataclass(frozen=True, kw_only=True)
class MicroFloats(PackedTensor):
    """4-bit floats, two in a byte, the first in the low bits: mxfp4 and nvfp4.

    Attributes:
        blocks, scale: names of the tensors.
        global_scale: nvfp4's second scale, by which weights are divided.
    """

    blocks: str
    scale: str
    global_scale: str | None = None

    def codes(self, read: Read, expert: int | None) -> Codes:
        """See `PackedTensor.codes`."""
        packed = read(self.blocks, expert).reshape(self.rows, -1)
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
        scales = checked_scales(self.scale, read(self.scale, expert)).contiguous()
        missing = self.kind.padded(self.depth) - nibbles.shape[1]
        if missing:  # nvfp4 with an odd number of groups
            nibbles = torch.nn.functional.pad(nibbles, (0, missing))
            groups = missing // self.kind.group[1]
            filler = torch.ones((self.rows, groups), dtype=torch.float32, device=scales.device)
            scales = torch.cat((scales.float(), filler), dim=1).to(scales.dtype)
        row_scales = None
        if self.global_scale is not None:
            whole = checked_scales(self.global_scale, read(self.global_scale, expert)).float()
            row_scales = (1 / whole).flatten().expand(self.rows).contiguous()
        return Codes(values=pack_nibbles(nibbles), scales=scales, row_scales=row_scales)
