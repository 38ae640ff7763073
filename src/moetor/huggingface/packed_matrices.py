"""What the kinds of quantised checkpoints share: a matrix and the tensors that make it up.

Shape letters: N outputs of a product, D its depth, G group size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetor.errors import CheckpointError, UnsupportedError
from moetor.huggingface.checkpoint import StoredTensor
from moetor.huggingface.packed_tensors import PackedTensor, Plain8Bit
from moetor.kernels.formats import WeightFormat, find_format

_GROUPS = (128, 64, 32)
Settings = Mapping[str, Any]
"""A checkpoint's `quantization_config`."""
Found = list[tuple[PackedTensor, list[str]]]
"""Each matrix and the tensors that make it up."""


def shape_error(tensor: StoredTensor, wanted: object) -> CheckpointError:
    """The error about a tensor of another shape."""
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, it must be {wanted}"
    )


def eight_bits(
    tensors: Mapping[str, StoredTensor],
    weight: str,
    scale: str,
    *,
    block: tuple[int, int] | None,
    input_scale: str | None,
) -> tuple[PackedTensor, list[str]]:
    """int8 or fp8 values with one scale, one a row or one a block."""
    for name, other in ((weight, scale), (scale, weight)):
        if name not in tensors:
            raise CheckpointError(f"{tensors[other].file}: {other} lacks the tensor {name}")
    values, scales = tensors[weight], tensors[scale]
    *lead, rows, depth = values.shape
    kind = find_format("fp8" if values.dtype == "F8_E4M3" else "int8")
    shape = tuple(size for size in scales.shape[len(lead) :] if size != 1)
    blocks = None if block is None else (-(-rows // block[0]), -(-depth // block[1]))
    if block is not None and tuple(scales.shape[len(lead) :]) == blocks:
        kind = WeightFormat(element="e4m3", group=block)
    elif block is not None or shape not in ((), (rows,)):
        one_a_row = f"[], [1], [{rows}] or [{rows}, 1]"
        raise shape_error(scales, one_a_row if blocks is None else list(blocks))
    names = [weight, scale, *([input_scale] if input_scale else [])]
    matrix = Plain8Bit(
        name=weight,
        rows=rows,
        depth=depth,
        kind=kind,
        experts=lead[0] if lead else None,
        weight=weight,
        scale=scale,
        input_scale=input_scale,
    )
    return matrix, names


def group_kind(
    bits: int, group: int, depth: int, zero_points: bool, name: str
) -> tuple[WeightFormat, int]:
    """Our format for groups of this size, and how many of our groups one of theirs makes."""
    size = depth if group in (-1, 0) else group
    ours = next((one for one in _GROUPS if size % one == 0), None)
    if ours is None or depth % size or bits not in (4, 8) or (bits == 8 and zero_points):
        raise UnsupportedError(
            f"{name} has {bits}-bit values in groups of {size} along a depth of {depth}"
            f"{' with zero points' if zero_points else ''}; read are 4 bits, or 8 bits without "
            "zero points, in groups that are multiples of 32 and divide the depth"
        )
    element = "int4" if bits == 4 else "int8"
    suffix = "_zp" if zero_points else ""
    return find_format(f"{element}_g{ours}{suffix}"), size // ours


def check_shape(tensors: Mapping[str, StoredTensor], name: str, wanted: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape, by name."""
    if name in tensors and tensors[name].shape != wanted:
        raise shape_error(tensors[name], list(wanted))
