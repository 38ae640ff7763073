"""What is to be read for a model, tensor by tensor, and every reason not to begin.

A plan is made from the checkpoint's headers and a model on the meta device: no weight is read.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import dot_natural_key
from transformers.utils.loading_report import LoadStateDictInfo

from moetor.errors import CheckpointError
from moetor.huggingface.block_form import find_packed
from moetor.huggingface.checkpoint import Checkpoint, first_line
from moetor.huggingface.conversions import (
    ConversionTable,
    Place,
    follow,
    full_names,
    moves_only,
)
from moetor.huggingface.expert_mapping import (
    EXPERT_NAMES,
    ExpertNames,
    check_numbers,
    looks_like_expert,
    map_experts,
)
from moetor.huggingface.experts_form import Unrecognised, experts_weights, recognise_experts
from moetor.huggingface.layout import Layout
from moetor.huggingface.load_steps import Converted, LoadPlan, Streamed, no_info

_SHOWN = 3


@dataclass(slots=True)
class _Group:
    """The checkpoint's tensors that become one tensor of the model, or several."""

    place: Place
    keys: dict[str, list[tuple[int | None, str]]] = field(default_factory=lambda: defaultdict(list))

    def names(self) -> list[str]:
        return [key for some in self.keys.values() for _, key in some]


def make_plan(
    model: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    key_mapping: Mapping[str, str] | None = None,
    expert_names: ExpertNames | None = None,
) -> LoadPlan:
    """The plan for a model on the meta device.

    Args:
        dtype: of the model, as far as the family does not keep another.
        key_mapping: regular expressions and replacements for the checkpoint's names.
        expert_names: the checkpoint's names of experts; None tries those of the table, where
            Transformers has none.

    Raises:
        CheckpointError: tensors are missing, doubled, of another shape, or of experts that the
            model does not have; the text names them and their files.
    """
    planner = _Planner(model, checkpoint, dtype, key_mapping)
    planner.place_all()
    planner.map_unclaimed((expert_names,) if expert_names is not None else EXPERT_NAMES)
    info = planner.check_complete()
    own_names = planner.own_names or key_mapping is not None
    return LoadPlan(
        streamed=tuple(planner.streamed.values()),
        converted=tuple(planner.converted),
        info=info,
        conversions=None if own_names else planner.table.used(),
    )


