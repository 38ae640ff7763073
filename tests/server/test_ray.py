"""The server as two replicas on a local Ray cluster: one is killed, all are replaced, and requests
are answered meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

from moetor.cli.flags import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
ray = pytest.importorskip("ray", reason="needs the extra moetor[ray]")

from ray import serve  # noqa: E402

from moetor.ray import NAME, build_app, deployment, replica_options  # noqa: E402

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "ray" / "serve.yaml"
ARGS = {"model": "demo", "device": "cpu", "dtype": "float32", "max-num-seqs": 8}
BODY = {"prompt": "ROMEO:", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def run(args: dict[str, Any]) -> None:
    """The application with two replicas, which are there when this returns."""
    options = replica_options(args)
    made = deployment(options).options(num_replicas=2, ray_actor_options={"num_cpus": 1})
    serve.run(made.bind(asdict(options)), name="moetor", route_prefix="/")


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


def until(true: Any, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


class Asking:
    """A client that asks on and on; what it was answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[tuple[int, str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = httpx.post(f"{self.url}/v1/completions", json=BODY, timeout=180)
            self.answers.append((answer.status_code, answer.text))

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_two_replicas(url: str) -> None:
    run(ARGS)
    before = replicas()
    assert len(before) == 2
    answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=180).json()
    text = answer["choices"][0]["text"]
    assert answer["model"] == "demo"
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**BODY, "stream": True}, timeout=180
    ) as streamed:
        lines = [line for line in streamed.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 3, "piece by piece"
    assert httpx.get(f"{url}/health", timeout=180).status_code == 200
    assert (
        httpx.post(
            f"{url}/v1/completions", json={**BODY, "max_tokens": -1}, timeout=180
        ).status_code
        == 400
    )

    # One is killed: the other serves on, and another one takes its place. Only what was under way
    # on it is lost, of one client at most one request.
    with Asking(url) as client:
        until(lambda: len(client.answers) > 2)
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(replicas() - {min(before)}) == 2)
        known = len(client.answers)
        until(lambda: len(client.answers) > known + 2)
    lost = [one for one in client.answers if one[0] != 200]
    assert len(lost) <= 1, lost
    given = [json.loads(body)["choices"][0]["text"] for code, body in client.answers if code == 200]
    assert set(given) == {text}

    # A changed argument is a rolling restart.
    before = replicas()
    with Asking(url) as client:
        run({**ARGS, "served-model-name": ["renamed"]})
        until(lambda: len(replicas()) == 2 and not replicas() & before)
    assert {status for status, _ in client.answers} == {200}
    assert httpx.get(f"{url}/v1/models", timeout=180).json()["data"][0]["id"] == "renamed"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"port": 8001}, "port is not a replica's to choose; use http_options"),
        ({"tensor_parallel_size": 2}, "a replica is one process, and 2 ranks were asked for"),
        ({"max_num_seq": 8}, "max_num_seq is not a flag"),
        ({"max_num_seqs": "many"}, "invalid int value"),
    ],
)
def test_refusals(args: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        build_app(args)


def test_a_gpu_that_no_node_has(url: str) -> None:
    with pytest.raises(UsageError, match="the cluster has no GPU"):
        build_app({"device": "cuda"})


def test_the_example(url: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema(**yaml.safe_load(DEPLOY.read_text())).applications
    assert application.import_path == "moetor.ray:build_app"
    assert [one.name for one in application.deployments] == [NAME]
    assert build_app(application.args)._bound_deployment.name == NAME
