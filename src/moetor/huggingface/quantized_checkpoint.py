"""Quantised checkpoints as they are found: which tensors make up which matrix.

A `QuantizedCheckpoint` looks like one whose matrices are not quantised: it lists each under the
name and shape that the model knows, and hides scales and zero points. Shape letters: E experts, N
outputs of a product, D its depth, G group size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from moetor.errors import CheckpointError, UnsupportedError
from moetor.huggingface.checkpoint import Checkpoint, CheckpointReader, StoredTensor
from moetor.huggingface.packed_tensors import (
    Awq,
    CompressedIntegers,
    Gptq,
    MicroFloats,
    PackedTensor,
    Plain8Bit,
)
from moetor.kernels.formats import WeightFormat, find_format

_GROUPS = (128, 64, 32)
_READ = "fp8, compressed-tensors, gptq, awq, mxfp4"
Settings = Mapping[str, Any]


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
        found, self.activations = finder(plain.tensors, settings)
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
        for name, matrix in self.packed.items():
            first = plain.tensors[next(n for n in found_names(found, name))]
            self.tensors[name] = replace(first, name=name, dtype="BF16", shape=matrix.shape)

    def open(self) -> StoredTensors:
        """Reads the tensors as they are stored."""
        return CheckpointReader(self._plain)


Found = list[tuple[PackedTensor, list[str]]]
"""Each matrix and the tensors that make it up."""


def found_names(found: Found, name: str) -> list[str]:
    """Tensors that make up the matrix `name`."""
    return next(names for matrix, names in found if matrix.name == name)


def _shape_error(tensor: StoredTensor, wanted: object) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, it must be {wanted}"
    )


def _eight_bits(
    tensors: Mapping[str, StoredTensor],
    weight: str,
    scale: str,
    *,
    block: tuple[int, int] | None,
    input_scale: str | None,
) -> tuple[PackedTensor, list[str]]:
    """int8 or fp8 values with one scale, one a row or one a block."""
    if scale not in tensors:
        raise CheckpointError(f"{tensors[weight].file}: {weight} lacks the tensor {scale}")
    values, scales = tensors[weight], tensors[scale]
    *lead, rows, depth = values.shape
    kind = find_format("fp8" if values.dtype == "F8_E4M3" else "int8")
    shape = tuple(size for size in scales.shape[len(lead) :] if size != 1)
    blocks = None if block is None else (-(-rows // block[0]), -(-depth // block[1]))
    if block is not None and tuple(scales.shape[len(lead) :]) == blocks:
        kind = WeightFormat(element="e4m3", group=block)
    elif block is not None or shape not in ((), (rows,)):
        raise _shape_error(scales, blocks or f"[], [1], [{rows}] or [{rows}, 1]")
    names = [weight, scale, *([input_scale] if input_scale else [])]
    matrix = Plain8Bit(
        name=weight,
        rows=rows,
        depth=depth,
        kind=kind,
        experts=lead[0] if lead else None,
        weight=weight,
        scale=scale,
        input_scale=input_scale,
    )
    return matrix, names


def _fp8(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    """DeepSeek's and Transformers' float8 checkpoints."""
    size = settings.get("weight_block_size")
    block = None if size is None else (int(size[0]), int(size[1]))
    static = settings.get("activation_scheme", "dynamic") == "static"
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
        found.append(_eight_bits(tensors, name, scale, block=block, input_scale=inputs))
    if static:
        return found, "fp8_static"
    return found, "fp8_token" if block is None else "fp8_group128"


def _group_kind(
    bits: int, group: int, depth: int, zero_points: bool, name: str
) -> tuple[WeightFormat, int]:
    """Our format for groups of this size, and how many of our groups one of theirs makes."""
    size = depth if group in (-1, 0) else group
    ours = next((one for one in _GROUPS if size % one == 0), None)
    if ours is None or depth % size or bits not in (4, 8) or (bits == 8 and zero_points):
        raise UnsupportedError(
            f"{name} has {bits}-bit values in groups of {size} along a depth of {depth}"
            f"{' with zero points' if zero_points else ''}; read are 4 bits, or 8 bits without "
            "zero points, in groups that are multiples of 32 and divide the depth"
        )
    element = "int4" if bits == 4 else "int8"
    suffix = "_zp" if zero_points else ""
    return find_format(f"{element}_g{ours}{suffix}"), size // ours


def _gptq(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    bits, group = int(settings.get("bits", 4)), int(settings.get("group_size", 128))
    symmetric = bool(settings.get("sym", True))
    shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    found: Found = []
    for name, tensor in tensors.items():
        if not name.endswith(".qweight"):
            continue
        prefix = name.removesuffix(".qweight")
        names = [f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales")]
        depth, rows = tensor.shape[-2] * (32 // bits), tensor.shape[-1]
        kind, repeat = _group_kind(bits, group, depth, not symmetric, name)
        grouped = f"{prefix}.g_idx" in tensors
        size = depth if group in (-1, 0) else group
        _check_shape(tensors, f"{prefix}.scales", (depth // size, rows))
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


def _check_shape(tensors: Mapping[str, StoredTensor], name: str, wanted: tuple[int, ...]) -> None:
    if name in tensors and tensors[name].shape != wanted:
        raise _shape_error(tensors[name], list(wanted))


def _awq(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    bits = int(settings.get("bits", settings.get("w_bit", 4)))
    group = int(settings.get("group_size", settings.get("q_group_size", 128)))
    version = str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedError(
            f"an AWQ checkpoint with bits={bits} and version={version} is not read; read is "
            "bits=4, version=gemm"
        )
    found: Found = []
    for name, tensor in tensors.items():
        if not name.endswith(".qweight"):
            continue
        prefix = name.removesuffix(".qweight")
        depth, rows = tensor.shape[-2], tensor.shape[-1] * 8
        kind, repeat = _group_kind(bits, group, depth, True, name)
        size = depth if group in (-1, 0) else group
        _check_shape(tensors, f"{prefix}.scales", (depth // size, rows))
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
        experts, rows, groups, _ = tensor.shape
        _check_shape(tensors, f"{stem}_scales", (experts, rows, groups))
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


def _compressed(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    """compressed-tensors: one scheme for each group of modules."""
    groups: dict[str, Any] = dict(settings.get("config_groups") or {})
    if not groups:
        raise CheckpointError("its compressed-tensors configuration has no config_groups")
    found: Found = []
    activations: set[str] = set()
    stems = dict.fromkeys(
        name.rpartition(".")[0]
        for name in tensors
        if name.rpartition(".")[2] in ("weight_packed", "weight_scale")
    )
    for stem in stems:
        if _matches(stem, settings.get("ignore") or ()):
            raise CheckpointError(
                f"{stem} is quantised, and the configuration lists it under ignore"
            )
        scheme = _scheme_of(stem, groups)
        matrix, names, rounding = _compressed_matrix(
            tensors, stem, scheme, str(scheme.get("format") or settings.get("format"))
        )
        found.append((matrix, names))
        activations.add(rounding)
    if len(activations) > 1:
        raise UnsupportedError(
            f"a checkpoint with several kinds of activations ({', '.join(sorted(activations))}) is "
            "not read"
        )
    return found, next(iter(activations), "unquantized")


def _matches(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module is named by one of compressed-tensors' patterns: `re:` and a regular
    expression, or a name, or a class (`Linear`, which all quantised modules are)."""
    return any(
        re.match(one[3:], module) is not None
        if one.startswith("re:")
        else one == module or module.endswith(f".{one}")
        for one in patterns
    )


