"""Writing a quantised checkpoint in compressed-tensors' layout, tensor by tensor.

Experts are quantised, everything else is copied. Shape letters: N outputs of a product, D its
depth.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moetor.errors import CheckpointError, InputError, UnsupportedError
from moetor.huggingface.checkpoint import Checkpoint, CheckpointReader, StoredTensor
from moetor.huggingface.loading import load_config
from moetor.huggingface.quantized_checkpoint import quantization_settings
from moetor.huggingface.sources import checkpoint_folder
from moetor.kernels.dequantize import dequantize_expert, unpack_nibbles
from moetor.kernels.formats import QuantizedMatrix, WeightFormat, find_format
from moetor.output_paths import check_output_folder
from moetor.quant_config import QuantConfig, find_quantization
from moetor.quantization.quantize import Codes, quantize

SHARD_BYTES = 2 * 2**30
Progress = Callable[[int, int, str], None]
"""`progress(done, total, name)` in tensors."""

_EXPERT = re.compile(r"^(?P<module>.*\.experts)\.\d+\.(?P<matrix>[^.]+)\.weight$")
_FORMS = {
    "int4": "pack-quantized",
    "int8": "int-quantized",
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """What quantising did to one layer's experts.

    Attributes:
        name: path of the experts module.
        experts: how many matrices of each name were quantised.
        errors: norm of the weights' rounding errors over the weights' norm, by matrix.
        bytes_before, bytes_after: of the weights.
    """

    name: str
    experts: int
    errors: dict[str, float]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What `quantize_checkpoint` wrote, layer by layer."""

    quantization: str
    layers: tuple[LayerError, ...]
    folder: Path

    @property
    def bytes_before(self) -> int:
        """Of all experts."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of all experts."""
        return sum(layer.bytes_after for layer in self.layers)


