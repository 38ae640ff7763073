"""What `batch_invariant` costs on a CPU: tokens per second of the demo model with and without it.

`python benchmarks/batch_invariant.py [--dtype bfloat16] [--threads 1] [--rounds 9] [--json FILE]`
runs both engines in turns: one stream and eight streams of 64 tokens after prompts of 32, and one
prompt of 512 tokens. The table and the file have medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from moetor import LLM, SamplingParams
from moetor.bench.hardware import describe_run

TOKENS, PROMPT, LONG = 64, 32, 512
WORK = ("1 stream", "8 streams", "a prompt")


def tokens_per_second(llm: LLM, work: str) -> float:
    """Generated tokens, or the prompt's, over the time of one call."""
    if work == "a prompt":
        prompts, count = [[5 + i * i % 200 for i in range(LONG)]], 1
    else:
        streams, count = int(work.split()[0]), TOKENS
        prompts = [[5 + (7 * s + 3 * i) % 200 for i in range(PROMPT)] for s in range(streams)]
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, progress=False)
    seconds = time.perf_counter() - start
    return (LONG if count == 1 else count * len(prompts)) / seconds


def main() -> None:
    """Prints a table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"device": "cpu", "dtype": options.dtype, "max_num_seqs": 8}
    engines = {
        invariant: LLM("demo", batch_invariant=invariant, enable_prefix_caching=False, **settings)
        for invariant in (False, True)
    }
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.rounds + 1):  # the first is not counted
        for work in WORK:
            for invariant, llm in engines.items():
                found.setdefault((work, invariant), []).append(tokens_per_second(llm, work))
    rows = []
    for work in WORK:
        without, held = (statistics.median(found[work, one][1:]) for one in (False, True))
        rows.append({"work": work, "without": without, "batch_invariant": held})
        print(f"{work:10} {without:8.0f} {held:8.0f} tok/s, {without / held:.2f} times as long")
    if options.json is not None:
        made = describe_run("cpu", options.threads) | {
            "command": shlex.join(("python", *sys.argv)),
            "dtype": options.dtype,
            "tokens_per_second": rows,
        }
        options.json.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
