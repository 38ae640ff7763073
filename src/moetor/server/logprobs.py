"""Log-probabilities in the two forms of OpenAI's answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from moetor.engine import Logprob

# What OpenAI puts where a token was impossible; JSON has no infinity.
_LOWEST = -9999.0
_INCOMPLETE = "\ufffd"
# How vocabularies of SentencePiece name a byte.
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
# And those of byte-level BPE: a byte that can be seen is itself, the others are letters from 256
# on, in their order.
_SEEN = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = (byte for byte in range(256) if byte not in _SEEN)
_BYTE_OF = {chr(byte): byte for byte in _SEEN} | {chr(256 + n): b for n, b in enumerate(_HIDDEN)}


def _value(found: Logprob) -> float:
    return max(found.logprob, _LOWEST) if not math.isnan(found.logprob) else _LOWEST


def _ranked(entry: dict[int, Logprob], top: int) -> list[Logprob]:
    return sorted((one for one in entry.values() if one.rank <= top), key=lambda one: one.rank)


def _bytes(text: str, piece: str) -> list[int] | None:
    """The bytes of a token; None where they cannot be told.

    Args:
        text: of the token alone.
        piece: what the vocabulary calls it. A token that is a part of a character has no text of
            its own, but its name says which bytes it is.
    """
    if _INCOMPLETE not in text:
        return list(text.encode())
    one = _BYTE_PIECE.fullmatch(piece)
    if one is not None:
        return [int(one[1], 16)]
    found = [_BYTE_OF.get(letter) for letter in piece]
    return None if None in found else [byte for byte in found if byte is not None]


def chat_logprobs(
    tokens: Sequence[int],
    entries: Sequence[dict[int, Logprob]],
    top: int,
    piece: Callable[[int], str],
) -> dict[str, Any]:
    """The `logprobs` of a choice of `/v1/chat/completions`.

    Args:
        tokens: that were generated; an entry of `entries` for each.
        top: how many of the likeliest are told for each.
        piece: what the vocabulary calls a token.
    """
    content = []
    for token, entry in zip(tokens, entries, strict=True):
        names = {id(found): piece(number) for number, found in entry.items()}
        taken = _one(entry[token], names[id(entry[token])])
        taken["top_logprobs"] = [_one(other, names[id(other)]) for other in _ranked(entry, top)]
        content.append(taken)
    return {"content": content, "refusal": None}


def _one(found: Logprob, piece: str) -> dict[str, Any]:
    text = found.decoded_token or ""
    return {"token": text, "logprob": _value(found), "bytes": _bytes(text, piece)}


class TextLogprobs:
    """Makes the `logprobs` of a choice of `/v1/completions`, piece by piece.

    Args:
        top: how many of the likeliest are told for each token.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._offset = 0

    def take(
        self,
        tokens: Sequence[int],
        entries: Sequence[dict[int, Logprob] | None],
        texts: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """The next tokens; the entry of a text's very first token is None, as nothing comes before.

        Args:
            texts: of the tokens whose entry is None.
        """
        made: dict[str, Any] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for place, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
            text = (entry[token].decoded_token or "") if entry else (texts or [])[place]
            made["text_offset"].append(self._offset)
            made["tokens"].append(text)
            made["token_logprobs"].append(_value(entry[token]) if entry else None)
            made["top_logprobs"].append(self._tops(entry, token) if entry else None)
            self._offset += len(text)
        return made

    def _tops(self, entry: dict[int, Logprob], token: int) -> dict[str, float]:
        """The likeliest, and the one taken where it is not among them."""
        tops: dict[str, float] = {}
        for one in (*_ranked(entry, self._top), entry[token]):
            tops.setdefault(one.decoded_token or "", _value(one))
        return tops
