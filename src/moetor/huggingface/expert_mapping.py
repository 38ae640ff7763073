"""Names under which checkpoints keep experts, and how each becomes the packed layout.

For the names that a family's own checkpoints use, Transformers has a table (`conversions.py`). The
one here serves all others: a model saved by other code, under names of its own. An entry says which
part of an expert has which name; whether a matrix is stored as [out, in] or [in, out] is read off
its shape. Shape letters: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from moetor.config import ExpertsConfig
from moetor.huggingface.layout import Layout, concatenate, stack

Part = Literal["gate", "up", "gate_up", "down"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """How a checkpoint names the parts of its experts.

    A tensor is looked for as `<anything>.<layer>.<anything>.<number of the expert>.<part>`, and, of
    experts that are stacked in one tensor, without the number; `.weight` and `.bias` may follow.

    Attributes:
        gate, up: the two matrices of the first product, each [I, H].
        gate_up: or both in one, gate first, [2 * I, H].
        down: the matrix of the second product, [H, I].
        interleaved: rows of gate and up alternate in `gate_up`.
    """

    down: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    interleaved: bool = False

    @property
    def parts(self) -> dict[str, Part]:
        """Part by name."""
        named: dict[Part, str | None] = {
            "gate": self.gate,
            "up": self.up,
            "gate_up": self.gate_up,
            "down": self.down,
        }
        return {name: part for part, name in named.items() if name is not None}


EXPERT_NAMES: tuple[ExpertNames, ...] = (
    ExpertNames(gate="gate_proj", up="up_proj", down="down_proj"),
    ExpertNames(gate="w1", up="w3", down="w2"),  # Mixtral, Phi-MoE
    ExpertNames(gate="linear", up="linear_v", down="linear_1"),  # Grok-1
    ExpertNames(gate="w1", up="v1", down="w2"),  # DBRX
    ExpertNames(gate_up="gate_up_proj", down="down_proj"),
    ExpertNames(gate_up="w13", down="w2"),
    ExpertNames(gate_up="w13_weight", down="w2_weight"),
    ExpertNames(gate_up="input_linear", down="output_linear"),  # Granite, JetMoE
    ExpertNames(gate_up="linear_fc1", down="linear_fc2"),  # Megatron
    ExpertNames(up="up_proj", down="down_proj"),  # without a gate
    ExpertNames(up="fc1", down="fc2"),
    ExpertNames(up="wi", down="wo"),
)
"""Tried in this order, on tensors that Transformers' own table has no use for."""

_LOOKS_LIKE_EXPERT = re.compile(r"(^|[._])(moe|experts?|local_experts)[._]")
_NAME = re.compile(
    r"^(?P<before>.*?)(\.(?P<number>\d+))?\.(?P<part>\w+?)(\.(?P<kind>weight|bias))?$"
)


def looks_like_expert(name: str) -> bool:
    """Whether a tensor's name says that it belongs to an expert."""
    return _LOOKS_LIKE_EXPERT.search(name) is not None


@dataclass(frozen=True, slots=True)
class _Found:
    """One unclaimed tensor under a name of the table."""

    key: str
    part: Part
    number: int | None


def map_experts(
    form: ExpertsConfig,
    path: str,
    unclaimed: Shapes,
    names: Iterable[ExpertNames] = EXPERT_NAMES,
) -> dict[str, Layout]:
    """The packed tensors of one experts module, from tensors under any names of the table.

    Args:
        form: of the module.
        path: of the module in the model, whose numbers (the layer's) the tensors' names share.
        unclaimed: shapes of the checkpoint's tensors that have no place yet.
        names: entries to try.

    Returns:
        Layouts by parameter: `gate_up_proj` (`up_proj` when ungated), `down_proj` and biases; empty
        where no entry fits.

    Raises:
        ValueError: an entry fits, and tensors are missing, doubled or of another shape; the
            text names them.
    """
    numbers = re.findall(r"\d+", path)
    for entry in names:
        found = _find(entry, numbers, unclaimed)
        weights = found.get("weight", [])
        parts = {one.part for one in weights}
        first = {"gate", "up"} if form.gated else {"up"}
        if parts in ({"gate_up", "down"}, first | {"down"}) and (
            form.gated or "gate_up" not in parts
        ):
            return _packed(form, path, entry, found, unclaimed)
    return {}


def _find(entry: ExpertNames, numbers: list[str], unclaimed: Shapes) -> dict[str, list[_Found]]:
    """Tensors of this layer under the entry's names, by kind: weights and biases."""
    parts = entry.parts
    found: dict[str, list[_Found]] = defaultdict(list)
    for key in unclaimed:
        match = _NAME.match(key)
        part = None if match is None else parts.get(match["part"])
        if match is None or part is None or "shared" in key:
            continue
        number = None if match["number"] is None else int(match["number"])
        before = re.findall(r"\d+", match["before"])
        if before == numbers:
            found[match["kind"] or "weight"].append(_Found(key, part, number))
        elif number is not None and [*before, match["number"]] == numbers:
            # The number before the part is the layer's: the experts are stacked.
            found[match["kind"] or "weight"].append(_Found(key, part, None))
    return found


