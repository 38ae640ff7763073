"""`moetor explain`: the plan from the configuration alone, blocks that are alike on one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

import moetor
import moetor.huggingface
from moetor.cli.explain import engine_line, group_blocks, ranges
from moetor.cli.main import main
from moetor.demo import model_path
from moetor.huggingface import BlockReport, FusionReport
from moetor.huggingface.loading import load_model
from moetor.kernels.base import KernelQuery
from moetor.kernels.native.kernel import NativeKernel
from moetor.kernels.select import Refusal
from moetor.tools.tiny import tiny_config

FORM = moetor.ExpertsConfig(num_experts=2, hidden_size=4, intermediate_size=4)
needs_native = pytest.mark.skipif(
    NativeKernel().refusal(KernelQuery(device="cpu", dtype=torch.float32, experts=FORM, top_k=1))
    is not None,
    reason="needs the native kernel",
)
Captured = pytest.CaptureFixture[str]
ENGINE = "engine: cache paged; tried against the model's own when it starts"


def block(name: str, **changes: object) -> BlockReport:
    made = BlockReport(name=name, family_block="Block", level="block", router="top-2", kernel="k")
    return replace(made, **changes)  # type: ignore[arg-type]


def test_the_demo_from_its_configuration_alone(tmp_path: Path, capsys: Captured) -> None:
    shutil.copy(model_path() / "config.json", tmp_path)
    assert main(["explain", str(tmp_path), "--kernel", "torch"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path}: 4 MoE blocks"
    assert lines[1].split() == ["block", "class", "level", "kernel", "routing", "reason"]
    row = [cell for cell in lines[2].split("  ") if cell]
    assert row[:4] == ["model.layers.0-3.mlp", "Qwen2MoeSparseMoeBlock", "block", "torch"]
    assert lines[3:] == ["memory: 0.00859 GiB of weights", ENGINE]
    assert err == ""


def test_json(capsys: Captured) -> None:
    assert main(["explain", "--kernel", "torch", "--level", "experts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "demo"
    assert found["kernels"] == ["torch"]
    assert [one["name"] for one in found["blocks"]] == [f"model.layers.{n}.mlp" for n in range(4)]
    assert {one["level"] for one in found["blocks"]} == {"experts"}


def test_refused_kernels_are_named_with_their_reason(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = (Refusal("native", "runs on the CPU only"),)
    blocks = tuple(block(f"layers.{n}.mlp", refusals=refusals) for n in range(3))
    monkeypatch.setattr(moetor.huggingface, "explain", lambda *_, **__: FusionReport(list(blocks)))
    assert main(["explain"]) == 0
    last = capsys.readouterr().out.splitlines()[-2]
    assert last == "kernel native not used in layers.0-2.mlp: it runs on the CPU only"


def test_a_model_without_moe(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moetor.huggingface, "explain", lambda *_, **__: FusionReport([]))
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["demo: no MoE blocks, nothing to fuse", ENGINE]


def test_blocks_are_grouped_when_they_differ_in_the_layer_alone() -> None:
    blocks = [
        block("model.layers.1.mlp"),
        block("model.layers.2.mlp", kernel="other"),
        block("model.layers.3.mlp", max_error=1e-3),
        block("model.layers.4.mlp"),
        block("model.layers.4.extra.0"),
        block("mlp"),
    ]
    names = [name for name, _ in group_blocks(blocks)]
    assert names == [
        "model.layers.1,3-4.mlp",
        "model.layers.2.mlp",
        "model.layers.4.extra.0",
        "mlp",
    ]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 2, 3, 4, 9], "0,2-4,9")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_memory_of_a_quantised_model_is_said_before_it_is_loaded(
    tmp_path: Path, capsys: Captured
) -> None:
    shutil.copy(model_path() / "config.json", tmp_path)
    assert main(["explain", str(tmp_path), "--quantization", "int8", "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    model = load_model("demo")
    fused = moetor.fuse(model, quantization="int8")
    assert explained["quantized"] == fused.quantized
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert explained["weight_bytes"] == held
    for found, block in zip(explained["blocks"], fused.blocks, strict=True):
        assert tuple(found["expert_bytes"]) == block.expert_bytes
    assert main(["explain", str(tmp_path), "--quantization", "int8"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        fused.quantized,
        "memory: 0.00575 GiB of weights",
        ENGINE,
    ]


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen3_moe", "cache paged;"),
        ("qwen3_next", "cache paged and states (its cache has layers of class LinearAttention"),
        ("deepseek_v32", "cache own cache, prompts in one piece (its cache has layers of class"),
        ("nllb_moe", "cache own cache, prompts in one piece (it is an encoder-decoder)"),
    ],
)
def test_how_the_engine_caches(family: str, said: str) -> None:
    assert engine_line(tiny_config(family)).startswith(f"engine: {said}")


@needs_native
def test_memory_is_foreseen_for_a_gpu_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Qwen3MoeConfig(
        hidden_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=12,
        num_experts=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=4096,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    flags = ["explain", str(tmp_path), "--device", "cpu", "--cpu-experts"]
    assert (
        main([*flags, "auto", "--gpu-memory", "2500MiB", "--host-memory", "64GiB", "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)["offload"]
    layer = 64 * 3 * 512 * 512 * 2
    assert 0 < len(told["layers"]) < 12
    assert told["host_bytes"] == len(told["layers"]) * layer
    assert told["resident_bytes"] == (12 - len(told["layers"])) * layer
    whole = ("dense", "resident", "cache", "staging")
    used = sum(told[f"{name}_bytes"] for name in whole) + told["reserve"]
    assert used <= told["gpu_memory"] == 2500 * 2**20
    assert main([*flags, "12", "--gpu-memory", "24GiB", "--host-memory", "64GiB"]) == 0
    out = capsys.readouterr().out
    assert "experts in host memory: 12 layers, model.layers.0.mlp to model.layers.11.mlp" in out
    assert "keys and values: 6 KiB a token" in out
    bad = [
        (["13", "--gpu-memory", "24GiB"], "above the 12 MoE layers"),
        (["12", "--gpu-memory", "24GiB", "--host-memory", "1GiB"], "of host memory"),
        (["auto", "--gpu-memory", "1GiB"], "GiB are there"),
        (["auto", "--gpu-memory", "much"], "is no size"),
        (["most"], "neither 'auto' nor a number"),
        (["3"], "is on cpu"),
    ]
    for arguments, words in bad:
        assert main([*flags, *arguments]) != 0
        assert words in capsys.readouterr().err
    assert main(["explain", str(tmp_path), "--gpu-memory", "3GiB"]) != 0
    assert "give --cpu-experts too" in capsys.readouterr().err
