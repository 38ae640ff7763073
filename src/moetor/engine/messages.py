"""Small objects between the ranks of an engine, by the host: a message is one collective, and a
second one where it is long.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What fits into one message: the orders of a step without new requests, the tokens of some hundred
# sequences.
_ROOM = 8192
_LENGTH = 8


def broadcast(said: Any, group: dist.ProcessGroup) -> Any:
    """What rank 0 of `group` says; the others give None."""
    words = pickle.dumps(said) if group.rank() == 0 else b""
    head = _head(words)
    dist.broadcast(head, group=group, group_src=0)
    length = _length(head)
    if length <= _ROOM:
        return said if group.rank() == 0 else _read(head[_LENGTH:], length)
    rest = _bytes(words, length)
    dist.broadcast(rest, group=group, group_src=0)
    return said if group.rank() == 0 else _read(rest, length)


def gather(said: Any, group: dist.ProcessGroup) -> list[Any]:
    """What every rank of `group` says, in rank order."""
    words = pickle.dumps(said)
    heads = _all(_head(words), group)
    lengths = [_length(head) for head in heads]
    if max(lengths) <= _ROOM:
        return [_read(head[_LENGTH:], n) for head, n in zip(heads, lengths, strict=True)]
    whole = _all(_bytes(words, max(lengths)), group)
    return [_read(one, n) for one, n in zip(whole, lengths, strict=True)]


def _all(mine: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    told = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(told, mine, group=group)
    return told


def _head(words: bytes) -> Tensor:
    first = words if len(words) <= _ROOM else b""
    return _bytes(len(words).to_bytes(_LENGTH, "little") + first, _LENGTH + _ROOM)


def _bytes(words: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(words.ljust(size, b"\0")), dtype=torch.uint8)


def _length(head: Tensor) -> int:
    return int.from_bytes(head[:_LENGTH].numpy().tobytes(), "little")


def _read(words: Tensor, length: int) -> Any:
    return pickle.loads(words[:length].numpy().tobytes())
