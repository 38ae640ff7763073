"""What an engine in a process of its own and its owner say to each other, over a pair of sockets.

A message is a frame: eight bytes of length, then a pickle. Both ends are ours, and nothing that a
client of a server sent is ever unpickled.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moetor.engine.config import EngineConfig
from moetor.engine.intake import Intake
from moetor.engine.news import Batch, RequestNews, SequenceNews
from moetor.engine.outputs import EngineStats
from moetor.engine.sequence import Request
from moetor.engine.source import Fused, ModelSource

_HEAD = struct.Struct("<Q")


class Build(NamedTuple):
    """The first message: which engine.

    Attributes:
        prepare: called before the model is loaded.
    """

    source: ModelSource
    config: EngineConfig
    prepare: Callable[[], None] | None


class Add(NamedTuple):
    """Queue a request."""

    request: Request


class Abort(NamedTuple):
    """End a request."""

    request_id: str


class AskLoad(NamedTuple):
    """Tell how the experts are loaded."""

    number: int


class Quit(NamedTuple):
    """End when what was asked before is done."""


class Ready(NamedTuple):
    """The engine waits for requests."""

    intake: Intake
    fused: Fused
    stats: EngineStats


class Failed(NamedTuple):
    """The engine could not be built."""

    error: Exception


class Load(NamedTuple):
    """How the experts are loaded, or why it cannot be told."""

    number: int
    found: dict[str, list[int]] | Exception


def packed(batch: Batch) -> tuple[Any, ...]:
    """A batch as plain tuples, which take a fifth of the time to pickle: there is one a step."""
    news = [
        (one.request_id, [tuple(told) for told in one.sequences], *one[2:]) for one in batch.news
    ]
    return (batch.tokens, news, *batch[2:])


def unpacked(told: tuple[Any, ...]) -> Batch:
    """The batch of `packed`."""
    news = [
        RequestNews(name, [SequenceNews(*one) for one in sequences], *rest)
        for name, sequences, *rest in told[1]
    ]
    return Batch(told[0], news, *told[2:])


def frame(message: Any) -> bytes:
    """A message as it goes over the socket."""
    data = pickle.dumps(message, protocol=5)
    return _HEAD.pack(len(data)) + data


def receive(connection: socket.socket) -> Any:
    """The next message, which is waited for.

    Raises:
        EOFError: the other side is gone.
    """
    (length,) = _HEAD.unpack(_exactly(connection, _HEAD.size))
    return pickle.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        count = connection.recv_into(view[filled:])
        if count == 0:
            raise EOFError
        filled += count
    return data


class FrameReader:
    """Makes messages of bytes as they come."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are whole now."""
        self._data += data
        place = 0
        while len(self._data) - place >= _HEAD.size:
            (length,) = _HEAD.unpack_from(self._data, place)
            end = place + _HEAD.size + length
            if len(self._data) < end:
                break
            message = pickle.loads(memoryview(self._data)[place + _HEAD.size : end])
            place = end
            yield message
        del self._data[:place]
