"""Checks a server with litellm and lm_eval, which the tests do not install.

`pip install litellm "lm_eval[api,hf]"`, then `python scripts/check_server_clients.py`. It starts a
server with the demo model, and compares lm_eval's log-probabilities through it with those that
lm_eval computes on the same model itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moetor.demo import model_path

ROWS = (
    ("ROMEO:\nI", (" am", " stone", " Tuesday"), 0),
    ("To be, or not to", (" be", " see", " fly"), 0),
    ("My lord, I", (" pray", " xylophone", " have"), 0),
    ("The king is", (" dead", " computer", " come"), 2),
)
TASK = """
task: local_demo
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""
TOLERANCE = 1e-3


def check_litellm(url: str) -> None:
    import litellm

    asked: dict[str, Any] = {"model": "openai/demo", "api_base": f"{url}/v1", "api_key": "x"}
    asked |= {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    whole = litellm.completion(**asked, max_tokens=8).choices[0].message.content
    stream = litellm.completion(**asked, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    try:
        litellm.completion(**asked, max_tokens=9999)
    except litellm.exceptions.ContextWindowExceededError:
        print("litellm: whole, streamed and refused as it should be")
    else:
        raise AssertionError("a request that is too long was answered")


def log_likelihoods(folder: Path, name: str, *words: str) -> list[float]:
    """What lm_eval finds for every choice of every row."""
    out = folder / name
    command = [sys.executable, "-m", "lm_eval", *words, "--tasks", "local_demo"]
    command += ["--include_path", str(folder), "--output_path", str(out), "--log_samples"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (samples,) = out.rglob("samples*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [float(found[0]) for row in rows for found in row["filtered_resps"]]


def check_lm_eval(url: str, folder: Path) -> None:
    data = folder / "data.jsonl"
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in ROWS]
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "local_demo.yaml").write_text(TASK.format(data=data))
    model = str(model_path())
    served = f"model=demo,base_url={url}/v1/completions,tokenizer={model},tokenized_requests=True"
    through = log_likelihoods(
        folder, "served", "--model", "local-completions", "--model_args", served
    )
    own = f"pretrained={model},dtype=float32"
    theirs = log_likelihoods(folder, "own", "--model", "hf", "--model_args", own, "--device", "cpu")
    assert len(through) == len(theirs) == sum(len(choices) for _, choices, _ in ROWS)
    worst = max(abs(a - b) for a, b in zip(through, theirs, strict=True))
    assert worst < TOLERANCE, (through, theirs)
    print(f"lm_eval: {len(theirs)} log-likelihoods, largest difference {worst:.1e}")


def main() -> None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    command = [sys.executable, "-m", "moetor", "serve", "--port", "0", "--dtype", "float32"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = next(
            line.rsplit(" on ", 1)[1].strip() for line in server.stderr if " on http" in line
        )
        check_litellm(url)
        with tempfile.TemporaryDirectory() as folder:
            check_lm_eval(url, Path(folder))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
