"""How much memory a load takes above the finished model, by the kernel's own record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

STATUS = Path("/proc/self/status")
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 4, 32, 512, 192
LAYER_BYTES = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 4
ALLOWED_LAYERS = 1.3

# Prints the memory when the model is there, the highest so far, and before; in bytes.
CHILD = """
import json, sys
import torch
import moetor, moetor.huggingface.model_classes
from transformers import Qwen3MoeForCausalLM

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

how, folder = sys.argv[1:]
Qwen3MoeForCausalLM  # its module is imported
before = memory("VmRSS")
if how == "streamed":
    model = moetor.MoEForCausalLM.from_pretrained(folder)
else:
    model = Qwen3MoeForCausalLM.from_pretrained(folder)
held, peak = memory("VmRSS"), memory("VmHWM")
checked = sum(int(p.detach().view(torch.int32).sum()) for p in model.parameters())
print(json.dumps({"before": before, "held": held, "peak": peak, "sum": checked}))
"""

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's own record")


def checkpoint(kind: str, made: Path) -> Path:
    """A model of 150 MB, nearly all of it experts, one by one or packed."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(made)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    drawn = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    tensors = {}
    for name, parameter in model.state_dict().items():
        value = drawn.flatten()[: parameter.numel()].reshape(parameter.shape)
        if kind == "packed" or "experts" not in name:
            tensors[name] = value.clone()
            continue
        parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
        prefix = name.rpartition(".")[0]
        for number in range(EXPERTS):
            for part, piece in zip(parts, value[number].chunk(len(parts)), strict=True):
                tensors[f"{prefix}.{number}.{part}.weight"] = piece.clone()
    save_file(tensors, made / "model.safetensors")
    return made


def load(how: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, how, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def above(measured: dict[str, float]) -> float:
    """Layers of experts between the finished model and the highest memory."""
    return (measured["peak"] - measured["held"]) / LAYER_BYTES


def grown(measured: dict[str, float]) -> float:
    """Layers of experts by which the process is larger with the model."""
    return (measured["held"] - measured["before"]) / LAYER_BYTES


def test_packed_checkpoint(tmp_path: Path) -> None:
    streamed = load("streamed", checkpoint("packed", tmp_path))
    print(f"peak {above(streamed):.2f} layers above the model of {LAYERS}")
    assert above(streamed) < ALLOWED_LAYERS
    assert LAYERS < grown(streamed) < LAYERS + ALLOWED_LAYERS


def test_checkpoint_of_single_experts(tmp_path: Path) -> None:
    """And Transformers, which keeps the file mapped beside what it packs: the figures show it."""
    folder = checkpoint("per-expert", tmp_path)
    streamed, plain = load("streamed", folder), load("plain", folder)
    print(f"peak {above(streamed):.2f} layers above the model of {LAYERS}")
    assert above(streamed) < ALLOWED_LAYERS
    assert LAYERS < grown(streamed) < LAYERS + ALLOWED_LAYERS
    assert grown(plain) > LAYERS + ALLOWED_LAYERS
    assert plain["sum"] == streamed["sum"]
