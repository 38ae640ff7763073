"""From numbers to codes: one expert's matrix at a time, into buffers that are made once.

Shape letters: E experts, N outputs of a product, D its depth, P depth padded to whole groups, G
group size, J rows of the first product, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.errors import InputError
from moetor.kernels.dequantize import E2M1_VALUES, e2m1, pack_nibbles, shared_exponent
from moetor.kernels.formats import E2M1_MAX, E4M3_MAX, QuantizedMatrix, WeightFormat
from moetor.kernels.native.pages import prefer_huge_pages

# Neither a subnormal of float8 e4m3 nor zero: nvfp4 multiplies by it.
_SMALLEST_E4M3 = 2.0**-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """One expert's matrix as a format stores it: the fields of `QuantizedMatrix`, without E."""

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    row_scales: Tensor | None = None


def quantize(weight_ND: Tensor, kind: WeightFormat, *, per_tensor: int = 0) -> Codes:
    """One matrix in format `kind`, rounded to nearest.

    Scales are the smallest that leave no value more than half a step outside the codes: the
    largest magnitude is 127 (int8), 7.5 (int4), 448 (e4m3), or for zero points the range is 15;
    microscaling exponents as `shared_exponent`. A group of zeros has scale 1.

    Args:
        weight_ND: any floating dtype, finite.
        per_tensor: for `int8` and `fp8`: this many equal runs of rows have one scale each, as a
            checkpoint with a scale per projection has it; 0 for a scale per row.

    Raises:
        InputError: a value is not finite.
    """
    weight = weight_ND.float()
    if not bool(torch.isfinite(weight).all()):
        raise InputError("a weight is NaN or infinite and cannot be quantised")
    if kind.group[1] == 0:
        return _by_row(weight, kind, per_tensor)
    if kind.group[0] > 1:
        return _by_block(weight, kind)
    groups = F.pad(weight, (0, kind.padded(weight.shape[1]) - weight.shape[1]))
    groups_NXG = groups.unflatten(-1, (-1, kind.group[1]))
    if kind.scale == "e8m0":
        return _microscaled(groups_NXG, kind)
    if kind.scale == "e4m3":
        return _nvfp4(groups_NXG)
    return _integers(groups_NXG, kind)


