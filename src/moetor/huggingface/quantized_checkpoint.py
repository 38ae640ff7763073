"""Quantised checkpoints as they are found: which tensors make up which matrix.

A `QuantizedCheckpoint` looks like one whose matrices are not quantised: it lists each under the
name and shape that the model knows, and hides scales and zero points. Shape letters: E experts, N
outputs of a product, D its depth, G group size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from moetor.errors import CheckpointError, MoetorError, UnsupportedError
from moetor.huggingface.checkpoint import Checkpoint, CheckpointReader, StoredTensor
from moetor.huggingface.compressed_tensors import compressed
from moetor.huggingface.packed_matrices import (
    Found,
    Settings,
    check_shape,
    eight_bits,
    group_kind,
    shape_error,
)
from moetor.huggingface.packed_tensors import (
    Awq,
    Gptq,
    MicroFloats,
    PackedTensor,
)
from moetor.kernels.formats import find_format

_READ = "fp8, compressed-tensors, gptq, awq, mxfp4"
# What a configuration or a tensor that is not as it should be makes of arithmetic on it.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error)
# No model has weights of these types, or tensors of these names, that are not quantised.
_CODES = ("F8_E4M3", "F8_E5M2", "I8")
_PARTS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx"),
    *("weight_global_scale", "qweight", "qzeros", "scales", "g_idx"),
)


class StoredTensors(Protocol):
    """Reads tensors by name."""

    def read(self, name: str, box: tuple[slice, ...] = ()) -> Tensor:
        """A box of a tensor, or with `()` all of it."""

    def close(self) -> None:
        """Lets files go."""


class QuantizedCheckpoint(Checkpoint):
    """The tensors of a checkpoint, its quantised matrices as if they were not.

    Attributes:
        tensors: as of a `Checkpoint`.
        packed: the quantised matrices by name.
        activations: activation format of all of them.

    Raises:
        CheckpointError: tensors of a quantised matrix are missing or of another shape.
        UnsupportedError: the kind of quantisation is not read.
    """

    def __init__(self, plain: Checkpoint, settings: Settings) -> None:
        self.folder = plain.folder
        self._plain = plain
        method = str(settings.get("quant_method", "")).lower()
        finder = _FINDERS.get(method)
        if finder is None:
            hint = _INSTEAD.get(method, "take a checkpoint that is not quantised")
            raise UnsupportedError(
                f"{plain.folder} is quantised with {method or 'an unnamed method'}, which is not "
                f"read; read are {_READ}. Or {hint}"
            )
        try:
            found, self.activations = finder(plain.tensors, settings)
        except MoetorError:
            raise
        except _MALFORMED as error:
            raise CheckpointError(
                f"{plain.folder}: its quantization_config, or the shape of a tensor, makes no "
                f"sense for {method}: {error}"
            ) from error
        self.packed: dict[str, PackedTensor] = {}
        parts: set[str] = set()
        for matrix, names in found:
            lacking = [name for name in names if name not in plain.tensors]
            if lacking:
                raise CheckpointError(
                    f"{plain.files_of(names)}: {matrix.name} lacks the tensor {lacking[0]}"
                )
            self.packed[matrix.name] = matrix
            parts.update(names)
        if not self.packed:
            raise CheckpointError(
                f"{plain.folder} says that it is quantised with {method} and holds no tensor of "
                "that kind"
            )
        self.tensors = {name: t for name, t in plain.tensors.items() if name not in parts}
        self._check_rest(method)
        for matrix, names in found:
            first = plain.tensors[names[0]]
            self.tensors[matrix.name] = replace(
                first, name=matrix.name, dtype="BF16", shape=matrix.shape
            )

    def _check_rest(self, method: str) -> None:
        """Refuses what belongs to a quantised matrix and makes up none: read as numbers, or left
        alone, it would give another model."""
        for name, tensor in self.tensors.items():
            if name in self.packed:
                raise CheckpointError(
                    f"{tensor.file}: {name} is there twice, quantised and as numbers"
                )
            if tensor.dtype in _CODES or name.rpartition(".")[2] in _PARTS:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} ({tensor.dtype}) belongs to no matrix that is "
                    f"quantised as the configuration says ({method})"
                )

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors as they are stored."""
        return self._plain.nbytes

    def open(self) -> StoredTensors:
        """Reads the tensors as they are stored."""
        return CheckpointReader(self._plain)


