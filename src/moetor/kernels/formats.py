"""Quantised expert weights: the formats, and how their tensors are stored.

A format describes one product's matrix of all experts, [E, N, D]: N outputs (J or H), D depth (H or
I). Whatever the form of the original, quantised weights are stored *canonically*: outputs before
depth, depth contiguous, all gate rows before all up rows. A kernel is therefore given an
`ExpertsConfig` with `transposed=False` and `interleaved=False`, and biases in the same row order.

Shape letters: E experts, N outputs of a product, D its depth, P depth padded to whole groups, G
group size along the depth, H hidden, I intermediate, J rows of the first product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import ConfigError

Element = Literal["int4", "int8", "e4m3", "e2m1"]
ScaleKind = Literal["float", "e8m0", "e4m3"]
ActivationFormat = Literal[
    "unquantized", "int8_token", "fp8_token", "fp8_group128", "fp8_static", "mxfp8"
]
"""How a product's input rows [S, D] are rounded before they are multiplied.

`unquantized`: not at all (W8A16, W4A16). Otherwise x becomes s * q, with s in float32:

- `int8_token`: s = max |x| / 127 over the row, q = round half to even, int8.
- `fp8_token`: s = max |x| / 448 over the row, q in float8 e4m3.
- `fp8_group128`: the same over each run of 128 values of a row (the last one may be shorter), as in
  DeepSeek-V3 (arXiv:2412.19437, 3.3.2).
- `fp8_static`: s is the expert's `input_scales`; q saturates at +-448.
- `mxfp8`: s = 2^k over each run of 32 values, k as for the `mxfp8` weights.

