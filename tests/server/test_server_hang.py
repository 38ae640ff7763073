"""The engine's process stands still under a server, without ending: nobody waits in vain."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx

from server.server_process import ServerProcess, children

TEXT = "/v1/completions"
LONG = {"prompt": "ROMEO:", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def test_an_engine_that_stands_still() -> None:
    server = ServerProcess("--dtype", "float32", "--engine-timeout", "2", "--max-num-seqs", "2")
    (engine,) = children(server.process.pid)
    answers: list[Any] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def status() -> int:
            return client.get("/health").status_code

        def ask(stream: bool) -> None:
            answers.append((stream, client.post(TEXT, json={**LONG, "stream": stream})))

        # nothing was asked yet
        os.kill(engine, signal.SIGSTOP)
        until(lambda: status() == 503)
        health = client.get("/health").json()["error"]
        assert "no sign of life" in health["message"]
        assert "2 s are the limit" in health["message"]
        refused = client.post(TEXT, json=LONG)
        assert refused.status_code == 503
        assert "no sign of life" in refused.json()["error"]["message"]
        assert "retry-after" in refused.headers
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/experts/stats").json()["healthy"] is False
        os.kill(engine, signal.SIGCONT)
        until(lambda: status() == 200)
        first = client.post(TEXT, json={**LONG, "max_tokens": 5}).json()
        assert first["usage"]["completion_tokens"] == 5

        # two run, the others wait
        threads = [threading.Thread(target=ask, args=[n % 2 == 0]) for n in range(4)]
        for thread in threads:
            thread.start()
        until(
            lambda: sum(client.get("/health").json()[name] for name in ("running", "waiting")) == 4
        )
        os.kill(engine, signal.SIGSTOP)
        for thread in threads:
            thread.join(30)
        assert len(answers) == 4, "some still wait"
        for streamed, answer in answers:
            assert "no sign of life" in answer.text
            if streamed:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert answer.status_code == 503
        os.kill(engine, signal.SIGCONT)
        until(lambda: status() == 200)
        server.idle()
        again = client.post(TEXT, json={**LONG, "max_tokens": 5}).json()
        assert again["choices"] == first["choices"]

        os.kill(engine, signal.SIGSTOP)
        until(lambda: status() == 503)
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)
    assert sum("the engine goes on" in line for line in server.log) == 2
