"""What the HTTP layer costs: tokens a second of the engine alone and behind the server, in turns.

`python benchmarks/server_overhead.py --streams 32` starts a server on a free port of loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time

from moetor import LLM, SamplingParams
from moetor.bench.serving import ServingLoad, measure_serving, summary


def main() -> None:
    """Measures and prints a line for each round and one for the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    command = [sys.executable, "-m", "moetor", "serve", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = next(line.rsplit(" on ", 1)[1].strip() for line in server.stderr if " on http" in line)
    llm = LLM("demo", record_expert_load=True)
    params = SamplingParams(temperature=0, max_tokens=asked.tokens, ignore_eos=True)
    rates: list[tuple[float, float]] = []
    for number in range(asked.rounds + 1):
        draw = random.Random(number)
        prompts = [[draw.randrange(1024) for _ in range(16)] for _ in range(asked.streams)]
        begin = time.perf_counter()
        llm.generate(prompts, params, progress=False)
        alone = asked.streams * asked.tokens / (time.perf_counter() - begin)
        load = ServingLoad(
            url=url,
            model="demo",
            num_prompts=asked.streams,
            input_len=16,
            output_len=asked.tokens,
            request_rate=float("inf"),
            max_concurrency=None,
            vocab_size=1024,
            seed=number,
            api_key=None,
        )
        result = asyncio.run(measure_serving(load, lambda *_: None))
        served = summary(result)["output_throughput"]
        if number:  # the first round warms both up
            rates.append((alone, served))
            print(f"engine {alone:.0f} tokens/s, server {served:.0f}, {served / alone:.3f}")
    ratio = statistics.median(served / alone for alone, served in rates)
    print(f"{asked.streams} streams: the server has {ratio:.3f} of the engine's tokens/s")
    server.terminate()


if __name__ == "__main__":
    main()
