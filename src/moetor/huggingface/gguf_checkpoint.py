"""llama.cpp's GGUF files, read through the `gguf` library: experts as codes, the rest as numbers.

Shape letters: E experts, N outputs of a product, D its depth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetor.errors import CheckpointError, UnsupportedError
from moetor.huggingface.checkpoint import StoredTensor
from moetor.huggingface.packed_tensors import PackedTensor, Read
from moetor.huggingface.quantized_checkpoint import QuantizedCheckpoint
from moetor.kernels.dequantize import pack_nibbles
from moetor.kernels.formats import WeightFormat, find_format
from moetor.quantization.quantize import Codes

# Those whose tensors GGUF holds as Transformers does, under these names.
ARCHITECTURES = ("olmoe", "qwen2moe", "qwen3moe")
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_FORMATS = {"Q8_0": "int8_g32", "Q4_0": "int4_g32", "Q4_K": "int4_g32_zp", "Q6_K": "int8_g16"}
"""What each kind of block becomes."""
_PLAIN = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, kw_only=True)
class GgufMatrices(PackedTensor):
    """The experts' matrices of one layer and projection.

    Attributes:
        key: name in the file.
        block: kind of block, such as Q4_K.
    """

    key: str
    block: str

    def codes(self, read: Read, expert: int | None) -> Codes:
        """See `PackedTensor.codes`. Of blocks without a scale all weights are the same: they become
        the zero point, or zero.
        """
        rows_NB = read(self.key, expert)
        size = {"Q8_0": 34, "Q4_0": 18, "Q4_K": 144, "Q6_K": 210}[self.block]
        blocks = rows_NB.reshape(-1, size)
        values, scales, zeros = _BLOCKS[self.block](blocks)
        count = self.rows
        scales = scales.reshape(count, -1)
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(f"tensor {self.key} holds a scale that is NaN or infinite")
        values = values.reshape(count, -1)
        if self.kind.packed:
            values = pack_nibbles(values)
        return Codes(
            values=values,
            scales=scales,
            zero_points=None if zeros is None else zeros.reshape(count, -1),
        )


def _halves(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """float16 scale, 32 int8."""
    return blocks[:, 2:].contiguous().view(torch.int8), _halves(blocks, 0), None


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """float16 scale, 16 bytes: values 0 to 15 in the low halves, 16 to 31 in the high ones."""
    packed = blocks[:, 2:]
    return torch.cat((packed & 15, packed >> 4), dim=1), _halves(blocks, 0), None


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """256 values in 8 groups: d * sc * q - dmin * m, with sc and m of 6 bits in 12 bytes."""
    d, dmin = _halves(blocks, 0).float(), _halves(blocks, 2).float()
    packed = blocks[:, 4:16]
    low, high, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    sc = torch.cat((low & 63, (both & 15) | ((low >> 2) & 48)), dim=1).float()
    m = torch.cat((high & 63, (both >> 4) | ((high >> 2) & 48)), dim=1).float()
    nibbles = blocks[:, 16:].unflatten(1, (4, 1, 32))
    values = torch.cat((nibbles & 15, nibbles >> 4), dim=2).reshape(-1, 8, 32)
    scales, offsets = d * sc, dmin * m
    # A group without a scale is constant: -offset = offset * (0 - 1).
    constant = scales == 0
    zeros = torch.where(constant, torch.ones_like(scales), offsets / scales)
    values = torch.where(constant[..., None], torch.zeros_like(values), values)
    return values, torch.where(constant, offsets, scales), zeros


def _q6_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """256 values in 16 groups: low four bits in 128 bytes, high two in 64, int8 scales, float16."""
    low = blocks[:, :128].unflatten(1, (2, 1, 64))
    low = torch.cat((low & 15, low >> 4), dim=2).reshape(-1, 8, 32)
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32))
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).reshape(-1, 8, 32)
    values = (low | (high << 4)).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return values, scales * _halves(blocks, 208).float(), None


_BLOCKS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_K": _q4_k, "Q6_K": _q6_k}


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no safetensors weights.

    Raises:
        CheckpointError: there are several.
    """
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} GGUF files, such as {files[0].name}; one in one piece is "
            "read"
        )
    return files[0]


