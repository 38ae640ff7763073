"""The engine's process is killed under a server: all who wait are told, and nothing hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import httpx2 as httpx

from server.server_process import ServerProcess, children

TEXT = "/v1/completions"


def test_a_killed_engine_is_told_to_all_who_wait() -> None:
    server = ServerProcess("--dtype", "float32", "--max-num-seqs", "2", "--log-interval", "60")
    body = {"prompt": "ROMEO:", "max_tokens": 1000, "ignore_eos": True}
    answers: list[Any] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def ask(stream: bool) -> None:
            answers.append((stream, client.post(TEXT, json={**body, "stream": stream})))

        # two run, the others wait
        threads = [threading.Thread(target=ask, args=[n % 2 == 0]) for n in range(6)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        state: dict[str, Any] = {"running": 0, "waiting": 0}
        while state["running"] + state["waiting"] < 6:
            assert time.monotonic() < end, state
            state = client.get("/health").json()
            time.sleep(0.01)
        (engine,) = children(server.process.pid)
        os.kill(engine, signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        assert len(answers) == 6, "some still wait"
        for streamed, answer in answers:
            assert "ended by signal 9" in answer.text
            if streamed:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert answer.status_code == 503
        health = client.get("/health")
        assert health.status_code == 503
        refused = client.post(TEXT, json=body)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/experts/stats").json()["healthy"] is False
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)
