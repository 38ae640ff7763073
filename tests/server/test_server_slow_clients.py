"""Clients that send or read too slowly are let go, and hold nobody up."""

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx2 as httpx
import pytest

from server.server_process import ServerProcess
from server.soak import PROMPTS, expected_texts

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def impatient() -> Iterator[ServerProcess]:
    made = ServerProcess("--dtype", "float32", "--read-timeout", "1", "--max-num-seqs", "4")
    yield made
    assert made.stop() == 0


STARTS = {
    "head": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ",
    "nothing": b"",
    "body": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000\r\n\r\n{",
}


def was_answered(line: socket.socket) -> bool:
    """Whether there is something to read, or the other side has closed."""
    return bool(select.select([line], [], [], 0)[0])


def test_slow_senders_are_told_and_others_are_served(impatient: ServerProcess) -> None:
    host, _, port = impatient.url.removeprefix("http://").partition(":")
    lines = {name: [socket.create_connection((host, int(port))) for _ in range(20)]
             for name in STARTS}  # fmt: skip
    for name, start in STARTS.items():
        for line in lines[name]:
            line.sendall(start)
    texts = expected_texts()
    with httpx.Client(base_url=impatient.url, timeout=30) as client:
        body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 16}
        answer = client.post(TEXT, json=body).json()
        assert answer["choices"][0]["text"] == texts[PROMPTS[0]]
    end = time.monotonic() + 30
    for name, held in lines.items():
        for line in held:
            line.settimeout(max(0.1, end - time.monotonic()))
            # A byte now and then does not help; these may begin a request.
            for byte in (b"G", b"E"):
                if was_answered(line):
                    break  # what it has not read by then would reset the line, answer and all
                try:
                    line.sendall(byte)
                except OSError:
                    break
            answered = b""
            while piece := line.recv(2**16):
                answered += piece
                if name == "body" and b"\r\n\r\n" in answered:
                    break
            assert answered.startswith(b"HTTP/1.1 408"), (name, answered)
            line.close()
    assert httpx.get(f"{impatient.url}/health").status_code == 200
    assert "Traceback" not in "".join(impatient.log)


def test_a_client_that_reads_nothing_is_let_go() -> None:
    from moetor.server.streams import EventStream

    closed: list[str] = []

    async def events() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            closed.append("events")

    async def close() -> None:
        closed.append("job")

    async def work() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 3:
                await asyncio.Event().wait()  # the socket takes no more

        async def receive() -> Any:
            await asyncio.Event().wait()

        stream = EventStream(events(), close=close, write_timeout=0.2)
        await asyncio.wait_for(stream({"type": "http"}, receive, send), 20)
        assert len(sent) == 4
        assert closed == ["events", "job"]

    asyncio.run(work())