def _reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UnsupportedError(
            f"{file} is read with the gguf library, which is not installed: pip install "
            "'moetor[gguf]'"
        ) from error
    try:
        return GGUFReader(file)
    except Exception as error:  # it raises what its parsing happens to meet
        raise CheckpointError(f"{file} is no GGUF file that can be read: {error}") from error


class GgufCheckpoint(QuantizedCheckpoint):
    """A GGUF file as a checkpoint; the configuration and the tokenizer lie beside it.

    Raises:
        CheckpointError: the file cannot be read, or a tensor has no place.
        UnsupportedError: another architecture, or blocks of experts that are not read.
    """

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self.activations = "unquantized"
        self.packed, self.tensors = {}, {}
        self.keys: dict[str, str] = {}
        reader = _reader(file)
        field = reader.get_field("general.architecture")
        name = "" if field is None else str(field.contents())
        if name not in ARCHITECTURES:
            raise UnsupportedError(
                f"{file} is of the architecture {name!r}; read are {', '.join(ARCHITECTURES)}"
            )
        self._found = {tensor.name: tensor for tensor in reader.tensors}
        for key, tensor in self._found.items():
            self._add(file, key, tensor)

    def _add(self, file: Path, key: str, tensor: Any) -> None:
        name = _model_name(key)
        if name is None:
            raise CheckpointError(f"{file}: tensor {key} has no place in the model")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if ".shared_expert_gate." in name and len(shape) == 1:
            shape = (1, *shape)
        kind = tensor.tensor_type.name
        stored = StoredTensor(name, file, "F32", shape, 0, int(tensor.n_bytes))
        self.tensors[name], self.keys[name] = stored, key
        if "_exps." not in key or kind in _PLAIN:
            return
        if kind not in _FORMATS:
            raise UnsupportedError(
                f"{file}: tensor {key} holds experts in {kind} blocks; read are "
                f"{', '.join(_FORMATS)}"
            )
        self.packed[name] = GgufMatrices(
            name=name,
            rows=shape[1],
            depth=shape[2],
            kind=_format(kind),
            experts=shape[0],
            key=key,
            block=kind,
        )

    @property
    def stored_bytes(self) -> int:
        """See `QuantizedCheckpoint.stored_bytes`."""
        return self.nbytes

    def open(self) -> GgufTensors:
        """See `QuantizedCheckpoint.open`."""
        return GgufTensors(self)


def _format(block: str) -> WeightFormat:
    return find_format(_FORMATS[block])


def _model_name(key: str) -> str | None:
    stem, _, end = key.rpartition(".")
    if end not in ("weight", "bias"):
        return None
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{end}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    inside = None if layer is None else _IN_LAYER.get(layer[2])
    return None if layer is None or inside is None else f"model.layers.{layer[1]}.{inside}.{end}"


class GgufTensors:
    """Reads a GGUF file's tensors: by their name in the model as numbers, by that in the file as
    bytes.
    """

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, name: str, box: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or a box of it."""
        found, keys = self._checkpoint._found, self._checkpoint.keys
        if name not in keys:
            raw: Tensor = torch.from_numpy(found[name].data[box].copy())
            return raw
        from gguf import quants

        tensor = found[keys[name]]
        numbers = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.tensor_type.name not in _PLAIN and not bool(torch.isfinite(numbers).all()):
            raise CheckpointError(f"tensor {keys[name]} holds a scale that is NaN or infinite")
        whole = numbers.reshape(self._checkpoint.tensors[name].shape)
        return whole[box] if box else whole

    def close(self) -> None:
        """Nothing is held open."""
