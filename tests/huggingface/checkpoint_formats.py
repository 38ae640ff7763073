"""Quantised checkpoints as other programs write them, and what their numbers are, both from the
formats' definitions in plain loops and shifts: nothing here is shared with the code that reads.

Each maker draws random codes for a matrix [N, D] and gives the tensors by the end of their name,
and the weights in float64. Shape letters: N outputs, D depth, G group size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernels.quantized_cases import e2m1, e4m3

Made = tuple[dict[str, Tensor], Tensor]
Maker = Callable[[int, int, torch.Generator], Made]


def _int(low: int, high: int, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=rng)


def _scales(shape: tuple[int, ...], rng: torch.Generator, size: float) -> Tensor:
    return (torch.rand(shape, generator=rng) + 0.5) * size


def _fp8(rows: int, depth: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    codes = _int(0, 88, (rows, depth), rng) + 128 * _int(0, 2, (rows, depth), rng)
    numbers = torch.tensor([[e4m3(int(code)) for code in row] for row in codes]).double()
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), numbers


def fp8_block(rows: int, depth: int, rng: torch.Generator) -> Made:
    """DeepSeek: a scale for each 128 x 128 block, here 16 x 32 to have several."""
    codes, numbers = _fp8(rows, depth, rng)
    scales = _scales((-(-rows // 16), -(-depth // 32)), rng, 0.02)
    dense = torch.stack(
        [
            torch.stack([numbers[n, d] * scales[n // 16, d // 32] for d in range(depth)])
            for n in range(rows)
        ]
    )
    return {"weight": codes, "weight_scale_inv": scales}, dense


def fp8_tensor_static(rows: int, depth: int, rng: torch.Generator) -> Made:
    codes, numbers = _fp8(rows, depth, rng)
    scale = _scales((), rng, 0.02)
    made = {"weight": codes, "weight_scale": scale, "input_scale": _scales((), rng, 0.01)}
    return made, numbers * scale.double()


def fp8_channel(rows: int, depth: int, rng: torch.Generator) -> Made:
    codes, numbers = _fp8(rows, depth, rng)
    scales = _scales((rows, 1), rng, 0.02).to(torch.bfloat16)
    return {"weight": codes, "weight_scale": scales}, numbers * scales.double()


def int8_channel(rows: int, depth: int, rng: torch.Generator) -> Made:
    codes = _int(-128, 128, (rows, depth), rng).to(torch.int8)
    scales = _scales((rows, 1), rng, 0.002)
    return {"weight": codes, "weight_scale": scales}, codes.double() * scales.double()


def words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [X, D] to int32 [X, D * bits / 32], the first in the lowest bits."""
    per = 32 // bits
    rows = []
    for row in codes.tolist():
        made = []
        for start in range(0, len(row), per):
            word = sum(
                code << (bits * place) for place, code in enumerate(row[start : start + per])
            )
            made.append(word - 2**32 if word >= 2**31 else word)
        rows.append(made)
    return torch.tensor(rows, dtype=torch.int32)


def _grouped(codes: Tensor, scales: Tensor, zeros: Tensor | float, group: int) -> Tensor:
    wide = scales.double().repeat_interleave(group, 1)
    middle = zeros if isinstance(zeros, float) else zeros.double().repeat_interleave(group, 1)
    return (codes.double() - middle) * wide


