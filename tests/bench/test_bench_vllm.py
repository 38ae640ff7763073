"""vLLM as a peer of `moetor bench latency` and `throughput`: what it is called with, by a module of
its name that writes its calls down. vLLM itself is not run here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moetor.bench import ceilings, generation_peers
from moetor.cli.main import main
from moetor.tools.tiny import tiny_config

FAKE = """
import json, os, types
now = 0.0
calls = []
class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        self.max_tokens = max_tokens
        calls.append(["params", temperature, max_tokens, ignore_eos, detokenize])
class LLM:
    def __init__(self, **given):
        with open(os.path.join(given["model"], "config.json")) as file:
            calls.append(["config", json.load(file)["architectures"]])
        calls.append(["LLM", given])
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        calls.append(["generate", prompts, use_tqdm])
        global now
        now += sampling_params.max_tokens  # a second for each token
        ids = [1] * (sampling_params.max_tokens - SHORT)
        text = types.SimpleNamespace(token_ids=ids)
        return [types.SimpleNamespace(outputs=[text]) for _ in prompts]
"""
SMALL = ["--load-format", "dummy", "--input-len", "6", "--output-len", "3", "--rounds", "1"]
PEER = ["--peer", "vllm", "--gpu-memory-utilization", "0.4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration without weights."""
    tiny_config("qwen3_moe").save_pretrained(tmp_path / "model")
    made_up = ceilings.Ceilings(
        read_bytes_per_s=1e9, read_method="made up", gemm_flops_per_s={"float32": 1e9}, gemm_size=8
    )
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, dtype: made_up)
    return str(tmp_path / "model")


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int = 0) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "vllm.py").write_text(f"SHORT = {short}\n{FAKE}")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    clock = SimpleNamespace(perf_counter=lambda: sys.modules["vllm"].now)
    monkeypatch.setattr(generation_peers, "time", clock)


def calls() -> list[Any]:
    made: list[Any] = sys.modules["vllm"].calls
    return made


def test_latency(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    out = tmp_path / "out.json"
    flags = ["--batch-size", "2", "--dtype", "float32", *PEER, "--json", str(out)]
    assert main(["bench", "latency", folder, *SMALL, *flags]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["moetor", "vllm"]
    assert (rows[1]["first"], rows[1]["per_token"], rows[1]["total"]) == (1.0, 1.0, 3.0)
    architecture, started, *rest = calls()
    assert architecture == ["config", ["Qwen3MoeForCausalLM"]]
    given = started[1]
    assert Path(given.pop("model")).name.startswith("moetor-vllm-")
    assert given == {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "load_format": "dummy",
        "revision": None,
        "trust_remote_code": False,
        "max_model_len": 9,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.4,
        "enable_prefix_caching": False,
        "enforce_eager": False,
        "seed": 0,
    }
    assert len(rest) == 3 * 4  # two to warm up and one round: each one token, then all of them
    one, short, three, whole = rest[:4]
    assert one == ["params", 0.0, 1, True, False]
    assert three == ["params", 0.0, 3, True, False]
    assert short == whole
    assert [len(prompt["prompt_token_ids"]) for prompt in whole[1]] == [6, 6]
    assert whole[2] is False


def test_throughput_is_one_call(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    flags = ["--num-prompts", "3", "--batch-size", "2", *PEER]
    assert main(["bench", "throughput", folder, *SMALL, *flags]) == 0
    generated = [call for call in calls() if call[0] == "generate"]
    assert [len(call[1]) for call in generated] == [3, 3]


def test_a_short_text_is_an_error(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(tmp_path, monkeypatch, short=1)
    assert main(["bench", "latency", folder, *SMALL, *PEER]) == 1
    assert "vLLM was asked for 1 tokens and made [0]" in capsys.readouterr().err


def test_refused(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, before a model is loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "latency", folder, *SMALL, *PEER]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install vllm" in line
    monkeypatch.undo()
    install(tmp_path, monkeypatch)
    assert main(["bench", "latency", folder, *SMALL, "--peer", "vllm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "at most 0.5" in line