class _Planner:
    """Collects a plan."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        key_mapping: Mapping[str, str] | None,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.table = ConversionTable(model, key_mapping)
        self.expected = self.table.expected
        self.kept_dtypes: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
        self.streamed: dict[str, Streamed] = {}
        self.converted: list[Converted] = []
        self.unclaimed: dict[str, str] = {}
        self.own_names = False
        self._made_by_conversion: set[str] = set()
        self._real_experts = {
            f"{path}.{experts}": experts_weights(block.get_submodule(experts)).down.shape[0]
            for path, block, experts in find_packed(model)
        }

    def refuse(self, keys: Sequence[str], text: str) -> CheckpointError:
        """The error about these tensors, with their files."""
        return CheckpointError(f"{self.checkpoint.files_of(keys)}: {text}")

    def place_all(self) -> None:
        """Every tensor of the checkpoint that Transformers has a place for."""
        groups: dict[str, _Group] = {}
        for key in sorted(self.checkpoint.tensors, key=dot_natural_key):
            place = self.table.place(key)
            if place.target not in self.expected:
                self.unclaimed[key] = place.target
                continue
            group = groups.setdefault(place.target, _Group(place))
            if group.place.converter is not place.converter or (
                group.keys and place.converter is None
            ):
                twin = group.names()[0]
                raise self.refuse(
                    [twin, key], f"{twin} and {key} are both meant for {place.target}"
                )
            group.keys[place.pattern].append((place.number, key))
        for target, group in groups.items():
            try:
                self._add(target, group)
            except ValueError as error:
                if isinstance(error, CheckpointError):
                    raise
                hint = self._other_names(target)
                raise self.refuse(group.names(), f"{error}{hint}") from error

    def _other_names(self, target: str) -> str:
        """Unclaimed experts of the same layer, where there are any."""
        numbers = re.findall(r"\d+", target)
        for key in self.unclaimed:
            if looks_like_expert(key) and re.findall(r"\d+", key)[: len(numbers)] == numbers:
                return f"; under another name there is {key}"
        return ""

    def _add(self, target: str, group: _Group) -> None:
        converter = group.place.converter
        if converter is None:
            (key,) = group.names()
            self._stream(target, Layout.of(key, self._shape(key)))
            return
        names = full_names(target, converter.target_patterns)
        if not moves_only(converter):
            self._convert(target, group)
            return
        for pattern in converter.source_patterns:
            if pattern not in group.keys:
                there = group.names()[0]
                raise ValueError(
                    f"a tensor named like {pattern} is missing beside {there}, for {target}"
                )
            self._check_numbers(target, group.keys[pattern], list(names.values()))
        bundle = {
            pattern: [Layout.of(key, self._shape(key)) for _, key in some]
            for pattern, some in group.keys.items()
        }
        first = tuple(self.expected[target].shape)
        for pattern, layout in follow(converter, bundle, first).items():
            self._stream(names[pattern], layout)

    def _check_numbers(
        self, target: str, members: list[tuple[int | None, str]], targets: list[str]
    ) -> None:
        """Whether a list of experts has all of them, once."""
        numbered = [(number, key) for number, key in members if number is not None]
        if not numbered:
            if len(members) > 1:
                raise ValueError(f"{members[0][1]} and {members[1][1]} are both meant for {target}")
            return
        by_number: dict[int, str] = {}
        for number, key in numbered:
            if number in by_number:
                raise ValueError(f"{by_number[number]} and {key} are the same expert's")
            by_number[number] = key
        if not looks_like_expert(target):
            return
        count = sum(self.expected[name].shape[0] for name in targets if name in self.expected)
        real = self._real_experts.get(target.rpartition(".")[0], count)
        check_numbers(by_number, real if len(by_number) == real else count, target)

    def _shape(self, key: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[key].shape

    def _stream(self, name: str, layout: Layout) -> None:
        expected = self.expected.get(name)
        if expected is None:
            self.unclaimed.update(dict.fromkeys(layout.keys, name))
            return
        wanted = tuple(expected.shape)
        rows = self._real_experts.get(name.rpartition(".")[0])
        # LongCat-Flash allots rows to experts without weights, which a checkpoint need not have.
        fits = layout.shape == wanted or (
            rows is not None and layout.shape == (rows, *wanted[1:]) and rows < wanted[0]
        )
        if not fits:
            keys = layout.keys
            like = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            first = self._shape(keys[0])
            raise ValueError(
                f"tensor {keys[0]} of shape {first}{like} make {name} of shape {layout.shape}, "
                f"where the configuration asks for {wanted}"
            )
        if name in self.streamed:
            twin = self.streamed[name].layout.keys[0]
            raise ValueError(f"{twin} and {layout.keys[0]} are both meant for {name}")
        self.streamed[name] = Streamed(name, layout, self._dtype_of(name))

    def _convert(self, target: str, group: _Group) -> None:
        keys = {pattern: [key for _, key in some] for pattern, some in group.keys.items()}
        step = Converted(target, group.place.converter, keys, self._dtype_of(target))
        shapes = {key: self.checkpoint.tensors[key] for key in group.names()}
        trial = no_info()

        def on_meta(key: str) -> Tensor:
            return torch.empty(shapes[key].shape, dtype=step.dtype, device="meta")

        try:
            made = step.run(self.model, trial, on_meta)
        except Exception as error:  # Transformers' operations raise what they like
            told = "".join(trial.conversion_errors.values()).strip().splitlines()
            why = told[-1] if told else first_line(error)
            raise ValueError(
                f"{group.names()[0]} and its like cannot be converted to {target}: {why}"
            ) from error
        for name, value in made.items():
            wanted = self.expected.get(name)
            if wanted is not None and wanted.shape != value.shape:
                raise ValueError(
                    f"{group.names()[0]} and its like make {name} of shape {tuple(value.shape)}, "
                    f"where the configuration asks for {tuple(wanted.shape)}"
                )
        self.converted.append(step)
        self._made_by_conversion |= set(made)

    def _dtype_of(self, name: str) -> torch.dtype:
        """That of the model's tensor; some families keep some tensors in float32."""
        for pattern, kept in self.kept_dtypes.items():
            if re.search(pattern.replace("*", ".*"), name):
                return kept
        found: torch.dtype = self.expected[name].dtype
        return found

    def map_unclaimed(self, names: Sequence[ExpertNames]) -> None:
        """Experts that Transformers' table found nothing for, from tensors without a place."""
        for path, block, child in find_packed(self.model):
            module = f"{path}.{child}" if path else child
            lacking = [
                name
                for name in self.expected
                if name.startswith(f"{module}.") and not self._has(name)
            ]
            form = recognise_experts(block.get_submodule(child))
            if not lacking or isinstance(form, Unrecognised):
                continue
            shapes = {key: self._shape(key) for key in self.unclaimed}
            try:
                found = map_experts(form, module, shapes, names)
                for parameter, layout in found.items():
                    self._stream(f"{module}.{parameter}", layout)
            except ValueError as error:
                like = [key for key in self.unclaimed if looks_like_expert(key)]
                raise self.refuse(like, str(error)) from error
            for layout in found.values():
                self.own_names = True
                for key in layout.keys:
                    del self.unclaimed[key]

    def _has(self, name: str) -> bool:
        return name in self.streamed or name in self._made_by_conversion

    def check_complete(self) -> LoadStateDictInfo:
        """What Transformers is to know of the load, once nothing is missing that should be there.

        Raises:
            CheckpointError: names what is missing, or experts without a place.
        """
        info = no_info()
        info.missing_keys = {name for name in self.expected if not self._has(name)}
        info.unexpected_keys = set(self.unclaimed.values())
        judged = copy.deepcopy(info)
        judged.missing_keys -= self._made_by_tying(info.missing_keys)
        self.model._adjust_missing_and_unexpected_keys(judged)
        strangers = [
            key
            for key, target in self.unclaimed.items()
            if target in judged.unexpected_keys and looks_like_expert(key)
        ]
        if judged.missing_keys:
            missing = sorted(judged.missing_keys, key=dot_natural_key)
            hint = f"; there is {strangers[0]}, which has no place" if strangers else ""
            raise CheckpointError(
                f"{self.checkpoint.folder} lacks {_count(len(missing), 'tensor')} that its "
                f"configuration asks for: {_some(missing)}; the checkpoint is incomplete or of "
                f"another model{hint}"
            )
        if strangers:
            raise self.refuse(
                strangers,
                f"{_count(len(strangers), 'expert tensor')} without a place in "
                f"{type(self.model).__name__}: {_some(strangers)}",
            )
        return info

    def _made_by_tying(self, missing: set[str]) -> set[str]:
        """Names of tensors that share another's storage, one of which is there."""
        groups: dict[Any, set[str]] = defaultdict(set)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            groups[id(tensor)].add(name)
        for target, origin in getattr(self.model, "all_tied_weights_keys", {}).items():
            groups[origin] |= {target, origin}
        return {name for group in groups.values() if group - missing for name in group}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
