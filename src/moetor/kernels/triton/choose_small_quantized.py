"""Tiles of the small path over quantised weights: computed from shape, formats, dtype and device.
Imports no Triton.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, N rows of a matrix, D its
depth; BN rows and BK depth of a tile, TN tokens, NG groups in BK.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moetor.config import ExpertsConfig
from moetor.kernels.formats import ActivationFormat, WeightFormat
from moetor.kernels.triton.choose import Device, next_power_of_2

Mode = Literal["rows", "sums", "numbers", "bits"]
"""What scales are applied to: the finished rows, the sums of groups, each weight, or its bits."""
Sharing = Literal["none", "slots", "experts"]
"""Whose slots share a program: a program for each slot; for each slot whose expert no earlier slot
has; for each expert."""

RUNS: dict[ActivationFormat, int] = {"fp8_group128": 128, "mxfp8": 32}
"""Values of an input row that share a scale, where these are not all of them."""
# Columns of a matrix instruction, whose inputs pass through shared memory for every block of rows.
_COLUMNS = 8
_MOST_COLUMNS = 16
# Entries that a program looks through for its tokens.
_MOST_ENTRIES = 64
# Up to here a token's experts are seldom another's.
_FEW_TOKENS = 2
_MOST_SUMMED = 16
# Above this many tokens experts have rows enough for the large path's tiles.
_SMALL_TOKENS = 16


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

    def shared_bytes(self, *, code_bits: int, itemsize: int) -> int:
        """Upper bound of the shared memory: codes, inputs and scales of all stages, and the
        accumulators' way to their rows."""
        columns = self.tokens * self.groups * self.parts
        scales = self.rows * max(self.groups, self.depth // 16) * 4 * 2
        inputs = self.depth * columns * itemsize
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


def use_small_quantized(config: ExpertsConfig, tokens: int) -> bool:
    """Whether the small path has the form and is expected to be the faster one."""
    return quantized_form(config) is None and tokens <= _SMALL_TOKENS


def scale_mode(kind: WeightFormat, activations: ActivationFormat, *, half: bool) -> Mode:
    """How the scales of a format are applied.

    Args:
        half: the model computes in float16, whose range does not hold powers of two of 8 bits.
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
    return "numbers" if depth < 128 or kind.zero_points else "sums"


def _tile(
    kind: WeightFormat,
    activations: ActivationFormat,
    depth: int,
    tokens: int,
    *,
    half: bool,
    itemsize: int,
    device: Device,
    parts: bool,
) -> GroupTile:
    mode = scale_mode(kind, activations, half=half)
    lengths = (kind.group[1], RUNS.get(activations, 0) if mode == "sums" else 0)
    group = min((length for length in lengths if length), default=0)
    # 128 bytes of a row at a step, unless an eighth of the last one or more would lie beyond the
    # row's end, or there would be too many columns.
    least = max(32, group)
    widest = 64 if itemsize == 4 else (256 if kind.packed else 128)
    if mode == "sums":
        widest = min(widest, 128)
    step = max(least, min(widest, next_power_of_2(depth)))
    while step > least and (
        -depth % step > depth // 8 or (mode == "sums" and tokens * (step // group) > _MOST_COLUMNS)
    ):
        step //= 2
    groups = step // group if mode == "sums" else 1
    share = 1
    if parts and groups == 1 and itemsize < 4:
        # Idle columns take parts of the depth, so that more programs are under way.
        share = max(1, _COLUMNS // max(2, tokens))
        while share > 1 and depth % (share * max(step, kind.group[1])):
            share //= 2
    tile = GroupTile(
        tokens=max(tokens, _COLUMNS // (groups * share)),
        rows=32 if parts else 64,
        depth=step,
        groups=groups,
        warps=2,
        stages=4 if parts else 3,
        mode=mode,
        parts=share,
    )
    if itemsize == 4:
        # Exact float32 products are vector sums.
        return replace(tile, rows=32, warps=4, stages=1)
    bits = 4 if kind.packed else 8
    while (
        tile.stages > 2
        and tile.shared_bytes(code_bits=bits, itemsize=itemsize) > device.shared // 3
    ):
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def quantized_small_plan(
    config: ExpertsConfig,
    top_k: int,
    tokens: int | None,
    formats: tuple[WeightFormat, WeightFormat],
    activations: ActivationFormat,
    device: Device,
    *,
    half: bool,
    itemsize: int,
) -> QuantizedSmallPlan:
    """The plan; `tokens=None` gives one for any number (batch invariance).

    Args:
        formats: of the first and of the second product.
        half: the model computes in float16.
        itemsize: bytes of a number of the model.
    """
    few = tokens is not None and tokens <= _FEW_TOKENS
    entries = 16 if tokens is None else tokens * (top_k if config.weight_on_input else 1)
    slots = entries * (1 if config.weight_on_input else top_k)
    summed = few and top_k <= _MOST_SUMMED and config.post_norm_eps is None
    many = 1 if few else min(_COLUMNS, next_power_of_2(entries))

    def tile(kind: WeightFormat, depth: int, columns: int) -> GroupTile:
        return _tile(
            kind,
            activations,
            depth,
            columns,
            half=half,
            itemsize=itemsize,
            device=device,
            parts=few,
        )

    down = tile(formats[1], config.intermediate_size, next_power_of_2(top_k) if summed else many)
    if summed:
        # Rows are some of each of a token's experts, columns the token's slots.
        down = replace(down, rows=max(down.rows, 2 * next_power_of_2(top_k) * down.parts))
    sharing: Sharing = "experts"
    if few:
        sharing = "none"
    elif entries <= many and slots < config.num_experts:
        sharing = "slots"
    return QuantizedSmallPlan(
        up=tile(formats[0], config.hidden_size, many),
        down=down,
        sharing=sharing,
        entries=min(_MOST_ENTRIES, next_power_of_2(entries)),
        summed=summed,
        pdl=device.capability[0] >= 9,
    )
