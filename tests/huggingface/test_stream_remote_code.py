"""Checkpoints with Python code of their own: run when that was said, and streamed as any other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moetor
from moetor.errors import CheckpointError
from moetor.huggingface.loading import load_model

CONFIG = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own_moe"

    def __init__(self, vocab_size=64, hidden_size=32, num_experts=6, width=16, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_experts, self.width = num_experts, width
        super().__init__(**kwargs)
"""
# Experts as a list of modules, a Linear as gate.
MODEL = """
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_own import OwnConfig

class OwnExpert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.width, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.width, bias=False)
        self.w2 = nn.Linear(config.width, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

class OwnMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(OwnExpert(config) for _ in range(config.num_experts))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = (ids == number).nonzero(as_tuple=True)
            out[rows] += expert(x[rows]) * weights[rows, slots, None]
        return out.reshape(hidden_states.shape)

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.moe = OwnMoE(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        hidden = self.embed(input_ids)
        return CausalLMOutput(logits=self.head(hidden + self.moe(hidden)))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkpoint with both files, and Transformers' cache of such code put aside."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    made = tmp_path / "own"
    made.mkdir()
    (made / "configuration_own.py").write_text(CONFIG)
    (made / "modeling_own.py").write_text(MODEL)
    (made / "config.json").write_text(
        '{"model_type": "own_moe", "architectures": ["OwnForCausalLM"], "dtype": "float32",'
        ' "auto_map": {"AutoConfig": "configuration_own.OwnConfig",'
        ' "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}'
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(64, 32, generator=generator),
        "head.weight": torch.randn(64, 32, generator=generator),
        "moe.gate.weight": torch.randn(6, 32, generator=generator),
    }
    for number in range(6):
        for part, shape in (("w1", (16, 32)), ("w3", (16, 32)), ("w2", (32, 16))):
            name = f"moe.experts.{number}.{part}.weight"
            tensors[name] = torch.randn(shape, generator=generator) * 0.2
    save_file(tensors, made / "model.safetensors")
    yield made
    for name in [name for name in sys.modules if name.startswith("transformers_modules.own")]:
        del sys.modules[name]


def test_not_run_unasked(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    (folder / "configuration_own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        moetor.MoEForCausalLM.from_pretrained(str(folder))


def test_streamed_when_asked(folder: Path) -> None:
    model = load_model(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    stored = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_fused_when_asked(folder: Path) -> None:
    tokens = torch.arange(40)[None]
    before = load_model(str(folder), trust_remote_code=True)(tokens).logits
    model = moetor.MoEForCausalLM.from_pretrained(str(folder), trust_remote_code=True)
    assert [block.level for block in model.fusion_report.blocks] == ["block"]
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)


def test_a_missing_expert_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["moe.experts.4.w3.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor.*moe\.experts\.4\.w3\.weight"):
        moetor.MoEForCausalLM.from_pretrained(str(folder), trust_remote_code=True)
