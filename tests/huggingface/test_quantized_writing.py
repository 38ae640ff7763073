"""`moetor quantize`: what is written is what loading quantises, and nothing is written in vain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moetor
from huggingface.tiny import GPT_OSS, OLMOE
from moetor.cli.main import main
from moetor.demo import model_path
from moetor.errors import CheckpointError, InputError, MoetorError, UnsupportedError
from moetor.huggingface import quantized_writing
from moetor.huggingface.modules import fused_modules
from moetor.huggingface.quantized_writing import quantize_checkpoint
from moetor.kernels.dequantize import dequantize_expert

Captured = pytest.CaptureFixture[str]
IDS = torch.arange(5, 37)[None]
FORMATS = (
    *("fp8", "fp8_tensor", "fp8_block", "fp8_w8a16", "int8"),
    *("int4", "int4_g64", "int4_zp", "mxfp4", "nvfp4"),
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_written_checkpoint_is_what_quantising_on_loading_makes(
    name: str, tmp_path: Path
) -> None:
    report = quantize_checkpoint("demo", tmp_path / "out", name)
    assert report.bytes_after < 0.53 * report.bytes_before
    for layer in report.layers:
        assert layer.experts == 16
        assert set(layer.errors) == {"gate_proj", "up_proj", "down_proj"}
        assert all(0 < error < 0.13 for error in layer.errors.values())
    written = moetor.MoEForCausalLM.from_pretrained(str(tmp_path / "out"), device="cpu")
    loaded = moetor.MoEForCausalLM.from_pretrained("demo", quantization=name, device="cpu")
    ours, theirs = logits(written).float(), logits(loaded).float()
    if name in ("fp8_block", "nvfp4"):  # on loading, gate and up share blocks, or a second scale
        assert (ours - theirs).norm() < 0.1 * theirs.norm()
    else:
        assert torch.equal(ours, theirs)


def stored(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """A matrix's tensors by the end of their names."""
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(stem): t for name, t in tensors.items() if name.startswith(stem)}


@pytest.mark.parametrize("name", FORMATS)
def test_the_layouts_own_library_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantize_checkpoint("demo", tmp_path / "out", name)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(settings)
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
    model = moetor.MoEForCausalLM.from_pretrained(str(tmp_path / "out"), device="cpu")
    path, block = fused_modules(model)[1]
    weights, parts = block.routed_experts.quantized_weights, {}
    for part in ("gate_proj", "up_proj", "down_proj"):
        tensors = stored(tmp_path / "out", f"{path}.experts.5.{part}.")
        parts[part] = compressor.decompress(tensors, scheme)["weight"].float()
    gate_up = torch.cat((parts["gate_proj"], parts["up_proj"]))
    for matrix, expected in ((weights.gate_up, gate_up), (weights.down, parts["down_proj"])):
        # It multiplies in the scales' dtype, bfloat16.
        torch.testing.assert_close(dequantize_expert(matrix, 5), expected, rtol=2**-7, atol=0)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="takes no experts of this layout"
)
@pytest.mark.parametrize("name", ["fp8", "fp8_tensor", "int4", "int4_g64", "mxfp4"])
def test_transformers_loads_what_is_written(name: str, tmp_path: Path) -> None:
    """Its own quantiser for this layout; of the other formats it does not take experts."""
    pytest.importorskip("compressed_tensors")
    quantize_checkpoint("demo", tmp_path / "out", name)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(str(model_path()), dtype=torch.float32)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(one.startswith("lm_head") for one in weights)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in settings["ignore"]
    found, wanted = logits(theirs), logits(plain)
    assert 1e-3 < (found - wanted).norm() / wanted.norm() < 0.2


def test_everything_else_is_copied(tmp_path: Path) -> None:
    quantize_checkpoint("demo", tmp_path / "out", "int8")
    before = load_file(model_path() / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    others = [name for name in before if ".experts." not in name]
    assert others
    for name in others:
        assert torch.equal(after[name], before[name])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        model_path() / "tokenizer.json"
    ).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((model_path() / "config.json").read_text())
    assert "model.layers.0.mlp.gate" in settings["ignore"]
    assert "model.layers.3.self_attn.q_proj" in settings["ignore"]
    assert not any(".experts." in name for name in settings["ignore"])


def test_several_files_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_checkpoint("demo", tmp_path / "one", "int4")
    monkeypatch.setattr(quantized_writing, "SHARD_BYTES", 2**20)
    quantize_checkpoint("demo", tmp_path / "many", "int4")
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = (
        moetor.MoEForCausalLM.from_pretrained(str(tmp_path / name), device="cpu")
        for name in ("one", "many")
    )
    assert torch.equal(logits(one), logits(many))


def test_the_command(tmp_path: Path, capsys: Captured) -> None:
    assert main(["quantize", "demo", str(tmp_path / "out"), "--format", "int4"]) == 0
    out, err = capsys.readouterr()
    assert err == "quantising demo: 250 tensors\n"
    lines = out.splitlines()
    assert lines[0] == "demo: relative error of the weights in int4"
    assert lines[1].split() == ["experts", "of", "experts", "down_proj", "gate_proj", "up_proj"]
    assert len(lines) == 7
    assert lines[-1] == f"experts: 0.00586 -> 0.00165 GiB, written to {tmp_path / 'out'}"
    assert main(["quantize", "demo", str(tmp_path / "json"), "--format", "fp8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantization"] == "fp8"
    assert len(found["layers"]) == 4


def test_what_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    GPT_OSS.build().save_pretrained(tmp_path / "packed")
    OLMOE.build(hidden_size=64, intermediate_size=24).save_pretrained(tmp_path / "odd")
    poisoned = OLMOE.build(hidden_size=64, intermediate_size=32)
    poisoned.model.layers[0].mlp.experts.down_proj.data[1, 0, 0] = float("inf")
    poisoned.save_pretrained(tmp_path / "poisoned")
    quantize_checkpoint("demo", tmp_path / "done", "int4")
    cases: list[tuple[str, str, str, type[MoetorError], str]] = [
        ("demo", "full", "int4", InputError, "not an empty folder"),
        ("demo", "new", "mxfp8", UnsupportedError, "no layout here for mxfp8; possible"),
        ("demo", "new", "int8_w8a16", UnsupportedError, "no layout here for int8_w8a16"),
        (str(tmp_path / "packed"), "new", "int4", UnsupportedError, "all experts in one tensor"),
        (str(tmp_path / "odd"), "new", "int4", UnsupportedError, "depth of 24.*groups of 32"),
        (str(tmp_path / "done"), "new", "int4", CheckpointError, "quantised already"),
        (str(tmp_path / "nowhere"), "new", "int4", CheckpointError, "nowhere"),
    ]
    for model, out, name, error, words in cases:
        with pytest.raises(error, match=words):
            quantize_checkpoint(model, tmp_path / out, name)
        assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match=r"experts\.1\.down_proj\.weight: .*NaN or infinite"):
        quantize_checkpoint(str(tmp_path / "poisoned"), tmp_path / "bad", "int4")
