"""Checkpoints in compressed-tensors' layout: one scheme for each group of modules.

Shape letters: N outputs of a product, D its depth, G group size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moetor.errors import CheckpointError, UnsupportedError
from moetor.huggingface.checkpoint import StoredTensor
from moetor.huggingface.packed_matrices import (
    Found,
    Settings,
    check_shape,
    eight_bits,
    group_kind,
    shape_error,
)
from moetor.huggingface.packed_tensors import CompressedIntegers, MicroFloats, PackedTensor
from moetor.kernels.formats import find_format

_CODES = ("F8_E4M3", "I8")


def compressed(tensors: Mapping[str, StoredTensor], settings: Settings) -> tuple[Found, str]:
    """compressed-tensors: one scheme for each group of modules."""
    groups: dict[str, Any] = dict(settings.get("config_groups") or {})
    if not groups:
        raise CheckpointError("the checkpoint's quantization_config has no config_groups")
    _check_around(settings)
    found: Found = []
    activations: set[str] = set()
    stems = dict.fromkeys(
        name.rpartition(".")[0]
        for name in tensors
        if name.rpartition(".")[2] in ("weight_packed", "weight_scale")
        or (name.endswith(".weight") and tensors[name].dtype in _CODES)
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


def _check_around(settings: Settings) -> None:
    """Refuses what changes a model beyond its weights' codes.

    Raises:
        UnsupportedError: rotations of activations, or weights that are stored as sparse ones.
    """
    sparse = settings.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense":
        raise UnsupportedError(
            f"compressed-tensors' sparsity_config with format={sparse['format']} is not read; take "
            "a checkpoint without it"
        )
    if settings.get("transform_config"):
        raise UnsupportedError(
            "compressed-tensors' transform_config rotates activations, which is not done here; "
            "take a checkpoint without it"
        )


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
        _check_eight_bits(tensors, stem, weights)
        inputs = f"{stem}.input_scale" if rounding == "fp8_static" else None
        matrix, names = eight_bits(
            tensors,
            f"{stem}.weight",
            scale,
            block=_block(weights.get("block_structure")),
            input_scale=inputs,
        )
        return matrix, names, rounding
    for name in (packed, scale):
        if name not in tensors:
            there = next(
                tensors[one] for one in (packed, scale, f"{stem}.weight") if one in tensors
            )
            raise CheckpointError(f"{there.file}: {stem} lacks the tensor {name}")
    rows, width = tensors[packed].shape[-2:]
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        nvfp4 = form.startswith("nvfp4")
        depth, group = width * 2, 16 if nvfp4 else 32
        check_shape(tensors, scale, (rows, depth // group))
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


def _block(size: str | Sequence[int] | None) -> tuple[int, int] | None:
    """Rows and depth of a block: a pair, or written as `128x128`."""
    if size is None:
        return None
    rows, depth = size.split("x") if isinstance(size, str) else size
    return int(rows), int(depth)


def _check_eight_bits(
    tensors: Mapping[str, StoredTensor], stem: str, weights: Mapping[str, Any]
) -> None:
    """Refuses values other than the scheme's.

    Raises:
        CheckpointError: another dtype, or scales that the scheme's strategy does not have.
        UnsupportedError: not eight bits, or zero points.
    """
    bits, kind = int(weights.get("num_bits", 8)), str(weights.get("type", "int"))
    symmetric = bool(weights.get("symmetric", True))
    if bits != 8 or not symmetric:
        raise UnsupportedError(
            f"{stem} has weights of {bits} bits{'' if symmetric else ' with zero points'}, stored "
            "one in a byte; read are 8 bits without zero points"
        )
    values = tensors.get(f"{stem}.weight")
    wanted = {"float": "F8_E4M3", "int": "I8"}.get(kind)
    if values is not None and values.dtype != wanted:
        raise CheckpointError(
            f"{values.file}: tensor {values.name} has dtype {values.dtype}, and the configuration "
            f"says num_bits=8, type={kind}"
        )
    scales = tensors.get(f"{stem}.weight_scale")
    if weights.get("strategy") == "tensor" and scales is not None and math.prod(scales.shape) > 1:
        raise shape_error(scales, "[] or [1]: strategy=tensor")


def _packed_integers(
    tensors: Mapping[str, StoredTensor], stem: str, weights: Mapping[str, Any]
) -> tuple[PackedTensor, list[str]]:
    packed, scale = f"{stem}.weight_packed", f"{stem}.weight_scale"
    if f"{stem}.weight_g_idx" in tensors:
        raise UnsupportedError(
            f"{stem}.weight_g_idx orders the depth by activations (actorder), which is not read"
        )
    if weights.get("actorder") in ("group", True):
        raise UnsupportedError(
            f"{stem} is quantised with actorder=group, which orders the depth by activations and "
            "is not read; take a checkpoint with actorder=static or none"
        )
    bits, symmetric = int(weights.get("num_bits", 4)), bool(weights.get("symmetric", True))
    rows, width = tensors[packed].shape[-2:]
    groups = tensors[scale].shape[-1]
    depth = width * (32 // bits)
    group = weights.get("group_size")
    size = depth if group in (None, -1) else int(group)
    kind, repeat = group_kind(bits, size, depth, not symmetric, stem)
    check_shape(tensors, scale, (rows, depth // size))
    assert groups * size == depth, "checked with the scales' shape"
    zero = None if symmetric else f"{stem}.weight_zero_point"
    if zero is not None:
        check_shape(tensors, zero, (-(-rows * bits // 32), depth // size))
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
    symmetric, group = bool(inputs.get("symmetric", True)), inputs.get("group_size")
    if strategy == "group" and group != 128:
        found = None
    if bits != 8 or found is None or not symmetric:
        raise UnsupportedError(
            f"compressed-tensors activations of {bits} bits, {kind}, by {strategy}"
            f"{'' if group is None else f' of {group}'}, {'dynamic' if dynamic else 'static'}"
            f"{'' if symmetric else ', with zero points'} are not read; read are 8 bits without "
            "zero points: float by token or by group of 128, dynamic, or by tensor, static; int by "
            "token, dynamic"
        )
    return found