def _scheme_of(stem: str, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    for scheme in groups.values():
        targets = scheme.get("targets") or ()
        if _matches(stem, targets):
            return scheme  # type: ignore[no-any-return]
    for scheme in groups.values():
        if "Linear" in (scheme.get("targets") or ()):
            return scheme  # type: ignore[no-any-return]
    raise CheckpointError(f"{stem} is quantised, and no config group of the checkpoint targets it")


def _compressed_matrix(
    tensors: Mapping[str, StoredTensor], stem: str, scheme: Mapping[str, Any], form: str
) -> tuple[PackedTensor, list[str], str]:
    weights = scheme.get("weights") or {}
    rounding = _compressed_activations(scheme, form)
    packed, scale = f"{stem}.weight_packed", f"{stem}.weight_scale"
    if form in ("float-quantized", "int-quantized", "naive-quantized"):
        size = weights.get("block_structure")
        inputs = f"{stem}.input_scale" if rounding == "fp8_static" else None
        matrix, names = _eight_bits(
            tensors,
            f"{stem}.weight",
            scale,
            block=None if size is None else (int(size[0]), int(size[1])),
            input_scale=inputs,
        )
        return matrix, names, rounding
    if packed not in tensors:
        raise CheckpointError(f"{tensors[scale].file}: {stem} lacks the tensor {packed}")
    rows, width = tensors[packed].shape[-2:]
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        nvfp4 = form.startswith("nvfp4")
        depth, group = width * 2, 16 if nvfp4 else 32
        _check_shape(tensors, scale, (rows, depth // group))
        second = f"{stem}.weight_global_scale"
        floats = MicroFloats(
            name=f"{stem}.weight",
            rows=rows,
            depth=depth,
            kind=find_format("nvfp4" if nvfp4 else "mxfp4"),
            blocks=packed,
            scale=scale,
            global_scale=second if nvfp4 else None,
        )
        spare = [n for n in (f"{stem}.input_global_scale",) if n in tensors]
        return floats, [packed, scale, *([second] if nvfp4 else []), *spare], rounding
    if form != "pack-quantized":
        raise UnsupportedError(
            f"compressed-tensors format {form!r} of {stem} is not read; read are pack-quantized, "
            "int-quantized, float-quantized, nvfp4-pack-quantized and mxfp4-pack-quantized"
        )
    return (*_packed_integers(tensors, stem, weights), rounding)


def _packed_integers(
    tensors: Mapping[str, StoredTensor], stem: str, weights: Mapping[str, Any]
) -> tuple[PackedTensor, list[str]]:
    packed, scale = f"{stem}.weight_packed", f"{stem}.weight_scale"
    if f"{stem}.weight_g_idx" in tensors:
        raise UnsupportedError(
            f"{stem}.weight_g_idx orders the depth by activations (actorder), which is not read"
        )
    bits, symmetric = int(weights.get("num_bits", 4)), bool(weights.get("symmetric", True))
    rows, width = tensors[packed].shape[-2:]
    groups = tensors[scale].shape[-1]
    depth = width * (32 // bits)
    group = weights.get("group_size")
    size = depth if group in (None, -1) else int(group)
    kind, repeat = _group_kind(bits, size, depth, not symmetric, stem)
    _check_shape(tensors, scale, (rows, depth // size))
    assert groups * size == depth, "checked with the scales' shape"
    zero = None if symmetric else f"{stem}.weight_zero_point"
    matrix = CompressedIntegers(
        name=f"{stem}.weight",
        rows=rows,
        depth=depth,
        kind=kind,
        bits=bits,
        repeat=repeat,
        scale=scale,
        packed=packed,
        zero_point=zero,
    )
    spare = [n for n in (f"{stem}.weight_shape",) if n in tensors]
    return matrix, [packed, scale, *([zero] if zero else []), *spare]


def _compressed_activations(scheme: Mapping[str, Any], form: str) -> str:
    """Our activation format for a scheme's; 4-bit activations are left unquantised, which is
    finer."""
    inputs = scheme.get("input_activations")
    if inputs is None or "fp4" in form:
        return "unquantized"
    bits, kind = int(inputs.get("num_bits", 8)), str(inputs.get("type", "int"))
    strategy, dynamic = str(inputs.get("strategy", "token")), bool(inputs.get("dynamic", True))
    known: dict[tuple[str, str, bool], str] = {
        ("float", "token", True): "fp8_token",
        ("float", "group", True): "fp8_group128",
        ("float", "tensor", False): "fp8_static",
        ("int", "token", True): "int8_token",
    }
    found = known.get((kind, strategy, dynamic))
    if bits != 8 or found is None:
        raise UnsupportedError(
            f"compressed-tensors activations of {bits} bits, {kind}, by {strategy}, "
            f"{'dynamic' if dynamic else 'static'} are not read"
        )
    return found


_FINDERS: dict[str, Callable[[Mapping[str, StoredTensor], Settings], tuple[Found, str]]] = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
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
