"""What the HTTP layer costs: tokens a second of the engine alone and behind the server, in turns.

Three turns of the same requests: `LLM.generate`, the server's engine without HTTP (an output for
every token, read in the server's process), and the same by HTTP. What the second lacks to the first
is the engine in a process of its own, which also lies elsewhere in memory; what the third lacks to
the second, which is the same two processes, is HTTP.

`python benchmarks/server_overhead.py --streams 32 --pin` gives the engine the first core and the
server and the client the second one; without `--pin` all share what there is. The client reads
bytes and looks for the ends of answers, no more; its time is told apart.

No two prompts have one length: requests come to a server one after the other, so that its texts
never have one length, and a step over texts of one length is quicker, whoever asked for it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetor.bench.hardware import describe_run

VOCABULARY, SHORTEST_PROMPT = 1024, 8
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
ALONE = """
import json, sys, time
from moetor import LLM, SamplingParams
llm = LLM("demo", record_expert_load=True)
for line in sys.stdin:
    prompts, tokens = json.loads(line)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    wall, cpu = time.perf_counter(), time.process_time()
    llm.generate(prompts, params, progress=False)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
"""


# `moetor serve`, and one path more: continues prompts without HTTP, and tells how long it took.
SERVED = """
import asyncio, sys, time
from moetor import SamplingParams
from moetor.cli.main import main
from moetor.server import run

make = run.create_app

def create_app(engine, config, model):
    app = make(engine, config, model)

    async def read(stream):
        async for output in stream:
            if output.error is not None:
                raise RuntimeError(output.error)

    @app.post("/streams")
    async def streams(asked: dict) -> float:
        begin = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
        made = [
            await engine.add_request(prompt, params, merge=True, delta=True)
            for prompt in asked["prompts"]
        ]
        await asyncio.gather(*map(read, made))
        return time.perf_counter() - begin

    return app

run.create_app = create_app
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One measurement of all, in seconds, and events a token."""

    alone: float
    alone_cpu: float
    streamed: float
    served: float
    engine_cpu: float
    server_cpu: float
    client_cpu: float
    events: float


def cpu_s(pid: int) -> float:
    """Seconds that a process's threads have run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def pin(pid: int, cores: Iterable[int]) -> None:
    """Moves every thread of a process to some cores."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


class Client:
    """Streams completions over bare sockets, all at once.

    Args:
        path: of the completions.
    """

    def __init__(self, url: str, path: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port, self._path = int(port), path

    def without_http(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds that the server's engine took for them without HTTP."""
        line = http.client.HTTPConnection(self._host, self._port)
        body = json.dumps({"prompts": prompts, "tokens": tokens})
        line.request("POST", "/streams", body, {"Content-Type": "application/json"})
        answer = line.getresponse()
        told = json.load(answer)
        line.close()
        if answer.status != 200:
            raise RuntimeError(f"the server's engine failed: {told}")
        return float(told)

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[int, int]:
        """Tokens that the server counted, and events."""
        selector = selectors.DefaultSelector()
        for prompt in prompts:
            fields = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
            if "chat" in self._path:
                text = " ".join(map(str, prompt))
                del fields["prompt"]
                fields["messages"] = [{"role": "user", "content": text}]
            fields |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
            body = json.dumps(fields).encode()
            line = socket.create_connection((self._host, self._port))
            head = f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: "
            head += f"{len(body)}\r\nContent-Type: application/json\r\n\r\n"
            line.sendall(head.encode() + body)
            line.setblocking(False)
            selector.register(line, selectors.EVENT_READ, [b""])
        left, events, counted = len(prompts), 0, 0
        while left:
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 16)
                if not data:
                    raise RuntimeError(f"the server hung up: {key.data[0]!r}")
                events += data.count(b"data: {")
                key.data[0] = key.data[0][-400:] + data
                if b"data: [DONE]" in key.data[0]:
                    usage = key.data[0].rpartition(b'"completion_tokens":')[2]
                    counted += int(usage.partition(b",")[0])
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    left -= 1
        return counted, events


