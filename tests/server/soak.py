"""Mixed load on a server: good requests, aborts, disconnects, bad requests, slow readers.

`python tests/server/soak.py --connections 500 --seconds 120` starts a server and prints a report.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from server.server_process import ServerProcess, resident_mib

PROMPTS = tuple(f"{name}:\nI say" for name in ("ROMEO", "JULIET", "KING HENRY", "First Citizen"))
TOKENS = 16
BAD: tuple[bytes, ...] = (
    b"",
    b"{",
    b'{"prompt": "\xff"}',
    b'{"prompt": "x", "n": -1}',
    b'{"prompt": "x", "max_tokens": 100000}',
    b'{"prompt": ' + b"[" * 5000,
    b'{"prompt": "x", "no_such_field": 1}',
)
KINDS = ("stream", "whole", "abort", "disconnect", "bad", "slow")


@dataclass
class Soak:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


def expected_texts() -> dict[str, str]:
    """The engine's own greedy answers."""
    from moetor import LLM, SamplingParams

    llm = LLM("demo", dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    outputs = llm.generate(list(PROMPTS), params, progress=False)
    return {one.prompt or "": one.outputs[0].text for one in outputs}


async def soak(
    server: ServerProcess,
    texts: dict[str, str],
    *,
    connections: int,
    seconds: float,
    key: str = "",
    seed: int = 0,
) -> Soak:
    """Runs the load; the result's `wrong` is empty where the server kept its word."""
    found = Soak()
    end = time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=max(60.0, 2 * seconds))
    async with aiohttp.ClientSession(
        server.url, headers=headers, connector=connector, timeout=timeout
    ) as session:
        workers = [
            _worker(session, texts, random.Random(seed + number), end, found)
            for number in range(connections)
        ]
        watch = asyncio.create_task(_watch(server, found))
        await asyncio.gather(*workers)
        watch.cancel()
    server.idle()
    return found


async def _watch(server: ServerProcess, found: Soak) -> None:
    while True:
        found.memory_mib.append(resident_mib(server.process.pid))
        await asyncio.sleep(0.5)


async def _worker(
    session: aiohttp.ClientSession,
    texts: dict[str, str],
    draw: random.Random,
    end: float,
    found: Soak,
) -> None:
    while time.monotonic() < end:
        kind = draw.choice(KINDS)
        try:
            await _one(session, kind, texts, draw, found)
        except (TimeoutError, aiohttp.ClientError) as error:
            found.wrong.append(f"{kind}: {type(error).__name__}: {error}")


async def _one(
    session: aiohttp.ClientSession,
    kind: str,
    texts: dict[str, str],
    draw: random.Random,
    found: Soak,
) -> None:
    if kind == "bad":
        async with session.post("/v1/completions", data=draw.choice(BAD)) as answer:
            _expect(found, kind, answer.status == 400, await answer.text())
        return
    prompt = draw.choice(PROMPTS)
    streamed = kind in ("stream", "abort", "slow")
    body: dict[str, Any] = {"prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
    body["stream"] = streamed
    if kind in ("abort", "disconnect"):
        body |= {"max_tokens": 500, "ignore_eos": True}
    if kind == "disconnect":
        try:
            async with asyncio.timeout(draw.random() / 4):
                async with session.post("/v1/completions", json=body) as answer:
                    await answer.read()
        except TimeoutError:
            pass
        found.counts[kind] += 1
        return
    async with session.post("/v1/completions", json=body) as answer:
        if answer.status == 429:
            found.counts["refused"] += 1
            await asyncio.sleep(0.1)
            return
        if not streamed:
            text = (await answer.json())["choices"][0]["text"]
        else:
            text = await _read(answer, kind)
            if kind == "abort":
                answer.close()
                found.counts[kind] += 1
                return
    _expect(found, kind, text == texts[prompt], f"{prompt!r} gave {text!r}")


async def _read(answer: aiohttp.ClientResponse, kind: str) -> str:
    text, lines = "", 0
    async for line in answer.content:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            text += chunk["choices"][0]["text"] if "choices" in chunk else str(chunk)
            lines += 1
        if kind == "abort" and lines == 3:
            break
        if kind == "slow":
            await asyncio.sleep(0.05)
    return text


def _expect(found: Soak, kind: str, good: bool, what: str) -> None:
    found.counts[kind] += 1
    if not good:
        found.wrong.append(f"{kind}: {what[:200]}")


def main() -> int:
    """Runs it and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120)
    asked = parser.parse_args()
    texts = expected_texts()
    server = ServerProcess("--dtype", "float32", "--max-num-seqs", "64")
    found = asyncio.run(soak(server, texts, connections=asked.connections, seconds=asked.seconds))
    warm = found.memory_mib[len(found.memory_mib) // 4]
    print(f"{asked.connections} connections, {asked.seconds:g} s: {dict(found.counts)}")
    print(f"wrong: {len(found.wrong)} {found.wrong[:3]}")
    print(f"memory after a quarter {warm:.0f} MiB, at the end {found.memory_mib[-1]:.0f} MiB")
    print(f"exit status {server.stop()}")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
