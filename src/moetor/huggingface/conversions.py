"""Transformers' own table of checkpoint conversions, followed without touching a value.

Transformers describes for each family how a checkpoint's tensors become the model's: renamings,
and chains of operations. This module asks that table where a checkpoint's tensor belongs, and
follows the chains that only move elements about as `Layout`s. A chain that computes something is
left to Transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from moetor.huggingface.layout import Layout, concatenate, stack

Bundle = dict[str, list[Layout]]
"""By pattern, the tensors that matched it: of a list of experts all, in order."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of a checkpoint belongs.

    Attributes:
        target: name of the model's tensor, of several the first.
        converter: what turns it, with others, into that tensor; None where only the name differs.
        pattern: the one of the converter's that matched.
        number: what the pattern's `*` stands for, such as the expert; None without one.
    """

    target: str
    converter: Any | None = None
    pattern: str = ""
    number: int | None = None


class ConversionTable:
    """The conversions that Transformers has for a model.

    Args:
        model: on any device.
        key_mapping: regular expressions and what they are replaced by, applied to the checkpoint's
            names first, as Transformers takes them.
    """

    def __init__(self, model: Any, key_mapping: Mapping[str, str] | None) -> None:
        self.model = model
        self.expected: dict[str, Any] = model.state_dict()
        self.transforms = get_model_conversion_mapping(model, key_mapping)
        self._renamings = [one for one in self.transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in self.transforms if isinstance(one, WeightConverter)]

    def place(self, key: str) -> Place:
        """Where the checkpoint's tensor belongs; its target may be one that the model lacks."""
        renamed = key
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        target, pattern, converter = renamed, None, None
        for converter in self._converters:
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                break
        target = self._prefixed(target)
        if target not in self.expected and key in self.expected:
            return Place(key)  # a name of the model's own that a pattern took for an older one
        if pattern is None:
            return Place(target)
        return Place(target, converter, pattern, _number(pattern, renamed))

    def _prefixed(self, name: str) -> str:
        """With or without the prefix of the base model, as the model has it."""
        prefix = self.model.base_model_prefix
        found: tuple[str, str | None] = rename_source_key(name, [], [], prefix, self.expected)
        return found[0]

    def used(self) -> list[Any]:
        """The transforms that met a tensor; Transformers reverses these when it saves."""
        return [transform for transform in self.transforms if transform.was_used()]


def _number(pattern: str, name: str) -> int | None:
    if "*" not in pattern:
        return None
    found = re.search(pattern.replace("*", r"(\d+)"), name)
    return None if found is None else int(found.group(1))


def full_names(target: str, patterns: Sequence[str]) -> dict[str, str]:
    """Each target pattern's name in the model, when `target` is that of one of them."""
    for pattern in patterns:
        if pattern in target:
            before, _, after = target.partition(pattern)
            return {one: before + one + after for one in patterns}
    return {pattern: pattern for pattern in patterns}


def moves_only(converter: Any) -> bool:
    """Whether the converter's chain is followed here."""
    return all(
        type(operation) in _FOLLOWED and _is_plain(operation) for operation in converter.operations
    )


def _is_plain(operation: Any) -> bool:
    return getattr(operation, "num_shards_attribute", None) is None and not getattr(
        operation, "inverse", False
    )


def follow(converter: Any, bundle: Bundle, shape: tuple[int, ...]) -> dict[str, Layout]:
    """The converter's results by target pattern.

    Args:
        shape: of the first target in the model.

    Raises:
        ValueError: shapes do not fit.
    """
    for operation in converter.operations:
        bundle = _FOLLOWED[type(operation)](operation, bundle, converter, shape)
    return {target: layouts[0] for target, layouts in bundle.items()}


def _merge(operation: Any, bundle: Bundle, converter: Any, _: tuple[int, ...]) -> Bundle:
    targets = converter.target_patterns
    alone = len(bundle) == 1
    return {
        targets[0] if alone else pattern: [stack(layouts, operation.dim)]
        for pattern, layouts in bundle.items()
    }


def _concatenate(operation: Any, bundle: Bundle, converter: Any, _: tuple[int, ...]) -> Bundle:
    ordered = [layout for pattern in converter.source_patterns for layout in bundle[pattern]]
    axis = operation.dim % len(ordered[0].shape)
    return {converter.target_patterns[0]: [concatenate(ordered, axis)]}


def _chunk(operation: Any, bundle: Bundle, converter: Any, _: tuple[int, ...]) -> Bundle:
    ((layout,),) = bundle.values()
    axis = operation.dim % len(layout.shape)
    parts = layout.chunks(axis, len(converter.target_patterns))
    return {target: [part] for target, part in zip(converter.target_patterns, parts, strict=True)}


def _transpose(operation: Any, bundle: Bundle, converter: Any, shape: tuple[int, ...]) -> Bundle:
    ((layout,),) = bundle.values()
    name = converter.target_patterns[0]
    if len(converter.target_patterns) > 1:
        name = converter.source_patterns[0]  # the first of a chain
    if getattr(operation, "check_dims", False) and layout.shape == shape:
        return {name: [layout]}
    rank = len(layout.shape)
    return {name: [layout.transpose(operation.dim0 % rank, operation.dim1 % rank)]}


def _deinterleave(operation: Any, bundle: Bundle, converter: Any, _: tuple[int, ...]) -> Bundle:
    ((layout,),) = bundle.values()
    axis = operation.dim % len(layout.shape)
    return {converter.target_patterns[0]: [layout.deinterleave(axis)]}


def _ernie(operation: Any, bundle: Bundle, converter: Any, _: tuple[int, ...]) -> Bundle:
    """One list of experts, of which the first part is for text and the last for images."""
    targets = converter.target_patterns
    made: Bundle = {}
    for number, target in enumerate(targets):
        parts = []
        for pattern in converter.source_patterns:
            layouts = bundle[pattern]
            size = -(-len(layouts) // len(targets))
            parts.append(stack(layouts[number * size : (number + 1) * size], operation.stack_dim))
        made[target] = [concatenate(parts, operation.concat_dim)]
    return made


_FOLLOWED: dict[type, Callable[[Any, Bundle, Any, tuple[int, ...]], Bundle]] = {
    MergeModulelist: _merge,
    Concatenate: _concatenate,
    Chunk: _chunk,
    Transpose: _transpose,
    Interleave: _deinterleave,
    ErnieFuseAndSplitTextVisionExperts: _ernie,
}