def start(asked: argparse.Namespace) -> tuple[Any, Any, str, int]:
    """The server, the engine alone, the server's address, and the process of its engine."""
    command = [sys.executable, "-c", SERVED, "serve", "--port", "0"]
    server = subprocess.Popen([*command, *asked.flags], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = next(line.rsplit(" on ", 1)[1].strip() for line in server.stderr if " on http" in line)
    subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    engine = int(children[0])
    alone = subprocess.Popen(
        [sys.executable, "-c", ALONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return server, alone, url, engine


def measure(asked: argparse.Namespace) -> list[Round]:
    """All rounds; the first one warms up and is left out."""
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)  # of every process that starts now
    server, alone, url, engine = start(asked)
    client = Client(url, asked.path)
    rounds: list[Round] = []
    total = asked.streams * asked.tokens
    try:
        for number in range(asked.rounds + 1):
            if asked.pin and number == 1:  # all threads are there now
                pin(engine, asked.engine_cores)
                pin(alone.pid, asked.engine_cores)
                pin(server.pid, asked.server_cores)
                pin(os.getpid(), asked.server_cores)
                # It shares the server's core, and must not run between two of the server's writes,
                # as no client on another machine would.
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            draw = random.Random(number)
            prompts = [
                [draw.randrange(VOCABULARY) for _ in range(SHORTEST_PROMPT + stream)]
                for stream in range(asked.streams)
            ]
            alone.stdin.write(json.dumps([prompts, asked.tokens]) + "\n")
            alone.stdin.flush()
            wall, cpu = json.loads(alone.stdout.readline())
            streamed = client.without_http(prompts, asked.tokens)
            before = cpu_s(engine), cpu_s(server.pid), time.process_time(), time.perf_counter()
            counted, events = client.run(prompts, asked.tokens)
            after = cpu_s(engine), cpu_s(server.pid), time.process_time(), time.perf_counter()
            if counted != total:
                raise RuntimeError(f"{counted} tokens came, {total} were asked for")
            took = [end - begin for begin, end in zip(before, after, strict=True)]
            made = Round(
                alone=wall,
                alone_cpu=cpu,
                streamed=streamed,
                served=took[3],
                engine_cpu=took[0],
                server_cpu=took[1],
                client_cpu=took[2],
                events=events / total,
            )
            if number:
                rounds.append(made)
                print(
                    f"LLM {total / wall:.0f} tokens/s, process {total / streamed:.0f}, "
                    f"server {total / took[3]:.0f}: {wall / took[3]:.3f} of the LLM, "
                    f"{streamed / took[3]:.3f} of the process; "
                    f"CPU us a token: alone {1e6 * cpu / total:.0f}, "
                    f"engine {1e6 * took[0] / total:.0f}, server {1e6 * took[1] / total:.0f}, "
                    f"client {1e6 * took[2] / total:.0f}; {made.events:.2f} events a token"
                )
    finally:
        alone.kill()
        server.terminate()
        server.wait()
    return rounds


def main() -> None:
    """Measures and prints a line for each round and one for the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="of the engine's products")
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--engine-cores", type=int, nargs="+", default=[0])
    parser.add_argument("--server-cores", type=int, nargs="+", default=[1])
    parser.add_argument("--path", default="/v1/completions")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("flags", nargs="*", help="of moetor serve, behind --")
    asked = parser.parse_args()
    if asked.threads is None:
        asked.threads = len(asked.engine_cores) if asked.pin else os.cpu_count()
    rounds = measure(asked)
    total = asked.streams * asked.tokens

    def median(value: Any) -> float:
        return statistics.median(value(one) for one in rounds)

    figures = {
        "engine_tokens_s": median(lambda one: total / one.alone),
        "process_tokens_s": median(lambda one: total / one.streamed),
        "server_tokens_s": median(lambda one: total / one.served),
        "share": median(lambda one: one.alone / one.served),
        "share_of_process": median(lambda one: one.streamed / one.served),
        "cpu_us_per_token": {
            "engine_alone": median(lambda one: 1e6 * one.alone_cpu / total),
            "engine_behind_server": median(lambda one: 1e6 * one.engine_cpu / total),
            "server": median(lambda one: 1e6 * one.server_cpu / total),
            "client": median(lambda one: 1e6 * one.client_cpu / total),
        },
        "events_per_token": median(lambda one: one.events),
    }
    print(
        f"{asked.streams} streams: the server has {figures['share']:.3f} of the tokens/s of "
        f"LLM.generate, {figures['share_of_process']:.3f} of its own engine's without HTTP"
    )
    print(json.dumps(figures, indent=1))
    if asked.json is not None:
        command = "python benchmarks/server_overhead.py " + " ".join(sys.argv[1:])
        held = {**describe_run("cpu", asked.threads), "command": command, "figures": figures}
        asked.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
