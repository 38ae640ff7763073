"""`moetor bench latency` and `throughput`: on a random model; their arithmetic without a clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moetor
from moetor.bench import ceilings
from moetor.bench.generation import (
    StepTimes,
    TextBackend,
    Workload,
    decode_bytes,
    host_decode_bytes,
    measure_latency,
    measure_throughput,
)
from moetor.bench.generation_peers import GenerateBackend
from moetor.cli.main import main
from moetor.errors import KernelRefusedError, MoetorError, UnsupportedError
from moetor.huggingface import dummy
from moetor.huggingface.dummy import CONFIGS, dummy_model
from moetor.tools.tiny.models import tiny_config, tiny_model

WORK = Workload(input_length=5, output_length=3, batch_size=2, prompts=2, vocabulary=11, seed=1)


class Fake(TextBackend):
    """Takes the seconds that it is told, run by run."""

    def __init__(self, name: str, runs: list[StepTimes], log: list[str]) -> None:
        self.name, self.runs, self.log = name, runs, log
        self.seen: list[Tensor] = []

    def generate(self, prompts_BS: Tensor, new_tokens: int) -> StepTimes:
        self.log.append(self.name)
        self.seen.append(prompts_BS)
        return self.runs.pop(0)

    def generate_all(self, prompts_NS: Tensor, new_tokens: int, batch_size: int) -> float:
        return self.generate(prompts_NS, new_tokens).total


def runs(*firsts: float) -> list[StepTimes]:
    return [StepTimes(first=first, later=(first / 10, first / 5)) for first in firsts]


def test_latency_is_the_median_of_turns() -> None:
    log: list[str] = []
    backends = [Fake("a", runs(9, 9, 3, 1, 2), log), Fake("b", runs(8, 8, 4, 6, 5), log)]
    first, second = measure_latency(backends, WORK, 3)
    assert log == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert (first.first, second.first) == (2, 5)
    assert first.per_token == pytest.approx(0.3)
    assert first.warm_up == pytest.approx(9 + 0.9 + 1.8)
    assert first.output_rate == pytest.approx(2 * 3 / (2 + 0.2 + 0.4))
    assert all(torch.equal(prompts, backends[0].seen[0]) for prompts in backends[1].seen)
    assert backends[0].seen[0].shape == (2, 5)
    assert backends[0].seen[0].max() < 11


def test_throughput_counts_every_prompt() -> None:
    work = Workload(input_length=5, output_length=3, batch_size=2, prompts=7, vocabulary=11, seed=1)
    (row,) = measure_throughput([Fake("a", runs(100, 10, 20, 30), [])], work, 3)
    assert row.total == pytest.approx(20 * 1.3)
    assert row.output_rate == pytest.approx(21 / row.total)
    assert row.total_rate == pytest.approx(56 / row.total)


def test_one_generated_token_has_no_time_between_tokens() -> None:
    fake = Fake("a", [StepTimes(first=1.0, later=())] * 3, [])
    (row,) = measure_latency([fake], WORK, 1)
    assert row.per_token is None


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generate_makes_exactly_the_tokens_asked_for(cache: str) -> None:
    model = tiny_model("qwen3_moe")
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    times = GenerateBackend("x", model, cache=cache).generate(WORK.draw(), 4)
    assert len(times.later) == 3
    assert min(times.first, *times.later) > 0
    assert GenerateBackend("x", model).generate_all(WORK.draw(), 2, batch_size=1) > 0


def test_an_early_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    monkeypatch.setattr(
        model, "generate", lambda streamer, **_: [streamer.put(None) for _ in range(3)]
    )
    with pytest.raises(MoetorError, match="asked for 4 tokens and made 2"):
        GenerateBackend("x", model).generate(WORK.draw(), 4)


def test_bytes_of_a_step() -> None:
    model = tiny_model("qwen3_moe")
    total = sum(parameter.nbytes for parameter in model.parameters())
    moetor.fuse(model)
    config = model.config
    assert not config.tie_word_embeddings
    embedding = model.get_input_embeddings().weight.nbytes
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 4
    layers = sum(isinstance(module, moetor.MoELayer) for module in model.modules())
    unmet = 1 - config.num_experts_per_tok / config.num_experts
    for batch in (1, 3):
        left = layers * config.num_experts * expert * unmet**batch
        assert decode_bytes(model, batch) == pytest.approx(total - embedding - left)
        assert host_decode_bytes(model, batch) == 0


def test_bytes_of_a_step_with_experts_in_host_memory() -> None:
    plain, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    moetor.fuse(plain)
    beside = moetor.OffloadConfig(cpu_experts=1, cache_experts=2, accelerator="cpu")
    try:
        moetor.fuse(model, cpu_experts=beside)
    except KernelRefusedError as refused:
        pytest.skip(str(refused))
    config = model.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 4
    met = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** 3
    on_host = met * (config.num_experts - 2) * expert
    assert host_decode_bytes(model, 3) == pytest.approx(on_host)
    assert decode_bytes(model, 3) == pytest.approx(decode_bytes(plain, 3) - on_host)


def test_the_built_in_configuration_is_qwen3_30b_a3b() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3-30b-a3b"](), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 30_532_122_624


def test_dummy_weights_are_random_and_repeatable() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("qwen3_moe")
    made = [
        dummy_model(config, AutoModelForCausalLM, torch.bfloat16, torch.device("cpu"), seed)
        for seed in (0, 0, 1)
    ]
    for one, same, other in zip(*(model.named_parameters() for model in made), strict=True):
        assert one[1].dtype == torch.bfloat16
        assert torch.equal(one[1], same[1])
        if one[1].dim() > 1:
            assert one[1].float().std() > 0
            assert not torch.equal(one[1], other[1])
    assert not made[0].training


# --- the commands --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration without weights."""
    tiny_config("qwen3_moe").save_pretrained(tmp_path / "model")
    made_up = ceilings.Ceilings(
        read_bytes_per_s=1e9, read_method="made up", gemm_flops_per_s={"float32": 1e9}, gemm_size=8
    )
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, dtype: made_up)
    return str(tmp_path / "model")


