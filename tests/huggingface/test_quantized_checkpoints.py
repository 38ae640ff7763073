"""Checkpoints that are quantised already: each kind against numbers computed from its definition,
and every reason to refuse one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moetor
from huggingface.checkpoint_formats import FORMATS, Format, mxfp4, save_both, write
from huggingface.tiny import GPT_OSS, OLMOE
from moetor.errors import CheckpointError, ConfigError, MoetorError, UnsupportedError
from moetor.huggingface.modules import fused_modules
from moetor.kernels.dequantize import dequantize_expert
from moetor.layer.quantized_experts import QuantizedExperts

SIZES = {"hidden_size": 64, "intermediate_size": 32}


def load(folder: Path, **options: Any) -> Any:
    return moetor.MoEForCausalLM.from_pretrained(str(folder), device="cpu", **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(2, 20).reshape(2, 9)).logits
    return found


def check_weights(quantized: nn.Module, dense: nn.Module) -> None:
    """Every expert's dequantised weights are the numbers of the definition."""
    pairs = zip(fused_modules(quantized), fused_modules(dense), strict=True)
    for (_, ours), (_, theirs) in pairs:
        experts, plain = ours.routed_experts, theirs.routed_experts
        assert isinstance(experts, QuantizedExperts)
        weights, form = experts.quantized_weights, plain.config
        for expert in range(form.num_experts):
            gate_up, down = plain.weights.gate_up[expert], plain.weights.down[expert]
            if form.transposed:
                gate_up, down = gate_up.T, down.T
            if form.interleaved:
                gate_up = torch.cat((gate_up[0::2], gate_up[1::2]))
            for matrix, expected in ((weights.gate_up, gate_up), (weights.down, down)):
                found = dequantize_expert(matrix, expert)
                # Scale times code less an offset: what cancels leaves the rounding of either.
                rounding = float(torch.finfo(found.dtype).eps * expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=rounding)


@pytest.mark.parametrize("case", FORMATS, ids=lambda case: case.id)
def test_a_checkpoint_is_read_as_its_format_is_defined(
    case: Format, tmp_path: Path, rng: torch.Generator
) -> None:
    folder = write(OLMOE.build(**SIZES), case, tmp_path, rng)
    model, dense = load(folder), load(tmp_path / "dense")
    check_weights(model, dense)
    method = fused_modules(model)[0][1].routed_experts.method
    assert (method.weight_format, method.activation_format) == (case.weights, case.activations)
    assert model.fusion_report.quantized.startswith("experts: ")
    assert all(block.quantization for block in model.fusion_report.blocks)
    if case.activations == "unquantized":
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    else:
        assert not torch.equal(logits(model), logits(dense))
    assert getattr(model.config, "quantization_config", None) is None


def test_static_scales_of_gate_and_up_are_joined(tmp_path: Path, rng: torch.Generator) -> None:
    case = next(case for case in FORMATS if case.id == "fp8_static")
    folder = write(OLMOE.build(**SIZES), case, tmp_path, rng)
    stored = load_file(folder / "model.safetensors")
    weights = fused_modules(load(folder))[1][1].routed_experts.quantized_weights
    for expert in range(weights.gate_up.values.shape[0]):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        wanted = max(stored[f"{prefix}.{one}_proj.input_scale"] for one in ("gate", "up"))
        assert weights.gate_up.input_scales[expert] == wanted
        assert weights.down.input_scales[expert] == stored[f"{prefix}.down_proj.input_scale"]


def test_gpt_oss_blocks_and_scales(tmp_path: Path, rng: torch.Generator) -> None:
    model = GPT_OSS.build(hidden_size=64, intermediate_size=32)
    model.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, depth, rows = tensors[name].shape
        made = [mxfp4(rows, depth, rng) for _ in range(experts)]
        tensors[name] = torch.stack([dense.T for _, dense in made]).float().contiguous()
        del packed[name]
        for part in ("blocks", "scales"):
            packed[f"{name}_{part}"] = torch.stack([one[part] for one, _ in made])
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    folder = save_both(tmp_path, tensors, packed, settings)
    quantized, dense = load(folder), load(tmp_path / "dense")
    check_weights(quantized, dense)
    torch.testing.assert_close(logits(quantized), logits(dense), rtol=1e-4, atol=1e-4)


def test_dense_layers_that_are_quantised_too_become_numbers(
    tmp_path: Path, rng: torch.Generator
) -> None:
    case = next(case for case in FORMATS if case.id == "compressed_int8")
    folder = write(OLMOE.build(**SIZES), case, tmp_path, rng)
    packed = load_file(folder / "model.safetensors")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    made, numbers = case.maker(*dense[f"{name}.weight"].shape, rng)
    packed |= {f"{name}.{end}": tensor for end, tensor in made.items()}
    save_file(packed, folder / "model.safetensors")
    model = load(folder)
    found = model.get_submodule(name).weight
    torch.testing.assert_close(found.double(), numbers, rtol=1e-6, atol=1e-9)


def edited(tmp_path: Path, rng: torch.Generator, kind: str) -> tuple[Path, dict[str, Tensor]]:
    case = next(case for case in FORMATS if case.id == kind)
    folder = write(OLMOE.build(**SIZES), case, tmp_path, rng)
    return folder, load_file(folder / "model.safetensors")