def compressed_int4(rows: int, depth: int, rng: torch.Generator) -> Made:
    codes, scales = _int(0, 16, (rows, depth), rng), _scales((rows, depth // 32), rng, 0.03)
    scales = scales.to(torch.bfloat16)
    made = {
        "weight_packed": words(codes, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, depth]),
    }
    return made, _grouped(codes, scales, 8.0, 32)


def compressed_int4_zero(rows: int, depth: int, rng: torch.Generator) -> Made:
    codes, scales = _int(0, 16, (rows, depth), rng), _scales((rows, depth // 32), rng, 0.03)
    zeros = _int(0, 16, (rows, depth // 32), rng)
    made = {
        "weight_packed": words(codes, 4),
        "weight_scale": scales,
        "weight_zero_point": words(zeros.T, 4).T.contiguous(),
        "weight_shape": torch.tensor([rows, depth]),
    }
    return made, _grouped(codes, scales, zeros, 32)


def gptq_symmetric(rows: int, depth: int, rng: torch.Generator) -> Made:
    """One group of the whole depth; zero points are stored less one."""
    codes, scales = _int(0, 16, (rows, depth), rng), _scales((rows, 1), rng, 0.03).half()
    made = {
        "qweight": words(codes, 4).T.contiguous(),
        "qzeros": words(torch.full((1, rows), 7), 4),
        "scales": scales.T.contiguous(),
        "g_idx": torch.zeros(depth, dtype=torch.int32),
    }
    return made, _grouped(codes, scales, 8.0, depth)


def gptq_asymmetric(rows: int, depth: int, rng: torch.Generator) -> Made:
    codes, scales = _int(0, 16, (rows, depth), rng), _scales((rows, depth // 32), rng, 0.03).half()
    zeros = _int(1, 17, (rows, depth // 32), rng)
    made = {
        "qweight": words(codes, 4).T.contiguous(),
        "qzeros": words(zeros.T - 1, 4),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(depth, dtype=torch.int32) // 32,
    }
    return made, _grouped(codes, scales, zeros, 32)


def gptq_8bit(rows: int, depth: int, rng: torch.Generator) -> Made:
    codes = _int(0, 256, (rows, depth), rng)
    scales = _scales((rows, depth // 32), rng, 0.002).half()
    made = {
        "qweight": words(codes, 8).T.contiguous(),
        "qzeros": words(torch.full((depth // 32, rows), 127), 8),
        "scales": scales.T.contiguous(),
    }
    return made, _grouped(codes, scales, 128.0, 32)


def awq(rows: int, depth: int, rng: torch.Generator) -> Made:
    """Eight rows in a word, rows 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up."""
    codes, scales = _int(0, 16, (rows, depth), rng), _scales((rows, depth // 32), rng, 0.03).half()
    zeros = _int(0, 16, (rows, depth // 32), rng)

    def shuffled(numbers_NX: Tensor) -> Tensor:
        order = [8 * block + one for block in range(rows // 8) for one in (0, 2, 4, 6, 1, 3, 5, 7)]
        return words(numbers_NX[order].T, 4)

    made = {
        "qweight": shuffled(codes),
        "qzeros": shuffled(zeros),
        "scales": scales.T.contiguous(),
    }
    return made, _grouped(codes, scales, zeros, 32)


def pairs(codes: Tensor) -> Tensor:
    """4-bit codes, two in a byte, the first in the low bits."""
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def nvfp4(rows: int, depth: int, rng: torch.Generator) -> Made:
    codes = _int(0, 16, (rows, depth), rng)
    scales = (_scales((rows, depth // 16), rng, 100.0)).to(torch.float8_e4m3fn)
    whole = _scales((1,), rng, 3000.0)
    numbers = torch.tensor([[e2m1(int(code)) for code in row] for row in codes]).double()
    dense = numbers * scales.double().repeat_interleave(16, 1) / whole.double()
    return {
        "weight_packed": pairs(codes),
        "weight_scale": scales,
        "weight_global_scale": whole,
        "input_global_scale": torch.tensor([1.0]),
    }, dense


def mxfp4(rows: int, depth: int, rng: torch.Generator) -> Made:
    """gpt-oss: blocks of 32 in 16 bytes."""
    codes, exponents = _int(0, 16, (rows, depth), rng), _int(120, 124, (rows, depth // 32), rng)
    numbers = torch.tensor([[e2m1(int(code)) for code in row] for row in codes]).double()
    dense = numbers * (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)
    blocks = pairs(codes).reshape(rows, depth // 32, 16)
    return {"blocks": blocks, "scales": exponents.to(torch.uint8)}, dense


def _group(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint.

    Attributes:
        weights, activations: the formats that it becomes here.
        activation: the activation format.
    """

    id: str
    maker: Maker
    settings: dict[str, Any]
    weights: str
    activations: str = "unquantized"
    sizes: dict[str, Any] = field(default_factory=dict)


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_CT = {"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*mlp.gate$"]}
FORMATS = (
    Format(
        "fp8_block",
        fp8_block,
        {"quant_method": "fp8", "weight_block_size": [16, 32]},
        "fp8_block16x32",
        "fp8_group128",
    ),
    Format(
        "fp8_static",
        fp8_tensor_static,
        {"quant_method": "fp8", "activation_scheme": "static"},
        "fp8",
        "fp8_static",
    ),
    Format(
        "compressed_fp8",
        fp8_channel,
        _CT
        | {
            "format": "float-quantized",
            "config_groups": _group(
                {"num_bits": 8, "type": "float", "strategy": "channel"},
                {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            ),
        },
        "fp8",
        "fp8_token",
    ),
    Format(
        "compressed_int8",
        int8_channel,
        _CT
        | {
            "format": "int-quantized",
            "config_groups": _group(
                {"num_bits": 8, "type": "int", "strategy": "channel"},
                {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
            ),
        },
        "int8",
        "int8_token",
    ),
    Format(
        "compressed_int4",
        compressed_int4,
        _CT | {"format": "pack-quantized", "config_groups": _group(_INT4)},
        "int4_g32",
    ),
    Format(
        "compressed_int4_zero",
        compressed_int4_zero,
        _CT | {"format": "pack-quantized", "config_groups": _group(_INT4 | {"symmetric": False})},
        "int4_g32_zp",
    ),
    Format(
        "compressed_nvfp4",
        nvfp4,
        _CT
        | {
            "format": "nvfp4-pack-quantized",
            "config_groups": _group({"num_bits": 4, "type": "float", "group_size": 16}),
        },
        "nvfp4",
    ),
    Format(
        "gptq_symmetric",
        gptq_symmetric,
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False},
        "int4_g64+int4_g32",
    ),
    Format(
        "gptq_asymmetric",
        gptq_asymmetric,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
        "int4_g32_zp",
    ),
    Format(
        "gptq_8bit",
        gptq_8bit,
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True},
        "int8_g32",
    ),
    Format(
        "awq",
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
        "int4_g32_zp",
    ),
)


def write(model: nn.Module, case: Format, folder: Path, rng: torch.Generator) -> Path:
    """A quantised checkpoint of `model` in `folder / quantized`, and the same numbers, in float32,
    in `folder / dense`, which is returned with it implied by its name."""
    model.save_pretrained(folder / "dense")  # type: ignore[operator]
    tensors = load_file(folder / "dense" / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name in list(tensors):
        if ".experts." not in name:
            packed[name] = tensors[name]
            continue
        stem = name.removesuffix(".weight")
        made, dense = case.maker(*tensors[name].shape, rng)
        tensors[name] = dense.float()
        packed |= {f"{stem}.{end}": tensor for end, tensor in made.items()}
    return save_both(folder, tensors, packed, case.settings)


def save_both(
    folder: Path, dense: dict[str, Tensor], packed: dict[str, Tensor], settings: dict[str, Any]
) -> Path:
    """Writes both checkpoints; the folder of the quantised one."""
    save_file(dense, folder / "dense" / "model.safetensors", {"format": "pt"})
    target = folder / "quantized"
    target.mkdir()
    save_file(
        {n: t.contiguous() for n, t in packed.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "dense" / "config.json").read_text())
    config["quantization_config"] = settings
    (target / "config.json").write_text(json.dumps(config))
    return target