def _packed(
    form: ExpertsConfig,
    path: str,
    entry: ExpertNames,
    found: dict[str, list[_Found]],
    unclaimed: Shapes,
) -> dict[str, Layout]:
    up_name = "gate_up_proj" if form.gated else "up_proj"
    made: dict[str, Layout] = {}
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        tensors = found.get(kind, [])
        if not tensors and not (kind == "bias" and form.has_bias):
            continue
        if kind == "bias" and not form.has_bias:
            raise ValueError(f"{tensors[0].key} is a bias, and the experts of {path!r} have none")
        first = [one for one in tensors if one.part != "down"]
        second = [one for one in tensors if one.part == "down"]
        for name, some, wanted in (
            (up_name, first, form.gate_up_shape if kind == "weight" else None),
            ("down_proj", second, form.down_shape if kind == "weight" else None),
        ):
            made[f"{name}{suffix}"] = _one(form, path, entry, some, unclaimed, wanted)
    return made


def _one(
    form: ExpertsConfig,
    path: str,
    entry: ExpertNames,
    found: list[_Found],
    unclaimed: Shapes,
    shape: tuple[int, ...] | None,
) -> Layout:
    """One packed tensor; `shape` is that of a weight, None of a bias."""
    order: tuple[Part, ...] = ("gate", "up", "gate_up", "down")
    present = [part for part in order if any(one.part == part for one in found)]
    if not present:
        raise ValueError(f"the experts of {path!r} have a bias, and the checkpoint has none")
    stacked = [
        _stacked(form, path, [one for one in found if one.part == part], unclaimed)
        for part in present
    ]
    up = present[0] != "down"
    if shape is not None:
        # As nn.Linear stores them, [out, in]; the other order is told by the shape.
        out, inner = (shape[2], shape[1]) if form.transposed else (shape[1], shape[2])
        rows = out // 2 if up and len(present) == 2 else out
        stacked = [_upright(one, (form.num_experts, rows, inner), path) for one in stacked]
    joined = concatenate(stacked, 1)
    if up and form.gated:
        if entry.interleaved and not form.interleaved:
            joined = joined.deinterleave(1)
        elif form.interleaved and not (entry.interleaved and present == ["gate_up"]):
            joined = joined.interleave(1)
    return joined.transpose(1, 2) if shape is not None and form.transposed else joined


def _upright(layout: Layout, shape: tuple[int, int, int], path: str) -> Layout:
    """[E, out, in], whichever way the checkpoint has it."""
    experts, out, inner = shape
    if layout.shape == shape:
        return layout
    if layout.shape == (experts, inner, out):
        return layout.transpose(1, 2)
    raise ValueError(
        f"{layout.keys[0]} and its like make a tensor of shape {layout.shape}, where the experts "
        f"of {path!r} ask for {shape}"
    )


def _stacked(form: ExpertsConfig, path: str, found: list[_Found], unclaimed: Shapes) -> Layout:
    """[E, ...] of one part: one tensor, or one for each expert."""
    whole = [one for one in found if one.number is None]
    if whole:
        if len(found) > 1:
            raise ValueError(
                f"the experts of {path!r} are there twice: {found[0].key} and {found[1].key}"
            )
        return Layout.of(whole[0].key, unclaimed[whole[0].key])
    by_number: dict[int, str] = {}
    for one in found:
        assert one.number is not None, "the others were taken before"
        if one.number in by_number:
            raise ValueError(
                f"expert {one.number} of {path!r} is there twice: {by_number[one.number]} and "
                f"{one.key}"
            )
        by_number[one.number] = one.key
    check_numbers(by_number, form.num_experts, path)
    try:
        return stack(
            [Layout.of(by_number[n], unclaimed[by_number[n]]) for n in sorted(by_number)], 0
        )
    except ValueError as error:
        raise ValueError(f"experts of {path!r}: {error}") from error


def check_numbers(by_number: Mapping[int, str], count: int, path: str) -> None:
    """Whether there is one tensor for each of `count` experts.

    Args:
        by_number: name of the tensor by its expert.

    Raises:
        ValueError: names what is missing, or one too many.
    """
    missing = [number for number in range(count) if number not in by_number]
    if missing:
        number, name = next(iter(by_number.items()))
        absent = re.sub(rf"\.{number}\.(?!.*\.{number}\.)", f".{missing[0]}.", name)
        more = f" and {len(missing) - 1} more like it" if len(missing) > 1 else ""
        raise ValueError(f"lacks the expert tensor {absent}{more}, which {path!r} asks for")
    for number, name in by_number.items():
        if number >= count:
            raise ValueError(
                f"has the expert tensor {name}, and {path!r} has {count} experts by its "
                "configuration"
            )