def _fp8(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    """DeepSeek's and Transformers' float8 checkpoints."""
    size = settings.get("weight_block_size")
    block = None if size is None else (int(size[0]), int(size[1]))
    scheme, number = settings.get("activation_scheme", "dynamic"), settings.get("fmt", "e4m3")
    if scheme not in ("dynamic", "static") or number != "e4m3":
        raise UnsupportedError(
            f"an fp8 checkpoint with activation_scheme={scheme} and fmt={number} is not read; read "
            "are activation_scheme=dynamic or static, fmt=e4m3"
        )
    static = scheme == "static"
    found: Found = []
    for name, tensor in tensors.items():
        if tensor.dtype != "F8_E4M3":
            continue
        stem = name.removesuffix(".weight")
        dot = "weight_" if name.endswith(".weight") else ""
        stem = f"{stem}." if dot else f"{name}_"
        scale = f"{stem}{dot}scale_inv"
        if scale not in tensors and f"{stem}{dot}scale" in tensors:
            scale = f"{stem}{dot}scale"
        inputs = next(
            (n for n in (f"{stem}input_scale", f"{stem}activation_scale") if n in tensors), None
        )
        if static and inputs is None:
            raise CheckpointError(
                f"{tensor.file}: {name} lacks the tensor {stem}input_scale, and the configuration "
                "says activation_scheme=static"
            )
        found.append(eight_bits(tensors, name, scale, block=block, input_scale=inputs))
    if static:
        return found, "fp8_static"
    return found, "fp8_token" if block is None else "fp8_group128"


def _gptq(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    bits, group = int(settings.get("bits", 4)), int(settings.get("group_size", 128))
    symmetric = bool(settings.get("sym", True))
    layout = settings.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f"a GPTQ checkpoint with checkpoint_format={layout} is not read; read are gptq and "
            "gptq_v2"
        )
    if settings.get("desc_act") and group not in (-1, 0):
        raise UnsupportedError(
            f"a GPTQ checkpoint with desc_act=true and group_size={group} orders the depth by "
            "activations (act-order), which is not read; take one with desc_act=false"
        )
    shift = 0 if layout == "gptq_v2" else 1
    found: Found = []
    for name, tensor in tensors.items():
        if not name.endswith(".qweight"):
            continue
        prefix = name.removesuffix(".qweight")
        names = [f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales")]
        depth, rows = tensor.shape[-2] * (32 // bits), tensor.shape[-1]
        kind, repeat = group_kind(bits, group, depth, not symmetric, name)
        grouped = f"{prefix}.g_idx" in tensors
        size = depth if group in (-1, 0) else group
        check_shape(tensors, f"{prefix}.scales", (depth // size, rows))
        check_shape(tensors, f"{prefix}.qzeros", (depth // size, rows * bits // 32))
        check_shape(tensors, f"{prefix}.g_idx", (depth,))
        matrix = Gptq(
            name=f"{prefix}.weight",
            rows=rows,
            depth=depth,
            kind=kind,
            bits=bits,
            repeat=repeat,
            scale=f"{prefix}.scales",
            prefix=prefix,
            zero_shift=shift,
            grouped=grouped,
            group_size=size,
        )
        found.append((matrix, [*names, *([f"{prefix}.g_idx"] if grouped else [])]))
    return found, "unquantized"


def _awq(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    bits = int(settings.get("bits", settings.get("w_bit", 4)))
    group = int(settings.get("group_size", settings.get("q_group_size", 128)))
    version = str(settings.get("version", "gemm")).lower()
    zeros = bool(settings.get("zero_point", True))
    if bits != 4 or version != "gemm" or not zeros:
        raise UnsupportedError(
            f"an AWQ checkpoint with bits={bits}, version={version} and zero_point={zeros} is not "
            "read; read is bits=4, version=gemm, zero_point=True"
        )
    found: Found = []
    for name, tensor in tensors.items():
        if not name.endswith(".qweight"):
            continue
        prefix = name.removesuffix(".qweight")
        depth, rows = tensor.shape[-2], tensor.shape[-1] * 8
        kind, repeat = group_kind(bits, group, depth, True, name)
        size = depth if group in (-1, 0) else group
        check_shape(tensors, f"{prefix}.scales", (depth // size, rows))
        check_shape(tensors, f"{prefix}.qzeros", (depth // size, rows // 8))
        matrix = Awq(
            name=f"{prefix}.weight",
            rows=rows,
            depth=depth,
            kind=kind,
            bits=4,
            repeat=repeat,
            scale=f"{prefix}.scales",
            prefix=prefix,
        )
        found.append((matrix, [f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales")]))
    return found, "unquantized"


def _mxfp4(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    """gpt-oss: blocks [E, N, D / 32, 16] and scales [E, N, D / 32] of experts that the model has as
    [E, D, N]."""
    found: Found = []
    for name, tensor in tensors.items():
        if not name.endswith("_blocks"):
            continue
        stem = name.removesuffix("_blocks")
        if len(tensor.shape) != 4 or tensor.shape[-1] != 16:
            raise shape_error(tensor, "[experts, rows, groups of 32, 16]")
        experts, rows, groups, _ = tensor.shape
        check_shape(tensors, f"{stem}_scales", (experts, rows, groups))
        for end in ("_blocks", "_scales"):
            part = tensors.get(f"{stem}{end}")
            if part is not None and part.dtype != "U8":
                raise CheckpointError(
                    f"{part.file}: tensor {part.name} has dtype {part.dtype}, it must be U8"
                )
        matrix = MicroFloats(
            name=stem,
            rows=rows,
            depth=groups * 32,
            kind=find_format("mxfp4"),
            experts=experts,
            transposed=True,
            blocks=name,
            scale=f"{stem}_scales",
        )
        found.append((matrix, [name, f"{stem}_scales"]))
    return found, "unquantized"


_FINDERS: dict[str, Callable[[Mapping[str, StoredTensor], Settings], tuple[Found, str]]] = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "compressed-tensors": compressed,
}
_INSTEAD = {
    "bitsandbytes": "take the unquantised checkpoint with quantization='int8' or 'int4'",
    "bitsandbytes_4bit": "take the unquantised checkpoint with quantization='int4'",
    "bitsandbytes_8bit": "take the unquantised checkpoint with quantization='int8'",
}


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """A configuration's `quantization_config` as a dictionary; None where there is none."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return dict(settings if isinstance(settings, dict) else settings.to_dict())
    return None
