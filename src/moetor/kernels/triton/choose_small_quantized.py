"""Tiles of the small path over quantised weights: computed from shape, formats, dtype and device.
Imports no Triton.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, N rows of a matrix, D its
depth; BN rows and BK depth of a tile, TN tokens, NG groups in BK.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from moetor.config import ExpertsConfig
from moetor.kernels.formats import ActivationFormat, WeightFormat
from moetor.kernels.triton.choose import Device, cdiv, next_power_of_2
from moetor.kernels.triton.quantize_rows import RUNS

Mode = Literal["rows", "sums", "numbers", "bits"]
"""What scales are applied to: the finished rows, the sums of groups, each weight, or its bits."""
Sharing = Literal["none", "slots", "experts"]
"""Whose slots share a program: a program for each slot; for each slot whose expert no earlier slot
has; for each expert."""

# Columns of a matrix instruction, whose inputs pass through shared memory for every block of rows.
_COLUMNS = 8
_MOST_COLUMNS = 16
# Entries that a program looks through for its tokens.
_MOST_ENTRIES = 64
# Up to here a token's experts are seldom another's.
_FEW_TOKENS = 2
_MOST_SUMMED = 16
# Up to this many tokens the small path was the faster one on an H200.
_SMALL_TOKENS = 2
_SMALL_TOKENS_PACKED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTile:
    """Tile of one product.

    Attributes:
        tokens: TN.
        rows: BN, of the weight; half of them gate and half up rows of a gated first product.
        depth: BK, values.
        groups: NG.
        parts: of the depth, side by side among the rows.
    """

    tokens: int
    rows: int
    depth: int
    groups: int
    warps: int
    stages: int
    mode: Mode
    parts: int = 1

    def shared_bytes(self, *, code_bits: int) -> int:
        """Upper bound of the shared memory, inputs in half precision: codes, inputs and scales of
        all stages, and the accumulators' way to their rows."""
        columns = self.tokens * self.groups * self.parts
        scales = self.rows * max(self.groups, self.depth // 16) * 4 * 2
        inputs = self.depth * columns * 2
        loads = self.stages * (self.rows * self.depth * code_bits // 8 + inputs + scales)
        return max(loads, self.rows * columns * 4) + 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedSmallPlan:
    """Tiles of both products.

    Attributes:
        entries: TE, that a program looks through for its tokens.
        summed: the second product sums a token's slots as well: experts that tokens share are read
            once for each, and a launch less is needed.
        pdl: as in `SmallPlan`.
    """

    up: GroupTile
    down: GroupTile
    sharing: Sharing
    entries: int
    summed: bool
    pdl: bool


def quantized_form(config: ExpertsConfig) -> str | None:
    """Why the small path does not have this form, as half a sentence."""
    if config.activation.function is not None:
        return f"cannot call a Python activation ({config.activation.label})"
    return None


def use_small_quantized(
    config: ExpertsConfig,
    tokens: int,
    formats: tuple[WeightFormat, WeightFormat],
    activations: ActivationFormat,
) -> bool:
    """Whether the small path has the form and is known to be the faster one.

    Args:
        formats: of the first and of the second product.
    """
    packed = activations == "unquantized" and all(kind.packed for kind in formats)
    most = _SMALL_TOKENS_PACKED if packed else _SMALL_TOKENS
    return 0 < tokens <= most and quantized_form(config) is None


def scale_mode(kind: WeightFormat, activations: ActivationFormat, *, half: bool) -> Mode:
    """How the scales of a format are applied.

    Args:
        half: inputs are float16, whose range does not hold powers of two of 8 bits.
    """
    depth = kind.group[1]
    if activations == "fp8_group128":
        return "sums"
    if depth == 0:
        return "rows"
    if half:
        return "sums"
    # A power of two, or a scale of four bits, times a code is exact in bfloat16 and float32.
    if kind.scale != "float":
        return "bits"
    # Sums of short groups take a column each, or a pass through the accumulators every few bytes.
    return "numbers" if depth < 128 else "sums"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What a product's tile depends on beside the weight.

    Attributes:
        dtype: of the input's numbers.
        few: each program has the rows of one slot, or of one token's.
    """

    activations: ActivationFormat
    dtype: torch.dtype
    few: bool
    device: Device

    def step(self, kind: WeightFormat, mode: Mode, depth: int, tokens: int) -> tuple[int, int]:
        """BK and NG."""
        lengths = (kind.group[1], RUNS.get(self.activations, 0) if mode == "sums" else 0)
        group = min((length for length in lengths if length), default=0)
        # 128 bytes of a row at a step, unless an eighth of the last one or more would lie beyond
        # the row's end, or there would be too many columns.
        least = max(32, group)
        widest = 64 if self.dtype.itemsize == 4 else (256 if kind.packed else 128)
        if mode == "sums":
            widest = min(widest, 128)
        step = max(least, min(widest, next_power_of_2(depth)))
        while step > least and (
            -depth % step > depth // 8
            or (mode == "sums" and tokens * (step // group) > _MOST_COLUMNS)
        ):
            step //= 2
        return step, step // group if mode == "sums" else 1

    def tile(self, kind: WeightFormat, depth: int, tokens: int) -> GroupTile:
        """For `tokens` columns at least."""
        mode = scale_mode(kind, self.activations, half=self.dtype == torch.float16)
        step, groups = self.step(kind, mode, depth, tokens)
        if self.dtype.itemsize == 4:
            # Exact float32 products are vector sums.
            columns = max(tokens, _COLUMNS // groups)
            return GroupTile(
                tokens=columns, rows=32, depth=step, groups=groups, warps=4, stages=1, mode=mode
            )
        share = 1
        if self.few and groups == 1:
            # Idle columns take parts of the depth, so that more programs are under way.
            share = max(1, _COLUMNS // max(2, tokens))
            while share > 1 and depth % (share * max(step, kind.group[1])):
                share //= 2
        one_by_one = kind.packed and mode in ("numbers", "bits")
        tile = GroupTile(
            tokens=max(tokens, _COLUMNS // (groups * share)),
            # Where codes become numbers one by one, the warpgroup instruction, which takes 64 rows
            # at least, multiplies while other warps make numbers.
            rows=(32 if self.few else 64) * (2 if one_by_one else 1),
            depth=step,
            groups=groups,
            warps=4 if one_by_one else 2,
            # No more than the whole depth under way: programs share the shared memory.
            stages=max(2, min(4 if self.few else 3, cdiv(depth, share * step) + 1)),
            mode=mode,
            parts=share,
        )
        bits = 4 if kind.packed else 8
        while tile.stages > 2 and tile.shared_bytes(code_bits=bits) > self.device.shared // 3:
            tile = replace(tile, stages=tile.stages - 1)
        return tile


def quantized_small_plan(
    config: ExpertsConfig,
    top_k: int,
    tokens: int,
    formats: tuple[WeightFormat, WeightFormat],
    activations: ActivationFormat,
    device: Device,
    dtype: torch.dtype,
) -> QuantizedSmallPlan:
    """The plan for `tokens` tokens.

    Args:
        formats: of the first and of the second product.
        dtype: of the model; rounded inputs are bfloat16 whatever it is.
    """
    if activations != "unquantized":
        dtype = torch.bfloat16
    few = tokens <= _FEW_TOKENS
    entries = tokens * (top_k if config.weight_on_input else 1)
    slots = entries * (1 if config.weight_on_input else top_k)
    summed = few and top_k <= _MOST_SUMMED and config.post_norm_eps is None
    many = 1 if few else min(_COLUMNS, next_power_of_2(entries))
    inputs = _Inputs(activations=activations, dtype=dtype, few=few, device=device)
    columns = next_power_of_2(top_k) if summed else many
    down = inputs.tile(formats[1], config.intermediate_size, columns)
    if summed:
        # Rows are some of each of a token's experts, columns the token's slots.
        down = replace(down, rows=max(down.rows, 2 * next_power_of_2(top_k) * down.parts))
    sharing: Sharing = "experts"
    if few:
        sharing = "none"
    elif entries <= many and slots < config.num_experts:
        sharing = "slots"
    return QuantizedSmallPlan(
        up=inputs.tile(formats[0], config.hidden_size, many),
        down=down,
        sharing=sharing,
        entries=1 if few else min(_MOST_ENTRIES, next_power_of_2(entries)),
        summed=summed,
        pdl=device.capability[0] >= 9,
    )
