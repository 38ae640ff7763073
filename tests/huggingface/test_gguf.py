"""GGUF files: experts as codes, against the numbers that the gguf library makes of their bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from safetensors.torch import load_file, save_file
from torch import Tensor

import moetor
from huggingface.test_quantized_checkpoints import check_weights, logits
from huggingface.tiny import QWEN2
from moetor.errors import CheckpointError, ConfigError, UnsupportedError
from moetor.huggingface.modules import fused_modules

SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 4, "head_dim": 64}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


def gguf_name(name: str) -> str:
    stem, _, end = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{end}"
    _, _, layer, inside = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inside]}.{end}"


def blocks(kind: Kind, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random bytes of a kind of block for a tensor, with sensible float16 scales."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // size
    drawn = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
    places = {Kind.Q8_0: (0,), Kind.Q4_0: (0,), Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}[kind]
    level = {Kind.Q8_0: 5e-4, Kind.Q4_0: 8e-3, Kind.Q4_K: 2e-4, Kind.Q6_K: 2e-5}[kind]
    for place in places:
        scale = ((rng.random(count) + 0.5) * level).astype(np.float16)
        drawn[:, place : place + 2] = scale[:, None].view(np.uint8)
    return drawn.reshape(*shape[:-1], shape[-1] // size * nbytes)


def write(
    folder: Path,
    up: Kind,
    down: Kind,
    rng: torch.Generator,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda _, data: data,
    architecture: str = "qwen2moe",
    poisoned: str = "",
) -> None:
    """A GGUF file in `folder / gguf`, and the same numbers in `folder / dense`.

    Args:
        poisoned: a tensor that becomes Q8_0 blocks, of which one has a scale that is NaN.
    """
    model = QWEN2.build(**SIZES)
    model.save_pretrained(folder / "dense")
    tensors = load_file(folder / "dense" / "model.safetensors")
    (folder / "gguf").mkdir()
    model.config.save_pretrained(folder / "gguf")
    writer = gguf.GGUFWriter(folder / "gguf" / "model.gguf", architecture)
    numpy = np.random.default_rng(int(torch.randint(2**31, (), generator=rng)))
    for name, tensor in tensors.items():
        if ".experts." in name:
            continue
        if gguf_name(name) == poisoned:
            data = blocks(Kind.Q8_0, tuple(tensor.shape), numpy)
            data[0, 0:2] = np.array([np.nan], np.float16).view(np.uint8)
            writer.add_tensor(poisoned, data, raw_dtype=Kind.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), tensor.numpy())
    for layer in range(2):
        for part in ("gate", "up", "down"):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(4)]
            kind = down if part == "down" else up
            key = f"blk.{layer}.ffn_{part}_exps.weight"
            data = change(key, blocks(kind, (4, *tensors[names[0]].shape), numpy))
            writer.add_tensor(key, data, raw_dtype=kind)
            for name, numbers in zip(names, quants.dequantize(data, kind), strict=True):
                tensors[name] = torch.from_numpy(numbers.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, folder / "dense" / "model.safetensors", {"format": "pt"})


def load(folder: Path, **options: Any) -> Any:
    return moetor.MoEForCausalLM.from_pretrained(str(folder), device="cpu", **options)


@pytest.mark.parametrize(
    ("up", "down", "formats"),
    [
        (Kind.Q8_0, Kind.Q8_0, "int8_g32"),
        (Kind.Q4_0, Kind.Q4_0, "int4_g32"),
        (Kind.Q6_K, Kind.Q6_K, "int8_g16"),
        (Kind.Q4_K, Kind.Q6_K, "int4_g32_zp+int8_g16"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_experts_are_the_librarys_numbers(
    up: Kind, down: Kind, formats: str, tmp_path: Path, rng: torch.Generator
) -> None:
    write(tmp_path, up, down, rng)
    model, dense = load(tmp_path / "gguf"), load(tmp_path / "dense")
    check_weights(model, dense)
    assert fused_modules(model)[0][1].routed_experts.method.weight_format == formats
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


def test_groups_without_a_scale_are_constant(tmp_path: Path, rng: torch.Generator) -> None:
    """Q4_K: a 6-bit scale of 0 leaves the offset, and d = dmin = 0 leaves nothing."""

    def flatten(key: str, data: np.ndarray) -> np.ndarray:
        if "down" not in key:
            return data
        parts = data.reshape(-1, 144)
        parts[::3, 4:8] &= 0xC0  # the first four groups' scales
        parts[1::3, 0:4] = 0
        return parts.reshape(data.shape)

    write(tmp_path, Kind.Q4_K, Kind.Q4_K, rng, flatten)
    check_weights(load(tmp_path / "gguf"), load(tmp_path / "dense"))


def test_what_is_refused(tmp_path: Path, rng: torch.Generator) -> None:
    def broken(key: str, data: np.ndarray) -> np.ndarray:
        if key == "blk.1.ffn_up_exps.weight":
            data.reshape(-1, 34)[5, 0:2] = np.array([np.nan], np.float16).view(np.uint8)
        return data

    write(tmp_path / "nan", Kind.Q8_0, Kind.Q8_0, rng, broken)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up_exps\.weight.*NaN"):
        load(tmp_path / "nan" / "gguf")
    key = "blk.1.attn_q.weight"
    write(tmp_path / "dense nan", Kind.Q8_0, Kind.Q8_0, rng, poisoned=key)
    with pytest.raises(CheckpointError, match=rf"{key}.*NaN"):
        load(tmp_path / "dense nan" / "gguf")
    write(tmp_path / "llama", Kind.Q8_0, Kind.Q8_0, rng, architecture="llama")
    with pytest.raises(UnsupportedError, match=r"'llama'; read are olmoe, qwen2moe"):
        load(tmp_path / "llama" / "gguf")
    write(tmp_path / "good", Kind.Q8_0, Kind.Q8_0, rng)
    with pytest.raises(ConfigError, match=r"quantised already \(gguf\)"):
        load(tmp_path / "good" / "gguf", quantization="int4")
    with pytest.raises(UnsupportedError, match=r"quantised \(gguf\).*MoEForCausalLM"):
        moetor.verify(str(tmp_path / "good" / "gguf"))
    file = tmp_path / "good" / "gguf" / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CheckpointError, match="no GGUF file"):
        load(tmp_path / "good" / "gguf")
    (tmp_path / "good" / "gguf" / "second.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        load(tmp_path / "good" / "gguf")


def test_numbers(rng: torch.Generator) -> None:
    """The test's blocks have weights of a usual size."""
    numpy = np.random.default_rng(int(torch.randint(2**31, (), generator=rng)))
    for kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K):
        made: Tensor = torch.from_numpy(quants.dequantize(blocks(kind, (64, 256), numpy), kind))
        assert made.isfinite().all()
        assert 0.01 < made.std() < 0.2