A row or run of zeros has s = 1. The activation between the two products is rounded in the same way.
"""

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NIBBLE_BLOCK = 32
"""Values in 16 bytes of packed 4-bit codes."""
GROUP_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """One format. `name` is what a `KernelQuery` and a report call it.

    | name | values [E, N, .] | scales | weight |
    |---|---|---|---|
    | `int8` | int8 [D] | float32 [E, N] | s * q |
    | `int8_gG` | int8 [P] | float [E, N, P / G] | s * q |
    | `int4_gG` | 4-bit [P / 2] | float [E, N, P / G] | s * (q - 8) |
    | `int4_gG_zp` | 4-bit [P / 2] | float [E, N, P / G], zero_points alike | s * (q - z) |
    | `fp8` | float8_e4m3fn [D] | float32 [E, N] | s * q |
    | `fp8_blockRxC` | float8_e4m3fn [D] | float32 [E, ceil(N / R), ceil(D / C)] | s * q |
    | `mxfp8` | float8_e4m3fn [P], G = 32 | e8m0 [E, N, P / 32] | 2^(s - 127) * q |
    | `mxfp4` | 4-bit e2m1 [P / 2], G = 32 | e8m0 [E, N, P / 32] | 2^(s - 127) * q |
    | `nvfp4` | 4-bit e2m1 [P / 2], G = 16 | e4m3 [E, N, P / 16], row_scales float32 [E, N] |
      r * s * q |

    Float group scales are float16, bfloat16 or float32, as the checkpoint has them; zero points are
    whole or broken numbers in the scales' dtype. e8m0 scales are uint8 exponents with bias 127
    (255, NaN, does not occur). Sources: OCP Microscaling Formats 1.0 (mxfp8, mxfp4; e2m1 is
    +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, sign in bit 3), NVIDIA's NVFP4 (a second, float32 scale per
    tensor, kept here per row, so that gate and up may differ).

    **Depth that is no multiple of G** is padded to P with codes that mean 0; nibble formats pad
    to a multiple of 32 at least. A kernel need not mask weights, but must not read input beyond D.

    **Packed 4-bit codes** are unsigned; 16 bytes hold 32 consecutive values of a row: byte b (0 to
    15) of a block has value b in its low and value b + 16 in its high four bits. So 16 bytes give
    two runs of 16 consecutive values with one AND and one shift, on a CPU and in Triton, and no
    group is cut within a half.

    Attributes:
        element: of the values.
        group: (rows, depth) that share a scale; 0 stands for the whole axis.
        scale: of the groups' scales.
        zero_points: int4 alone.
    """

    element: Element
    group: tuple[int, int]
    scale: ScaleKind = "float"
    zero_points: bool = False

    def __post_init__(self) -> None:
        rows, depth = self.group
        known = {
            "int4": rows == 1 and depth in GROUP_SIZES[1:],
            "int8": rows == 1 and depth in (0, *GROUP_SIZES),
            "e4m3": depth > 0 if rows > 1 else depth == (32 if self.scale == "e8m0" else 0),
            "e2m1": self.group == ((1, 32) if self.scale == "e8m0" else (1, 16)),
        }[self.element]
        scales = {
            "e4m3": ("float", "e8m0") if rows == 1 else ("float",),
            "e2m1": ("e8m0", "e4m3"),
        }.get(self.element, ("float",))
        if not known or self.scale not in scales or (self.zero_points and self.element != "int4"):
            raise ConfigError(
                f"no weight format has {self.element} values in groups of {self.group} with "
                f"{self.scale} scales{' and zero points' if self.zero_points else ''}"
            )

    @property
    def name(self) -> str:
        """See the table above."""
        rows, depth = self.group
        if self.element == "e2m1":
            return "mxfp4" if self.scale == "e8m0" else "nvfp4"
        if self.element == "e4m3":
            if self.scale == "e8m0":
                return "mxfp8"
            return "fp8" if depth == 0 else f"fp8_block{rows}x{depth}"
        group = f"_g{depth}" if depth else ""
        return f"{self.element}{group}{'_zp' if self.zero_points else ''}"

    @property
    def packed(self) -> bool:
        """Whether a byte holds two values."""
        return self.element in ("int4", "e2m1")

    @property
    def by_group(self) -> bool:
        """Whether each row has a scale for every G values of its depth."""
        rows, depth = self.group
        return rows == 1 and depth > 0

    def padded(self, depth: int) -> int:
        """P for D."""
        if not self.by_group:
            return depth
        multiple = max(self.group[1], NIBBLE_BLOCK if self.packed else 1)
        return -(-depth // multiple) * multiple

    def value_shape(self, rows: int, depth: int) -> tuple[int, int]:
        """Shape of one expert's values."""
        width = self.padded(depth)
        return rows, width // 2 if self.packed else width

    def scale_shape(self, rows: int, depth: int) -> tuple[int, ...]:
        """Shape of one expert's scales (and zero points)."""
        group_rows, group_depth = self.group
        if group_depth == 0:
            return (rows,)
        return -(-rows // group_rows), -(-self.padded(depth) // group_depth)

    @property
    def value_dtype(self) -> torch.dtype:
        """Of the values as stored."""
        if self.packed:
            return torch.uint8
        return torch.int8 if self.element == "int8" else torch.float8_e4m3fn

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the scales as stored; the first is what Moetor's own quantisation makes."""
        if self.scale == "e8m0":
            return (torch.uint8,)
        if self.scale == "e4m3":
            return (torch.float8_e4m3fn,)
        if self.by_group:
            return (torch.bfloat16, torch.float16, torch.float32)
        return (torch.float32,)

    def bytes_of(self, rows: int, depth: int) -> int:
        """Bytes of one expert's matrix as Moetor's own quantisation makes it."""
        values, scales = self.value_shape(rows, depth), self.scale_shape(rows, depth)
        per_scale = self.scale_dtypes[0].itemsize * (2 if self.zero_points else 1)
        extra = 4 * rows if self.scale == "e4m3" else 0
        return values[0] * values[1] + torch.Size(scales).numel() * per_scale + extra


def find_format(name: str) -> WeightFormat:
    """The format called `name`.

    Raises:
        ConfigError: there is none.
    """
    fixed = {
        "mxfp4": WeightFormat(element="e2m1", group=(1, 32), scale="e8m0"),
        "mxfp8": WeightFormat(element="e4m3", group=(1, 32), scale="e8m0"),
        "nvfp4": WeightFormat(element="e2m1", group=(1, 16), scale="e4m3"),
        "fp8": WeightFormat(element="e4m3", group=(1, 0)),
        "int8": WeightFormat(element="int8", group=(1, 0)),
    }
    if name in fixed:
        return fixed[name]
    if block := re.fullmatch(r"fp8_block([1-9]\d*)x([1-9]\d*)", name):
        return WeightFormat(element="e4m3", group=(int(block[1]), int(block[2])))
    if group := re.fullmatch(r"(int4|int8)_g([1-9]\d*)(_zp)?", name):
        element: Element = "int4" if group[1] == "int4" else "int8"
        return WeightFormat(
            element=element, group=(1, int(group[2])), zero_points=group[3] is not None
        )
    raise ConfigError(
        f"no weight format is called {name!r}; there are {', '.join(fixed)}, int4_g32 (or 64, 128; "
        "_zp for zero points), int8_g32 and fp8_block128x128"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedMatrix:
    """One product's weights of all experts; shapes and dtypes as `WeightFormat` says.

    Attributes:
        depth: D, without padding.
        zero_points: of formats that have them.
        row_scales: float32 [E, N], nvfp4's second scale.
        input_scales: float32 [E], for the activation format `fp8_static`.
    """

    format: WeightFormat
    depth: int
    values: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    row_scales: Tensor | None = None
    input_scales: Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.values.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is held, by field name."""
        fields = ("values", "scales", "zero_points", "row_scales", "input_scales")
        held = ((name, getattr(self, name)) for name in fields)
        return {name: tensor for name, tensor in held if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedExpertWeights:
    """The routed experts in quantised form, stored canonically (see the head of this file).

    Attributes:
        gate_up: N = J, D = H.
        down: N = H, D = I.
        gate_up_bias, down_bias: [E, J] and [E, H], in a floating dtype.
        post_norm: [H].
        activation_format: of the inputs of both products.
    """

    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None
    activation_format: ActivationFormat = "unquantized"

    @property
    def weight_format(self) -> str:
        """The name that a `KernelQuery` carries: the format's, or both joined by `+` where the two
        products differ.
        """
        up, down = self.gate_up.format.name, self.down.format.name
        return up if up == down else f"{up}+{down}"

    @property
    def nbytes(self) -> int:
        """Bytes of both products' matrices with their scales."""
        return self.gate_up.nbytes + self.down.nbytes


def canonical(config: ExpertsConfig) -> ExpertsConfig:
    """The form in which quantised experts of `config` are stored."""
    return replace(config, transposed=False, interleaved=False)


def format_refusal(weight_format: str) -> str | None:
    """Half a sentence where a `KernelQuery` names a weight format that is none."""
    if weight_format == "unquantized":
        return None
    try:
        for name in weight_format.split("+"):
            find_format(name)
    except ConfigError:
        return f"knows no weight format {weight_format}"
    return None
