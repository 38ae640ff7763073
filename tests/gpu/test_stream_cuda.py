"""Checkpoints streamed onto an NVIDIA GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moetor
from moetor.huggingface.loading import load_model
from moetor.tools.tiny import logits_of, tiny_inputs, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe", "nemotron_h")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_weights_as_on_the_cpu(name: str, dtype: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path, max_shard_size="150KB")
    there = load_model(str(tmp_path), dtype=dtype, device="cuda")
    here = load_model(str(tmp_path), dtype=dtype, device="cpu")
    theirs = here.state_dict()
    assert {tensor.device.type for tensor in (*there.parameters(), *there.buffers())} == {"cuda"}
    for key, tensor in there.state_dict().items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor.cpu(), theirs[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_on_the_gpu(name: str, tmp_path: Path) -> None:
    original = tiny_model(name)
    original.save_pretrained(tmp_path)
    model = moetor.MoEForCausalLM.from_pretrained(str(tmp_path), device="cuda", verify="all")
    inputs = {key: value.cuda() for key, value in tiny_inputs(name, original).items()}
    ours = logits_of(name, model, inputs)
    theirs = logits_of(name, original.cuda(), inputs)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


CHILD = """
import sys, torch, moetor
square = torch.zeros(64, 64, device="cuda")
square @ square
before = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
model = moetor.MoEForCausalLM.from_pretrained(sys.argv[1], device="cuda", verify="off")
held = before + sum(p.nbytes for p in model.parameters())
above = torch.cuda.max_memory_allocated() - held
print(above / model.model.layers[1].mlp.experts.down_proj.nbytes)
"""


def test_no_second_copy_on_the_gpu(tmp_path: Path) -> None:
    """Above the model: less than two thirds of a layer's experts, in parts of a down product.

    At its first product, which here is the trial of a router, torch allocates a workspace for
    cuBLAS and keeps it: 32 MiB on compute capability 9.0, four down products of 32 experts of
    256 x 256. So a product comes before the count, and a down product is as large as that
    workspace, should another library or stream want one too.
    """
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 128}
    tiny_model("qwen3_moe", settings=sizes).save_pretrained(tmp_path)
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout.split()[-1]) < 2
