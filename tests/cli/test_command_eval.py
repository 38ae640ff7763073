"""`moetor eval`: lm_eval's figures against those of the plain model, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetor.cli.main import main
from moetor.demo import model_path

Captured = pytest.CaptureFixture[str]

QUESTIONS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("ROMEO:\nI", (" am", " stone", " Tuesday"), 0),
    ("To be, or not to", (" be", " see", " fly"), 0),
    ("My lord, I", (" pray", " xylophone", " have"), 0),
    ("The king is", (" dead", " computer", " come"), 2),
)
TEXTS = ("Who is there?", "Good morrow, cousin.\nIs the day so young?", "But new struck nine.")
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""


def write_tasks(folder: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "local_choice": [{"text": t, "choices": c, "label": n} for t, c, n in QUESTIONS],
        "local_text": [{"text": text} for text in TEXTS],
    }
    for name, body in (("local_choice", CHOICE), ("local_text", ROLLING)):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows[name])))
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + body)


def plain_figures() -> tuple[float, float]:
    """Accuracy, and perplexity of a byte, by Transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path()))
    model = AutoModelForCausalLM.from_pretrained(
        str(model_path()), dtype=torch.float64, experts_implementation="eager"
    )

    def likelihood(before: list[int], after: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(after) - 1)
        return sum(float(logits[place, token]) for place, token in zip(places, after, strict=True))

    right = 0
    for text, choices, label in QUESTIONS:
        ids = tokenizer(text)["input_ids"]
        found = []
        for choice in choices:
            both = tokenizer(text + choice)["input_ids"]
            found.append(likelihood(ids, both[len(ids) :]))
        right += max(range(len(choices)), key=found.__getitem__) == label
    total = sum(likelihood([tokenizer.eos_token_id], tokenizer(t)["input_ids"]) for t in TEXTS)
    return right / len(QUESTIONS), math.exp(-total / sum(len(t.encode()) for t in TEXTS))


def test_the_figures_are_those_of_the_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    write_tasks(tmp_path)
    command = [sys.executable, "-m", "moetor", "eval", "local_choice", "local_text"]
    command += ["--include-path", str(tmp_path), "--dtype", "float32", "--json"]
    command += ["--output", str(tmp_path / "out.json")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    accuracy, perplexity = plain_figures()
    assert told["results"]["local_choice"]["acc,none"] == accuracy
    found = told["results"]["local_text"]["byte_perplexity,none"]
    assert found == pytest.approx(perplexity, rel=1e-4)
    assert told["n-samples"]["local_choice"]["effective"] == len(QUESTIONS)
    assert {block["level"] for block in told["fusion"]["blocks"]} == {"block"}
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"] == told["results"]
    assert len(written["samples"]["local_choice"]) == len(QUESTIONS)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "TASK"),
        ("a --limit 0", "--limit 0"),
        ("a --batch-size 0", "--batch-size 0"),
        ("a --num-fewshot -1", "--num-fewshot -1"),
        ("a --output /no/such/folder/x.json", "/no/such/folder"),
        ("a --level none --kernel torch", "--level none"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(line: str, told: str, capsys: Captured) -> None:
    assert main(["eval", *line.split()]) == 2
    assert told in capsys.readouterr().err


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "arc_easy"]) == 2
    assert "moetor[eval]" in capsys.readouterr().err


def test_a_folder_that_is_none(capsys: Captured) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    assert main(["eval", "arc_easy", "--include-path", "/no/such/folder"]) == 2
    assert "is not a folder" in capsys.readouterr().err
