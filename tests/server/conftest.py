"""One server for all of these tests, and the engine's own answers to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from server.server_process import KEY, ServerProcess


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    key = tmp_path_factory.mktemp("server") / "key.txt"
    key.write_text(KEY + "\n")
    flags = ("--dtype", "float32", "--max-num-seqs", "16", "--max-waiting", "48")
    made = ServerProcess(*flags, "--api-key-file", str(key), "--drain-timeout", "1")
    yield made
    if made.process.poll() is None:
        made.stop()


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def own() -> Any:
    """The same model without a server."""
    from moetor import LLM

    return LLM("demo", dtype="float32")