def _positive(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _encode(quotient: Tensor, kind: WeightFormat) -> Tensor:
    if kind.element == "int8":
        return quotient.round().clamp(-127, 127).to(torch.int8)
    return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _by_row(weight: Tensor, kind: WeightFormat, per_tensor: int) -> Codes:
    rows = weight.shape[0]
    largest = weight.abs().amax(dim=1)
    if per_tensor:
        parts = largest.unflatten(0, (per_tensor, -1)).amax(dim=1)
        largest = parts.repeat_interleave(rows // per_tensor)
    top = 127.0 if kind.element == "int8" else E4M3_MAX
    scales = _positive(largest) / top
    return Codes(values=_encode(weight / scales[:, None], kind), scales=scales)


def _by_block(weight: Tensor, kind: WeightFormat) -> Codes:
    (rows, depth), (group_rows, group_depth) = weight.shape, kind.group
    padded = F.pad(weight, (0, -depth % group_depth, 0, -rows % group_rows))
    blocks = padded.unflatten(0, (-1, group_rows)).unflatten(-1, (-1, group_depth))
    scales = _positive(blocks.abs().amax(dim=(1, 3))) / E4M3_MAX
    spread = scales.repeat_interleave(group_rows, 0)[:rows]
    spread = spread.repeat_interleave(group_depth, 1)[:, :depth]
    return Codes(values=_encode(weight / spread, kind), scales=scales)


def _integers(groups: Tensor, kind: WeightFormat) -> Codes:
    """int8 and int4 in groups. Scales are rounded to their dtype first, then divided by."""
    dtype = kind.scale_dtypes[0]
    if kind.element == "int8":
        scales = (_positive(groups.abs().amax(dim=-1)) / 127).to(dtype)
        codes = (groups / scales.float()[..., None]).round().clamp(-127, 127)
        return Codes(values=codes.to(torch.int8).flatten(-2), scales=scales)
    if not kind.zero_points:
        scales = (_positive(groups.abs().amax(dim=-1)) / 7.5).to(dtype)
        codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
        return Codes(values=pack_nibbles(codes.to(torch.uint8).flatten(-2)), scales=scales)
    low = groups.amin(dim=-1).clamp(max=0)
    scales = (_positive(groups.amax(dim=-1).clamp(min=0) - low) / 15).to(dtype)
    wide = scales.float()
    zeros = (-low / wide).round().clamp(0, 15)
    codes = ((groups / wide[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return Codes(
        values=pack_nibbles(codes.to(torch.uint8).flatten(-2)),
        scales=scales,
        zero_points=zeros.to(dtype),
    )


def _microscaled(groups: Tensor, kind: WeightFormat) -> Codes:
    largest = _positive(groups.abs().amax(dim=-1))
    exponent_max, top = (8, E4M3_MAX) if kind.element == "e4m3" else (2, E2M1_MAX)
    exponents = shared_exponent(largest, exponent_max, top)
    quotient = torch.ldexp(groups, -exponents[..., None])
    if kind.element == "e4m3":
        values = _encode(quotient, kind).flatten(-2)
    else:
        values = pack_nibbles(to_e2m1(quotient).flatten(-2))
    return Codes(values=values, scales=(exponents + 127).to(torch.uint8))


def _nvfp4(groups: Tensor) -> Codes:
    largest = groups.abs().amax(dim=-1)
    row_scale = _positive(largest.amax()) / (E4M3_MAX * E2M1_MAX)
    scales = (largest / (E2M1_MAX * row_scale)).clamp(_SMALLEST_E4M3, E4M3_MAX)
    scales = scales.to(torch.float8_e4m3fn)
    quotient = groups / (scales.float() * row_scale)[..., None]
    return Codes(
        values=pack_nibbles(to_e2m1(quotient).flatten(-2)),
        scales=scales,
        row_scales=row_scale.expand(groups.shape[0]).clone(),
    )


def to_e2m1(x: Tensor) -> Tensor:
    """uint8 codes of the nearest e2m1 numbers, ties to the even mantissa; saturating at 6."""
    values = e2m1(torch.arange(len(E2M1_VALUES), device=x.device), torch.float32)
    midpoints = (values[1:] + values[:-1]) / 2
    magnitude = x.abs()
    # Even codes have an even mantissa: a tie goes up to them from an odd code, and down to them.
    lower = torch.bucketize(magnitude, midpoints)
    upper = torch.bucketize(magnitude, midpoints, right=True)
    code = torch.where(lower % 2 == 0, lower, upper)
    return (code + 8 * torch.signbit(x)).to(torch.uint8)


def empty_matrix(
    kind: WeightFormat,
    experts: int,
    rows: int,
    depth: int,
    *,
    device: torch.device | str | None = None,
    scale_dtype: torch.dtype | None = None,
    static: bool = False,
) -> QuantizedMatrix:
    """Uninitialised buffers for all experts of one product.

    Args:
        scale_dtype: of the group scales where a checkpoint's differs from our own.
        static: whether there are input scales.
    """
    wanted = scale_dtype or kind.scale_dtypes[0]
    if wanted not in kind.scale_dtypes:
        raise InputError(f"format {kind.name} has no scales in {wanted}")

    def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty((experts, *shape), dtype=dtype, device=device)
        prefer_huge_pages(made)
        return made

    scales = new(kind.scale_shape(rows, depth), wanted)
    return QuantizedMatrix(
        format=kind,
        depth=depth,
        values=new(kind.value_shape(rows, depth), kind.value_dtype),
        scales=scales,
        zero_points=torch.empty_like(scales) if kind.zero_points else None,
        row_scales=new((rows,), torch.float32) if kind.scale == "e4m3" else None,
        input_scales=new((), torch.float32) if static else None,
    )


def put_expert(matrix: QuantizedMatrix, expert: int, codes: Codes) -> None:
    """Writes one expert's codes into its place in the buffers.

    Raises:
        InputError: a tensor is missing, superfluous, or of another shape or dtype.
    """
    for name in ("values", "scales", "zero_points", "row_scales"):
        there, given = getattr(matrix, name), getattr(codes, name)
        if (there is None) != (given is None):
            raise InputError(
                f"format {matrix.format.name} {'has no' if there is None else 'needs'} {name}"
            )
        if there is None or given is None:
            continue
        if there[expert].shape != given.shape or there.dtype != given.dtype:
            raise InputError(
                f"{name} of format {matrix.format.name} must be {there.dtype} "
                f"{list(there[expert].shape)}, not {given.dtype} {list(given.shape)}"
            )
        there[expert] = given.to(there.device)