SMALL = ["--load-format", "dummy", "--input-len", "6", "--output-len", "3", "--rounds", "1"]


def record_of(folder: str, command: str, *flags: str) -> dict[str, Any]:
    path = Path(folder) / "out.json"
    assert main(["bench", command, folder, *SMALL, *flags, "--json", str(path)]) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    assert {"command", "git", "versions", "hardware", "settings", "fusion"} <= set(record)
    assert record["peak_host_bytes"] > 2**20
    return record


def test_latency_with_a_peer(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(folder, "latency", "--batch-size", "1,2", "--peer", "transformers")
    names = [(row["backend"], row["workload"]["batch_size"]) for row in record["rows"]]
    assert names == [("moetor", 1), ("transformers", 1), ("moetor", 2), ("transformers", 2)]
    for row in record["rows"]:
        assert row["first"] > 0
        assert row["per_token"] > 0
        assert row["floor_per_token"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["backend", "batch", "in", "out"]
    assert any(line.startswith("kernels: ") for line in lines)


def test_latency_beside_transformers_continuous_batching(folder: str) -> None:
    record = record_of(folder, "latency", "--batch-size", "1,2", "--peer", "continuous")
    rows = [row for row in record["rows"] if row["backend"] == "transformers continuous"]
    assert [row["workload"]["batch_size"] for row in rows] == [1, 2]
    assert all(row["first"] > 0 and row["per_token"] > 0 for row in rows)


def test_throughput(folder: str) -> None:
    record = record_of(folder, "throughput", "--num-prompts", "3", "--batch-size", "2")
    (row,) = record["rows"]
    assert row["output_tokens_per_second"] == pytest.approx(9 / row["total"])
    assert row["tokens_per_second"] == pytest.approx(27 / row["total"])


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["latency", "qwen3-30b-a3b"], 2, "--load-format dummy"),
        (["latency", "--batch-size", "0"], 2, "--batch-size"),
        (["latency", "--input-len", "0"], 2, "--input-len 0"),
        (["latency", "--output-len", "100000"], 2, "attend to"),
        (["latency", "--json", "no/such/folder/x.json"], 2, "no folder"),
        (["throughput", "--num-prompts", "0"], 2, "--num-prompts 0"),
        (["throughput", "--backend", "vllm"], 2, "generate"),
        (["throughput", "--rounds", "0"], 2, "--rounds 0"),
        (["latency", "./no/such"], 1, "no/such"),
        (["latency", "--layers", "0"], 2, "--layers 0"),
        (["latency", "--layers", "2"], 2, "qwen3-30b-a3b"),
    ],
)
def test_bad_usage(
    arguments: list[str], status: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert word in err


def test_the_machine_is_measured_before_the_model_takes_its_memory(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(device: str, dtype: torch.dtype) -> None:
        raise UnsupportedError("too little memory to read from")

    monkeypatch.setattr(ceilings, "measure_ceilings", full)
    monkeypatch.setattr(dummy, "dummy_model", lambda *_: pytest.fail("a model was made first"))
    assert main(["bench", "latency", folder, *SMALL]) == 1
    assert "too little memory" in capsys.readouterr().err


def test_fewer_layers_of_a_built_in_configuration(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, "tiny", lambda: tiny_config("qwen3_moe"))
    path = Path(folder) / "out.json"
    flags = [*SMALL, "--layers", "2", "--json", str(path)]
    assert main(["bench", "latency", "tiny", *flags]) == 0
    assert tiny_config("qwen3_moe").num_hidden_layers == 3  # the first one is dense
    assert len(json.loads(path.read_text())["fusion"]["blocks"]) == 1
