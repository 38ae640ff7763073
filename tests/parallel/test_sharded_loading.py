"""Checkpoints loaded onto two ranks: each reads its own bytes, and has what spreading gives."""

from __future__ import annotations

from pathlib import Path

import pytest

import moetor
from moetor.errors import ParallelError, UnsupportedError
from moetor.huggingface.quantized_writing import quantize_checkpoint
from moetor.tools.tiny import tiny_model
from parallel.families import MODES
from parallel.loading import load_both, load_quantised, refuse_grid
from parallel.pool import Pool

# Experts one by one under two namings, packed, transposed and interleaved with biases, ungated in
# a latent width, behind a vision tower, and with rows for experts without weights.
CASES = [
    ("mixtral", "tp"),
    ("mixtral", "dp_ep"),
    ("qwen2_moe", "tp_ep"),
    ("gpt_oss", "tp"),
    ("gpt_oss", "tp_ep"),
    ("deepseek_v3", "sp"),
    ("nemotron_h", "tp"),
    ("qwen3_vl_moe", "tp"),
    ("longcat_flash", "tp_ep"),
    ("dbrx", "tp"),
]
MULTIMODAL = ("qwen3_vl_moe",)
# Experts apart are packed once all are there.
READ_WHOLE = ("dbrx",)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_rank_reads_what_it_keeps(name: str, mode: str, two: Pool, tmp_path: Path) -> None:
    try:
        model = tiny_model(name)
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    entrance = "MoEForMultimodalLM" if name in MULTIMODAL else "MoEForCausalLM"
    answers = two.run(load_both, str(tmp_path), name, mode, entrance)
    for told in answers:
        assert told.differing == []
        assert told.equal_logits
        assert told.levels == {"block"}
        assert told.ranks == 2
        own = told.whole if name in READ_WHOLE else told.held
        assert told.read == own, "no more than the rank's own bytes"
        assert told.held < told.whole
    assert sum(told.held for told in answers) >= answers[0].whole


def other_experts(rank: int, folder: str) -> None:
    """In a worker: a checkpoint of which each rank has another revision."""
    moetor.MoEForCausalLM.from_pretrained(f"{folder}/{rank}", parallel=MODES["tp_ep"])


def test_other_experts_on_a_rank_are_found_by_all(two: Pool, tmp_path: Path) -> None:
    """No rank has both, and the rest of the model is the same."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "0")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data.mul_(1.25)
    model.save_pretrained(tmp_path / "1")
    for fine, answer in two.try_all(other_experts, str(tmp_path)):
        assert not fine
        assert answer[0] is ParallelError
        assert "disagree on the model's files" in answer[1]
        assert "the model's weights" not in answer[1]


def test_refused_before_anything_is_read(two: Pool, tmp_path: Path) -> None:
    """The folder does not even exist."""
    for text in two.run(refuse_grid, str(tmp_path / "nowhere")):
        assert text.startswith("ConfigError: tensor_parallel_size=4")


@pytest.mark.parametrize("quantization", ["int8_w8a16", "int4", "mxfp4"])
@pytest.mark.parametrize("mode", ["tp", "tp_ep", "dp_ep"])
def test_a_rank_quantises_what_it_reads(quantization: str, mode: str, two: Pool) -> None:
    for error, percent in two.run(load_quantised, "demo", quantization, mode):
        # A slice's rows have scales of their own where no group ends.
        assert error <= (0.1 if (quantization, mode) == ("int8_w8a16", "tp") else 1e-5)
        assert 45 <= percent <= 55


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("mode", ["tp", "tp_ep"])
def test_a_rank_keeps_its_part_of_stored_codes(
    name: str, mode: str, two: Pool, tmp_path: Path
) -> None:
    quantize_checkpoint("demo", tmp_path / "out", name)
    for error, percent in two.run(load_quantised, str(tmp_path / "out"), None, mode):
        # Activations of int8 and fp8 are rounded, those of a slice by its own largest value.
        rounded = 0.1 if mode == "tp" else 0.01
        assert error <= (rounded if name in ("int8", "fp8") else 1e-5)
        assert 45 <= percent <= 55
