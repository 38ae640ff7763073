"""A few seconds of the soak; `soak.py` runs it for longer."""

from __future__ import annotations

import asyncio

from server.server_process import KEY, ServerProcess
from server.soak import KINDS, expected_texts, soak


def test_mixed_load_keeps_every_promise(server: ServerProcess, seed: int) -> None:
    found = asyncio.run(
        soak(server, expected_texts(), connections=40, seconds=4, key=KEY, seed=seed)
    )
    assert not found.wrong, found.wrong[:5]
    assert all(found.counts[kind] for kind in KINDS), found.counts
