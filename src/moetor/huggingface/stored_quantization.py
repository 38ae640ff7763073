"""Whether a checkpoint is quantised, how, and what opens it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetor.errors import CheckpointError
from moetor.huggingface.checkpoint import Checkpoint
from moetor.huggingface.expert_mapping import looks_like_expert
from moetor.huggingface.gguf_checkpoint import GgufCheckpoint, find_gguf
from moetor.huggingface.quantized_checkpoint import QuantizedCheckpoint, quantization_settings
from moetor.quantization.method import QuantizedMethod


def stored_settings(folder: Path, config: Any) -> dict[str, Any] | None:
    """The settings of a checkpoint's quantisation; None where it is not quantised.

    Args:
        folder: need not exist: then only the configuration is asked.
    """
    if find_gguf(folder) is not None:
        return {"quant_method": "gguf"}
    return quantization_settings(config)


def check_quantization_field(stated: Mapping[str, Any], model: str) -> None:
    """Refuses a `quantization_config` that is not an object, which Transformers cannot read.

    Args:
        stated: what config.json holds.

    Raises:
        CheckpointError: with the field's name and what it must be.
    """
    parts = [("", stated)]
    parts += [(f"{name}.", part) for name, part in stated.items() if isinstance(part, Mapping)]
    for where, part in parts:
        settings = part.get("quantization_config")
        if settings is not None and not isinstance(settings, Mapping):
            raise CheckpointError(
                f"config.json of {model!r} has {where}quantization_config={settings!r}; it must be "
                'an object with a "quant_method", such as {"quant_method": "fp8"}, or be left out '
                "where no tensor is quantised; to quantise while loading, pass quantization='fp8'"
            )


def open_checkpoint(folder: Path, config: Any) -> Checkpoint:
    """The checkpoint of a folder. Takes `quantization_config` out of the configuration: the model
    that is made of it is not Transformers' quantised one.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedError: it is quantised in a way that is not read.
    """
    gguf = find_gguf(folder)
    if gguf is not None:
        return GgufCheckpoint(gguf)
    plain = Checkpoint(folder, file_name=getattr(config, "transformers_weights", None))
    settings = quantization_settings(config)
    if settings is None:
        return plain
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    return QuantizedCheckpoint(plain, settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredQuantization:
    """How a checkpoint's experts are quantised.

    Attributes:
        weight_format, activation_format: as a `KernelQuery` has them.
        nbytes: of all tensors in the files.
    """

    weight_format: str
    activation_format: str
    nbytes: int

    def method(self, kernel: str) -> QuantizedMethod:
        """The method that computes with them."""
        return QuantizedMethod(self.weight_format, self.activation_format, kernel)


def stored_quantization(folder: Path, config: Any) -> StoredQuantization:
    """The same, from the headers of a quantised checkpoint's files.

    Raises:
        CheckpointError, UnsupportedError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(folder, copy.deepcopy(config))
    assert isinstance(checkpoint, QuantizedCheckpoint), "asked of a quantised one"
    return described(checkpoint)


def described(checkpoint: QuantizedCheckpoint) -> StoredQuantization:
    """The same of a checkpoint that is open."""
    experts = (m for name, m in checkpoint.packed.items() if looks_like_expert(name))
    kinds = dict.fromkeys(matrix.kind.name for matrix in experts)
    return StoredQuantization(
        weight_format="+".join(kinds) or "unquantized",
        activation_format=checkpoint.activations,
        nbytes=checkpoint.stored_bytes,
    )