def quantize_checkpoint(
    model: str,
    out: str | Path,
    quantization: str | QuantConfig,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Writes a copy of a checkpoint whose experts are quantised, which engines load that know
    compressed-tensors.

    Args:
        model: a folder, a hub id, or `demo`.
        out: a folder that does not exist yet, or is empty.

    Raises:
        CheckpointError: the model cannot be read, or is quantised already.
        ConfigError: unknown quantisation.
        InputError: `out` is not empty, or cannot be made.
        UnsupportedError: a format without such a layout, or experts that are not one tensor each.
    """
    quant = find_quantization(quantization)
    scheme = _scheme(quant)
    target = Path(out)
    check_output_folder(target)
    settings = quantization_settings(load_config(model, revision=revision))
    if settings is not None:
        raise CheckpointError(
            f"{model!r} is quantised already ({settings.get('quant_method')}); take the original"
        )
    folder = checkpoint_folder(model, revision)
    checkpoint = Checkpoint(folder)
    experts = _experts(checkpoint, find_format(quant.weight_format))
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}; name another") from error
    errors = _write_weights(checkpoint, experts, quant, target, progress)
    _copy_rest(folder, target, checkpoint, experts, scheme)
    return QuantizeReport(quant.name, tuple(errors), target)


def _scheme(quant: QuantConfig) -> dict[str, Any]:
    """The configuration of compressed-tensors, but for `ignore`."""
    form = _FORMS.get(quant.format)
    weight_only_int8 = quant.format == "int8" and (
        quant.granularity == "group" or quant.activations == "unquantized"
    )
    if form is None or weight_only_int8:
        raise UnsupportedError(
            f"compressed-tensors has no layout here for {quant.name}; possible are fp8, "
            "fp8_tensor, fp8_block, fp8_w8a16, int8, int4 in all groups, nvfp4 and mxfp4"
        )
    weights: dict[str, Any] = {
        "num_bits": 4 if quant.format in ("int4", "nvfp4", "mxfp4") else 8,
        "type": "int" if quant.format.startswith("int") else "float",
        "strategy": {"nvfp4": "tensor_group"}.get(quant.format, quant.granularity),
        "symmetric": quant.symmetric,
        "dynamic": False,
    }
    if quant.group_size is not None:
        weights["group_size"] = quant.group_size
    if quant.granularity == "block":
        weights["block_structure"] = list(find_format(quant.weight_format).group)
    inputs = None
    if quant.activations == "dynamic":
        by_group = quant.granularity == "block"
        inputs = {
            "num_bits": 8,
            "type": weights["type"],
            "strategy": "group" if by_group else "token",
            "symmetric": True,
            "dynamic": True,
        } | ({"group_size": 128} if by_group else {})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
    }


def _experts(checkpoint: Checkpoint, kind: WeightFormat) -> dict[str, tuple[str, str]]:
    """Module and matrix of each expert's tensors by name.

    Raises:
        UnsupportedError: there are none, or a depth that groups do not divide.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            if ".experts." in name and len(tensor.shape) == 3:
                raise UnsupportedError(
                    f"{tensor.file}: {name} holds all experts in one tensor, for which "
                    "compressed-tensors has no layout; possible: quantization= when loading"
                )
            continue
        depth = tensor.shape[-1]
        if kind.by_group and depth % max(kind.group[1], 8 if kind.packed else 1):
            raise UnsupportedError(
                f"{tensor.file}: {name} has a depth of {depth}, which groups of {kind.group[1]} do "
                "not divide, and compressed-tensors does not pad; choose another group size or "
                "fp8 or int8"
            )
        found[name] = (match["module"], match["matrix"])
    if not found:
        raise UnsupportedError(
            f"{checkpoint.folder} has no tensors named like `...experts.0.up_proj.weight`"
        )
    return found


class _Shards:
    """Collects tensors and writes a file whenever enough are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: dict[str, Tensor] = {}
        self.size = 0
        self.written: list[tuple[Path, list[str]]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.waiting and self.size + tensor.nbytes > SHARD_BYTES:
            self.flush()
        self.waiting[name] = tensor.contiguous()
        self.size += tensor.nbytes
        self.total += tensor.nbytes

    def flush(self) -> None:
        path = self.folder / f"part-{len(self.written):05d}.safetensors"
        save_file(self.waiting, path, {"format": "pt"})
        self.written.append((path, list(self.waiting)))
        self.waiting, self.size = {}, 0

    def close(self) -> None:
        """Writes the last file, gives all their usual names, and writes the index."""
        self.flush()
        count = len(self.written)
        index: dict[str, str] = {}
        for number, (path, names) in enumerate(self.written, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            name = "model.safetensors" if count == 1 else name
            path.rename(self.folder / name)
            index |= dict.fromkeys(names, name)
        if count > 1:
            text = {"metadata": {"total_size": self.total}, "weight_map": index}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(text, indent=2))


def _write_weights(
    checkpoint: Checkpoint,
    experts: dict[str, tuple[str, str]],
    quant: QuantConfig,
    target: Path,
    progress: Progress | None,
) -> list[LayerError]:
    reader, shards = CheckpointReader(checkpoint), _Shards(target)
    kind = find_format(quant.weight_format)
    meters: dict[str, _Meter] = defaultdict(_Meter)
    for number, (name, stored) in enumerate(checkpoint.tensors.items()):
        if progress is not None:
            progress(number, len(checkpoint.tensors), name)
        tensor = reader.read(name).clone()
        if name not in experts:
            shards.add(name, tensor)
            continue
        try:
            codes = quantize(tensor, kind, per_tensor=int(quant.granularity == "tensor"))
        except InputError as error:
            raise CheckpointError(f"{stored.file}: {name}: {error}") from error
        made = _compressed(codes, kind, tuple(tensor.shape), quant)
        module, matrix = experts[name]
        meters[module].add(matrix, tensor, codes, kind, stored, made)
        for end, part in made.items():
            shards.add(f"{name.removesuffix('weight')}{end}", part)
    shards.close()
    if progress is not None:
        progress(len(checkpoint.tensors), len(checkpoint.tensors), "")
    return [meter.layer(module) for module, meter in meters.items()]


class _Meter:
    """Adds up the errors of one layer."""

    def __init__(self) -> None:
        self.squares: dict[str, tuple[float, float]] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.before = self.after = 0

    def add(
        self,
        matrix: str,
        weight: Tensor,
        codes: Codes,
        kind: WeightFormat,
        stored: StoredTensor,
        made: dict[str, Tensor],
    ) -> None:
        rounded = dequantize_expert(_one(codes, kind, weight.shape[-1]), 0)
        error, size = self.squares.get(matrix, (0.0, 0.0))
        wide = weight.float()
        error += float((rounded - wide).square().sum())
        self.squares[matrix] = (error, size + float(wide.square().sum()))
        self.counts[matrix] += 1
        self.before += stored.nbytes
        self.after += sum(part.nbytes for part in made.values())

    def layer(self, module: str) -> LayerError:
        return LayerError(
            name=module,
            experts=max(self.counts.values()),
            errors={
                name: (error / size) ** 0.5 if size else 0.0
                for name, (error, size) in self.squares.items()
            },
            bytes_before=self.before,
            bytes_after=self.after,
        )


def _one(codes: Codes, kind: WeightFormat, depth: int) -> QuantizedMatrix:
    zeros, rows = codes.zero_points, codes.row_scales
    return QuantizedMatrix(
        format=kind,
        depth=depth,
        values=codes.values[None],
        scales=codes.scales[None],
        zero_points=None if zeros is None else zeros[None],
        row_scales=None if rows is None else rows[None],
    )


def _words(codes: Tensor) -> Tensor:
    """4-bit codes [N, D] to int32 words [N, ceil(D / 8)], the first in the lowest bits."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).long()
    shifts = torch.arange(0, 32, 4)
    packed: Tensor = (padded.unflatten(-1, (-1, 8)) << shifts).sum(dim=-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _compressed(
    codes: Codes, kind: WeightFormat, shape: tuple[int, ...], quant: QuantConfig
) -> dict[str, Tensor]:
    """The tensors of one matrix by the end of their name."""
    rows, depth = shape
    if not kind.packed:
        scales = codes.scales if kind.group[1] else codes.scales[:, None]
        scales = scales[:1, 0] if quant.granularity == "tensor" else scales
        return {"weight": codes.values, "weight_scale": scales}
    nibbles = unpack_nibbles(codes.values)[:, :depth]
    groups = -(-depth // kind.group[1])
    if kind.element == "e2m1":
        made = {
            "weight_packed": nibbles[:, 0::2] | (nibbles[:, 1::2] << 4),
            "weight_scale": codes.scales.view(torch.uint8)[:, :groups].view(codes.scales.dtype),
        }
        if codes.row_scales is not None:
            made["weight_global_scale"] = 1 / codes.row_scales[:1]
        return made
    made = {
        "weight_packed": _words(nibbles),
        "weight_scale": codes.scales,
        "weight_shape": torch.tensor([rows, depth]),
    }
    if codes.zero_points is not None:
        made["weight_zero_point"] = _words(codes.zero_points.to(torch.uint8).T).T
    return made


def _copy_rest(
    folder: Path,
    target: Path,
    checkpoint: Checkpoint,
    experts: dict[str, tuple[str, str]],
    scheme: dict[str, Any],
) -> None:
    """Configuration, with what is not quantised listed by name, tokenizer and other small files."""
    for file in folder.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt") or file.name.endswith("index.json")
        if file.is_file() and not weights and file.name != "config.json":
            shutil.copy(file, target)
    config = json.loads((folder / "config.json").read_text())
    ignored = {
        name.removesuffix(".weight")
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name not in experts
    }
    # A head that is tied to the embedding has no tensor, and is a linear layer nevertheless.
    config["quantization_config"] = scheme | {"ignore": sorted(ignored | {"lm_head"})}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
