"""From token ids to text, token by token, and the strings that end it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

# How many tokens of the prompt are decoded along with the first generated ones: tokenizers drop a
# space at the start of a text, and some characters span tokens.
_CONTEXT = 5
# How long the decoded part grows before its beginning is dropped, which costs a decoding more.
_WINDOW = 24
_INCOMPLETE = "\ufffd"
Decode = Callable[[list[int]], str]


def decode_function(tokenizer: Any, *, skip_special_tokens: bool) -> Decode:
    """Token ids to text; the tokenizer's own Rust part where it has one, which is much quicker."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: str(backend.decode(ids, skip_special_tokens=skip_special_tokens))
    return lambda ids: str(
        tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    )


class TextBuilder:
    """The text of one sequence.

    Attributes:
        text: whole characters so far.
        count: tokens taken in.

    Args:
        decode: token ids to text.
        prompt_ids: of the prompt, for its end.
        stop: strings that end the text.
        include_stop: whether the text keeps the one that ended it.
    """

    def __init__(
        self, decode: Decode, prompt_ids: Items[int], stop: Items[str], *, include_stop: bool
    ) -> None:
        self.text = ""
        self.count = 0
        self._decode, self._stop, self._include_stop = decode, stop, include_stop
        self._window = list(prompt_ids[-_CONTEXT:])
        self._shown = len(self._window)
        self._before = decode(self._window)
        self._held = max((len(text) for text in stop), default=1) - 1
        self._reported = 0
        self._closed = False

    def extend(self, tokens: Items[int]) -> None:
        """Appends tokens; characters that are not whole yet wait for the next one."""
        self.count += len(tokens)
        if self._closed or not tokens:
            return
        self._window += tokens
        whole = self._decode(self._window)
        if len(whole) > len(self._before) and not whole.endswith(_INCOMPLETE):
            self._take(whole)

    def _take(self, whole: str) -> None:
        self.text += whole[len(self._before) :]
        before, self._shown, self._before = self._shown, len(self._window), whole
        if len(self._window) > _WINDOW:
            # What was shown last is the context of what comes next.
            self._window = self._window[max(0, min(before, len(self._window) - _CONTEXT)) :]
            self._shown, self._before = len(self._window), self._decode(self._window)

    def find_stop(self, since: int) -> str | None:
        """The stop string that `text` now holds, looked for in what came after `since`
        characters; the text then ends with it or before it.
        """
        # One that had ended by then was not to count, however long the others are.
        found = [(self.text.find(stop, max(0, since - len(stop) + 1)), stop) for stop in self._stop]
        places = [(place, stop) for place, stop in found if place >= 0]
        if not places:
            return None
        place, stop = min(places)
        self.text = self.text[: place + len(stop) if self._include_stop else place]
        self._closed = True
        return stop

    def finish(self) -> None:
        """Takes in what was held back; nothing comes after it."""
        if self._closed:
            return
        self._closed = True
        whole = self._decode(self._window)
        if len(whole) > len(self._before):
            self._take(whole)

    def report(self, tokens: Items[int], *, final: bool) -> tuple[str, str]:
        """The text of all tokens so far, without what may be the beginning of a stop string, and
        what of it was not handed out yet.

        Args:
            tokens: those beyond `count`, which are taken in.
            final: whether no more will come.
        """
        self.extend(tokens)
        if final:
            self.finish()
        shown = self.text if final or not self._held else self.text[: -self._held]
        new, self._reported = shown[self._reported :], max(self._reported, len(shown))
        return shown, new


class RelayedText:
    """The text of a sequence that is decoded elsewhere and comes in pieces.

    Attributes:
        count: above any number of tokens, since it takes in none.
    """

    count = sys.maxsize

    def __init__(self) -> None:
        self._text = self._new = ""

    def add(self, piece: str) -> None:
        """Appends a piece."""
        self._text += piece
        self._new += piece

    def report(self, tokens: Items[int], *, final: bool) -> tuple[str, str]:
        """The text so far, and what of it was not handed out yet, as of `TextBuilder`."""
        new, self._new = self._new, ""
        return self._text, new
