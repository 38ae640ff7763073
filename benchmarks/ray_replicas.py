"""Replicas of the demo on a local Ray cluster, put through what a cluster goes through: load that
comes and goes, a rolling restart and a killed replica, with requests under way.

    python benchmarks/ray_replicas.py

Needs the extra `moetor[ray]` and two cores. Says what it saw, and exits with status 1 where it is
not what docs/server.md promises.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2 as httpx
import ray
from ray import serve

from moetor.ray import NAME, deployment, replica_options

ARGS = {"model": "demo", "device": "cpu", "dtype": "float32", "max-num-seqs": 8}
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 4,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
}
# A request that is answered by then does not hang.
LIMIT = 60.0


class Client(threading.Thread):
    """Asks on and on for streamed texts.

    Attributes:
        whole: requests that came to their end.
        broken: what went wrong, and after how many seconds.
    """

    def __init__(self, url: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.url, self.tokens = url, tokens
        self.whole = 0
        self.broken: list[tuple[str, float]] = []
        self._enough = threading.Event()
        self.start()

    def run(self) -> None:
        """Asks until it is stopped."""
        body = {"prompt": "ROMEO:", "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        while not self._enough.is_set():
            begin = time.monotonic()
            wrong = self._ask(body)
            if wrong:
                self.broken.append((wrong, time.monotonic() - begin))
            else:
                self.whole += 1

    def _ask(self, body: dict[str, Any]) -> str:
        """What is wrong with one answer, or nothing."""
        last = ""
        try:
            with httpx.stream(
                "POST", f"{self.url}/v1/completions", json=body, timeout=LIMIT
            ) as answer:
                if answer.status_code != 200:
                    return f"status {answer.status_code}: {answer.read().decode()[:80]}"
                for line in answer.iter_lines():
                    last = line or last
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        return "" if last == "data: [DONE]" else f"ended with {last[:80]!r}"

    def stop(self) -> None:
        """Asks no more, and waits for the last answer."""
        self._enough.set()
        self.join(2 * LIMIT)


class Load:
    """Clients beside one another, inside a `with` block."""

    def __init__(self, url: str, clients: int, tokens: int = 120) -> None:
        self._make = lambda: [Client(url, tokens) for _ in range(clients)]
        self.clients: list[Client] = []

    def __enter__(self) -> Load:
        self.clients = self._make()
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.stop()

    @property
    def whole(self) -> int:
        """Requests that came to their end."""
        return sum(client.whole for client in self.clients)

    @property
    def broken(self) -> list[tuple[str, float]]:
        """Those that did not."""
        return [one for client in self.clients for one in client.broken]


def replicas() -> set[int]:
    """Processes of the replicas."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if words.startswith(f"ray::ServeReplica:moetor:{NAME}".encode()):
            found.add(int(path.parent.name))
    return found


def serving() -> int:
    """Replicas that Ray gives requests to."""
    states = serve.status().applications["moetor"].deployments[NAME].replica_states
    return int(states.get("RUNNING", 0))


def until(what: str, true: Callable[[], bool], seconds: float = 180) -> float:
    """Waits; how long it took."""
    begin = time.monotonic()
    while not true():
        if time.monotonic() - begin > seconds:
            raise SystemExit(f"after {seconds:.0f} s still not so: {what}")
        time.sleep(0.1)
    took = time.monotonic() - begin
    print(f"{took:6.1f} s  {what}", flush=True)
    return took


def run(args: dict[str, Any], **options: Any) -> None:
    """Deploys; the replicas are there when this returns."""
    settings = replica_options(args)
    made = deployment(settings).options(ray_actor_options={"num_cpus": 1}, **options)
    serve.run(made.bind(asdict(settings)), name="moetor", route_prefix="/")


def need(true: bool, what: str) -> None:
    """Says whether it is so, and ends where it is not."""
    print(f"{'':10}{what}: {'yes' if true else 'NO'}", flush=True)
    if not true:
        sys.exit(1)


def main() -> None:
    """Each part in turn, on one cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    print("autoscaling, from one replica to two and back")
    run(ARGS, autoscaling_config=SCALING)
    need(len(replicas()) == 1, "one replica without load")
    with Load(url, 8) as load:
        until("a second replica serves", lambda: serving() == 2)
        known = load.whole
        until("both answer", lambda: load.whole > known + 16)
    with Load(url, 1, 20) as light:
        until("one replica is left under one client", lambda: len(replicas()) == 1)
    broken = load.broken + light.broken
    need(not broken, f"all of {load.whole + light.whole} requests whole ({broken[:2]})")

    print("a rolling restart with requests under way")
    run(ARGS, num_replicas=2)
    before = replicas()
    with Load(url, 6) as load:
        until("requests are under way", lambda: load.whole > 6)
        run({**ARGS, "served-model-name": ["renamed"]}, num_replicas=2)
        until("no old replica is left", lambda: len(replicas()) == 2 and not replicas() & before)
    need(not load.broken, f"all of {load.whole} requests whole ({load.broken[:2]})")
    names = httpx.get(f"{url}/v1/models", timeout=LIMIT).json()
    need(names["data"][0]["id"] == "renamed", "the new arguments hold")

    print("a replica is killed with requests under way")
    dead = min(replicas())
    with Load(url, 6) as load:
        until("requests are under way", lambda: load.whole > 6)
        known = load.whole
        os.kill(dead, signal.SIGKILL)
        until("the other one answers", lambda: load.whole > known + 6)
        until("another one has its place", lambda: len(replicas() - {dead}) == 2 == serving())
    for text, seconds in load.broken:
        print(f"{'':10}lost after {seconds:.1f} s: {text}")
    need(len(load.broken) <= 6, f"each client lost at most one of {load.whole} requests")
    need(all(seconds < LIMIT for _, seconds in load.broken), "no request hung")
    print(json.dumps({"ray": ray.__version__, "cores": os.cpu_count()}))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