EXPERT = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("fp8_block", "up_proj.weight_scale_inv"),
        ("compressed_int4", "down_proj.weight_scale"),
        ("gptq_asymmetric", "gate_proj.scales"),
        ("awq", "down_proj.scales"),
        ("fp8_static", "down_proj.input_scale"),
    ],
)
def test_bad_scales_are_refused_by_name(
    kind: str, scale: str, poison: float, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = edited(tmp_path, rng, kind)
    tensors[f"{EXPERT}.{scale}"].view(-1)[0] = poison
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.{scale}.*(NaN|zero|no scale)"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("fp8_block", "up_proj.weight_scale_inv"),
        ("fp8_static", "up_proj.input_scale"),
        ("compressed_int4", "down_proj.weight_packed"),
        ("compressed_int4_zero", "down_proj.weight_zero_point"),
        ("gptq_symmetric", "gate_proj.scales"),
        ("awq", "gate_proj.qzeros"),
        ("compressed_nvfp4", "gate_proj.weight_global_scale"),
    ],
)
def test_missing_tensors_are_refused_by_name(
    kind: str, gone: str, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = edited(tmp_path, rng, kind)
    del tensors[f"{EXPERT}.{gone}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks the tensor {EXPERT}\.{gone}"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("fp8_block", "up_proj.weight_scale_inv"),
        ("compressed_int8", "down_proj.weight_scale"),
        ("compressed_int4", "down_proj.weight_scale"),
        ("gptq_asymmetric", "gate_proj.scales"),
        ("awq", "down_proj.scales"),
    ],
)
def test_scales_of_another_shape_are_refused_by_name(
    kind: str, scale: str, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = edited(tmp_path, rng, kind)
    name = f"{EXPERT}.{scale}"
    tensors[name] = torch.cat((tensors[name], tensors[name]))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.{scale} has shape"):
        load(folder)


def with_settings(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("awq", {"quant_method": "bitsandbytes"}, "bitsandbytes.*quantization='int8' or 'int4'"),
        ("awq", {"quant_method": "hqq"}, "hqq, which is not read; read are fp8"),
        ("awq", {"bits": 3}, "bits=3"),
        ("gptq_symmetric", {"bits": 3}, "3-bit"),
        ("gptq_asymmetric", {"group_size": 24}, "groups of 24"),
        ("compressed_int4", {"ignore": [f"re:.*{EXPERT}.down_proj"]}, f"{EXPERT}.*ignore"),
        ("compressed_int4", {"config_groups": {}}, "no config_groups"),
        ("compressed_int4", {"format": "marlin-24"}, "'marlin-24'.*not read; read are"),
        ("fp8_block", {"weight_block_size": [128, 128]}, "weight_scale_inv has shape"),
        ("gptq_symmetric", {"checkpoint_format": "gptq_v2"}, "qzeros has zero points other than 8"),
    ],
)
def test_contradictory_or_foreign_settings_are_refused(
    kind: str, changes: dict[str, Any], words: str, tmp_path: Path, rng: torch.Generator
) -> None:
    folder, _ = edited(tmp_path, rng, kind)
    with_settings(folder, **changes)
    with pytest.raises(MoetorError, match=words) as caught:
        load(folder)
    assert isinstance(caught.value, CheckpointError | UnsupportedError)


@pytest.mark.parametrize("where", ["", "text_config."])
@pytest.mark.parametrize("settings", ["fp8", ["fp8"], 8, True])
def test_settings_that_are_no_object_are_refused_by_name(
    settings: Any, where: str, tmp_path: Path
) -> None:
    fields = {"quantization_config": settings}
    stated = OLMOE.build(**SIZES).config.to_dict() | ({"text_config": fields} if where else fields)
    (tmp_path / "config.json").write_text(json.dumps(stated))
    words = f'{where}quantization_config={settings!r}; it must be an object with a "quant_method"'
    for read in (load, moetor.explain):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            read(str(tmp_path))


def test_order_by_activations_is_refused(tmp_path: Path, rng: torch.Generator) -> None:
    folder, tensors = edited(tmp_path, rng, "gptq_asymmetric")
    order = tensors[f"{EXPERT}.up_proj.g_idx"]
    tensors[f"{EXPERT}.up_proj.g_idx"] = order.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.up_proj\.g_idx.*desc_act=false"):
        load(folder)


def test_experts_of_which_some_are_quantised_are_refused(
    tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = edited(tmp_path, rng, "compressed_int8")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    del tensors[f"{EXPERT}.up_proj.weight_scale"]
    tensors[f"{EXPERT}.up_proj.weight"] = dense[f"{EXPERT}.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts.*only some"):
        load(folder)


def test_a_checkpoint_is_not_quantised_twice(tmp_path: Path, rng: torch.Generator) -> None:
    folder, _ = edited(tmp_path, rng, "awq")
    with pytest.raises(ConfigError, match=r"'int8' was asked for.*quantised already \(awq\)"):
        load(folder, quantization="int8")


def test_a_quantised_checkpoint_is_not_loaded_without_fusing(
    tmp_path: Path, rng: torch.Generator
) -> None:
    folder, _ = edited(tmp_path, rng, "awq")
    with pytest.raises(UnsupportedError, match=r"quantised \(awq\).*MoEForCausalLM"):
        moetor.verify(str(folder))


def test_explain_reads_the_headers_of_a_quantised_checkpoint(
    tmp_path: Path, rng: torch.Generator
) -> None:
    folder, tensors = edited(tmp_path, rng, "awq")
    explained = moetor.explain(str(folder), device="cpu")
    loaded = load(folder)
    assert explained.kernels == loaded.fusion_report.kernels
    assert [block.quantization for block in explained.blocks] == [
        block.quantization for block in loaded.fusion_report.blocks
    ]
    assert explained.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert explained.quantized == "experts: 16 of 16 quantised (int4_zp)"
    with pytest.raises(ConfigError, match=r"quantised already \(awq\)"):
        moetor.explain(str(folder), quantization="int8")
