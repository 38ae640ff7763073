"""What one request asks of sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from moetor.engine.structured import StructuredOutputsParams
from moetor.errors import InputError

MAX_LOGPROBS = 100
_PENALTY = 2.0
_FACTOR = 1e6  # beyond it logits would leave float32
_WHOLE = ("n", "min_tokens", "top_k")
_WHOLE_OR_NONE = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_REAL = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. The names are those of vLLM.

    The order of operations is: logprobs are taken from the model's own logits; then `logit_bias`,
    `min_tokens`, penalties, `structured_outputs`, temperature, `top_k`, `top_p`, `min_p`, and the
    draw.

    Attributes:
        n: continuations of the same prompt.
        max_tokens: to generate at most; None generates up to the model's length.
        min_tokens: before which neither an end token nor a stop token is generated, and no stop
            string ends the text.
        temperature: 0 takes the likeliest token; above 0 the logits are divided by it.
        top_p: draw among the likeliest tokens that together have this probability.
        top_k: draw among the k likeliest tokens; 0 or -1 for all.
        min_p: draw among tokens at least this share as likely as the likeliest.
        repetition_penalty: logits of tokens in the prompt or the text are divided by it where
            positive and multiplied where negative (CTRL, arXiv:1909.05858).
        presence_penalty: subtracted from the logits of tokens in the text so far.
        frequency_penalty: the same, once for each time that the token occurs.
        logit_bias: token id to what is added to its logit.
        stop: strings that end the text.
        stop_token_ids: tokens that end the text, beside the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
        seed: of the draws, which do not depend on what else is in the batch: equal logits give
            equal tokens. How many rows a product has may change a logit's last bits, and with them
            a draw that is as good as tied: rarely in float32, in long texts often in bfloat16.
            Under `EngineConfig.batch_invariant` it does not, and a seed gives the same text in any
            batch, on one machine with as many threads. None takes the next number of the engine's
            own seed.
        logprobs: log-probabilities of this many likeliest tokens and of the one taken, for each
            token of the text; 0 for the one taken alone.
        prompt_logprobs: the same for each token of the prompt but the first.
        include_stop_str_in_output: keep the stop string that ended the text.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the form that the text must have. A text that is complete and cannot go
            on ends, whatever `min_tokens` and `ignore_eos` say.

    Raises:
        InputError: a value is out of its range, or two contradict each other.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_lengths()
        self._check_numbers()
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InputError(f"seed {self.seed} must be at least 0 and below 2^64")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise InputError(f"{name} {count} must be between 0 and {MAX_LOGPROBS}, or None")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif self.stop is not None:
            object.__setattr__(self, "stop", tuple(self.stop))
        if any(not isinstance(text, str) or not text for text in self.stop or ()):
            raise InputError(f"stop {self.stop!r} must be strings of at least one character")
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if any(not _whole(i) or i < 0 for i in self.stop_token_ids or ()):
            raise InputError(f"stop_token_ids {self.stop_token_ids!r} must be token ids")
        for token, bias in (self.logit_bias or {}).items():
            if not _whole(token) or token < 0:
                raise InputError(f"logit_bias: {token!r} is no token id")
            if not _real(bias):
                raise InputError(f"logit_bias: {bias!r} for token {token} is no number")
            if not math.isfinite(bias) and bias != -math.inf:
                raise InputError(f"logit_bias: {bias} for token {token} must be finite or -inf")

    def _check_kinds(self) -> None:
        for name in (*_WHOLE, *_WHOLE_OR_NONE):
            value = getattr(self, name)
            if not (_whole(value) or (value is None and name in _WHOLE_OR_NONE)):
                raise InputError(f"{name} {value!r} must be a whole number")
        for name in _REAL:
            if not _real(getattr(self, name)):
                raise InputError(f"{name} {getattr(self, name)!r} must be a number")
        if not isinstance(self.stop, Sequence | None):
            raise InputError(f"stop {self.stop!r} must be a string, or a list of strings")
        if not isinstance(self.stop_token_ids, Sequence | None):
            raise InputError(f"stop_token_ids {self.stop_token_ids!r} must be a list of token ids")
        if not isinstance(self.logit_bias, Mapping | None):
            raise InputError(f"logit_bias {self.logit_bias!r} must map token ids to numbers")

    def _check_lengths(self) -> None:
        if self.n < 1:
            raise InputError(f"n {self.n} must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens {self.max_tokens} must be at least 1, or None")
        if self.min_tokens < 0:
            raise InputError(f"min_tokens {self.min_tokens} must be at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; lower one"
            )

    def _check_numbers(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature} must be 0 or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.top_k < -1:
            raise InputError(f"top_k {self.top_k} must be at least 1, or 0 or -1 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p} must be between 0 and 1")
        if not 1 / _FACTOR <= self.repetition_penalty <= _FACTOR:
            raise InputError(
                f"repetition_penalty {self.repetition_penalty} must be between {1 / _FACTOR:g} and "
                f"{_FACTOR:g}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -_PENALTY <= getattr(self, name) <= _PENALTY:
                raise InputError(f"{name} {getattr(self, name)} must be between -2 and 2")
        if self.greedy and self.n > 1:
            raise InputError(
                f"n {self.n} with temperature 0 would give the same text {self.n} times; take n=1 "
                "or a temperature above 0"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def truncated(self) -> bool:
        """Whether the draw is among some tokens only."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
