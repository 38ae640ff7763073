"""The steps of a load: tensors whose elements are moved, and tensors that Transformers computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.loading_report import LoadStateDictInfo

from moetor.huggingface.layout import Layout

Source = Callable[[str], Tensor]
"""Gives the checkpoint's tensor of a name."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """One tensor of the model whose elements are only moved.

    Attributes:
        layout: where they come from.
        dtype: that it has in the model.
    """

    name: str
    layout: Layout
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Converted:
    """Tensors of the model that Transformers computes from some of the checkpoint's.

    Attributes:
        target: the first of them.
        converter: of Transformers.
        keys: the checkpoint's tensors by the converter's patterns.
        dtype: to which they are cast first.
    """

    target: str
    converter: Any
    keys: Mapping[str, Sequence[str]]
    dtype: torch.dtype

    def run(self, model: Any, info: LoadStateDictInfo, source: Source) -> dict[str, Tensor]:
        """The tensors by name.

        Args:
            source: gives the tensor of a key.
        """
        converter = copy.deepcopy(self.converter)
        for pattern, keys in self.keys.items():
            for key in keys:
                converter.add_tensor(self.target, key, pattern, lambda key=key: source(key))
        made: dict[str, Any] = converter.convert(
            self.target, model=model, config=model.config, loading_info=info
        )
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Everything that is read for a model.

    Attributes:
        info: what Transformers reports of a load: names that are missing (only those that the model
            makes itself, such as tied ones) and unexpected.
        conversions: those of Transformers that were used, to be reversed when the model is saved;
            None where names of our own or of the caller were used: then it is saved under the names
            that the family has.
    """

    streamed: tuple[Streamed, ...]
    converted: tuple[Converted, ...]
    info: LoadStateDictInfo
    conversions: list[Any] | None

    @property
    def tensors(self) -> int:
        """Number of checkpoint tensors that are read."""
        keys = {key for one in self.streamed for key in one.layout.keys}
        return len(keys | {k for one in self.converted for some in one.keys.values() for k in some})


def no_info() -> LoadStateDictInfo:
    """A report of a load in which nothing has happened yet."""
    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
