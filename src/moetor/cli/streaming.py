"""Generated text as it is produced, and the figures of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# How many tokens of the prompt are decoded along with the first generated ones: tokenizers drop a
# space at the start of a text, and some characters span tokens.
_CONTEXT = 5
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run took.

    Attributes:
        seconds_to_first_token: from the call of `generate`; the prompt's rate is over this time.
        generated_tokens_per_second: of the tokens after the first, None where there are none.
        kernels: that run the experts; empty where Transformers runs them.
    """

    prompt_tokens: int
    generated_tokens: int
    seconds_to_first_token: float
    prompt_tokens_per_second: float
    generated_tokens_per_second: float | None
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        rate = self.generated_tokens_per_second
        parts = (
            f"prompt {_tokens(self.prompt_tokens)} at {self.prompt_tokens_per_second:.0f} tok/s",
            f"generated {_tokens(self.generated_tokens)}"
            + ("" if rate is None else f" at {rate:.1f} tok/s"),
            f"first token after {self.seconds_to_first_token * 1e3:.0f} ms",
            f"kernels {', '.join(self.kernels) or 'none of ours'}",
        )
        return " | ".join(parts)


class TextStream:
    """A streamer for Transformers' `generate`, batch of one: emits text as soon as it is whole.

    Args:
        tokenizer: decodes.
        emit: called with each new piece of text.
        clock: seconds, for the figures.
    """

    def __init__(
        self,
        tokenizer: Any,
        emit: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.prompt_ids: list[int] = []
        self.token_ids: list[int] = []
        self.text = ""
        self._tokenizer, self._emit, self._clock = tokenizer, emit, clock
        self._ids: list[int] = []
        self._window = self._shown = 0
        self._started = self._first = self._last = 0.0

    def start(self) -> None:
        """Note the time at which `generate` is called."""
        self._started = self._clock()

    def put(self, value: Any) -> None:
        """Take the prompt's ids [1, T] at the first call, a new token's [1] at each later one."""
        ids = value.flatten().tolist()
        if not self._ids:
            self.prompt_ids = ids
            self._ids = list(ids)
            self._shown = len(ids)
            self._window = max(0, len(ids) - _CONTEXT)
            return
        self._last = self._clock()
        if not self.token_ids:
            self._first = self._last
        self.token_ids += ids
        self._ids += ids
        self._advance(final=False)

    def end(self) -> None:
        """Emit what was held back."""
        self._advance(final=True)

    def figures(self, kernels: tuple[str, ...]) -> Figures:
        """The run's figures, once it is over."""
        wait = max(self._first - self._started, 1e-9)
        later, span = len(self.token_ids) - 1, self._last - self._first
        return Figures(
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=len(self.token_ids),
            seconds_to_first_token=wait,
            prompt_tokens_per_second=len(self.prompt_ids) / wait,
            generated_tokens_per_second=later / span if later > 0 and span > 0 else None,
            kernels=kernels,
        )

    def _advance(self, *, final: bool) -> None:
        whole = self._decode(self._ids[self._window :])
        before = self._decode(self._ids[self._window : self._shown])
        if len(whole) <= len(before) or (whole.endswith(_INCOMPLETE) and not final):
            return
        piece = whole[len(before) :]
        self._window, self._shown = self._shown, len(self._ids)
        self.text += piece
        self._emit(piece)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"
