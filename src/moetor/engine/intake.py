"""From a prompt to a request: tokens, checks, seeds. What is wrong with a prompt is said here."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from operator import index
from typing import Any

from moetor.engine.grammar import GrammarCompiler
from moetor.engine.outputs import RequestMetrics
from moetor.engine.params import SamplingParams
from moetor.engine.pictures import PictureReader
from moetor.engine.sequence import Request, Sequence
from moetor.errors import InputError

_GOLDEN = 0x9E3779B97F4A7C15
Prompt = str | Items[int] | Mapping[str, Any]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`, and in `inputs` what else the
model takes with the prompt (such as `pixel_values`)."""


class Intake:
    """Makes requests.

    Args:
        tokenizer: None where prompts are token ids and no text is wanted.
        vocab_size: of the model.
        ends: its end tokens.
        max_model_len: of a prompt and its continuation.
        seed: of the requests without one.
        text_only: whether the model takes nothing but text.
        separate_prompt: whether the prompt goes into an encoder.
        pictures: makes prompts of conversations with pictures; or why there is nothing that does.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        ends: frozenset[int],
        max_model_len: int,
        seed: int,
        text_only: bool = False,
        separate_prompt: bool = False,
        pictures: PictureReader | str = "the engine was built without a processor",
    ) -> None:
        self.tokenizer, self.vocab_size, self.ends = tokenizer, vocab_size, ends
        self.max_model_len = max_model_len
        self.text_only, self.separate_prompt = text_only, separate_prompt
        self._pictures = pictures
        self.grammars = GrammarCompiler(tokenizer, vocab_size, ends)
        self._seed, self._numbers = seed, itertools.count()

    @property
    def pictures(self) -> PictureReader:
        """Makes prompts of conversations with pictures.

        Raises:
            InputError: nothing does.
        """
        if isinstance(self._pictures, str):
            raise InputError(f"no pictures are taken here: {self._pictures}; send text alone")
        return self._pictures

    def request(self, prompt: Prompt, params: SamplingParams, request_id: str) -> Request:
        """A request and its sequences.

        Raises:
            InputError: the prompt is empty, too long, of unknown tokens, or contradicts `params`;
                or a grammar does not compile.
            ConfigError: a grammar needs what is not here.
        """
        arrival = time.monotonic()
        text, ids, extra = self._read(prompt)
        self._check(ids, params)
        if extra is not None and self.text_only:
            raise InputError(f"the prompt brings {', '.join(extra)}, and text alone is taken here")
        form = params.structured_outputs
        if form is not None:
            self.grammars.compile(form)
        if params.prompt_logprobs is not None and self.separate_prompt:
            raise InputError("prompt_logprobs: the prompt of an encoder-decoder is not predicted")
        request = Request(request_id, text, ids, params, RequestMetrics(arrival), extra=extra)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        mine = self._seed + _GOLDEN * (next(self._numbers) + 1)
        base = mine if params.seed is None else params.seed
        room = self.max_model_len - len(ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        ends = self._ends(params)
        for number in range(params.n):
            request.sequences.append(
                Sequence(
                    request=request,
                    index=number,
                    seed=(base + number * 0xD1342543DE82EF95) % 2**64,
                    ends=ends,
                    limit=limit,
                    token_ids=list(ids),
                    prompt_len=len(ids),
                    logprobs=None if params.logprobs is None else [],
                )
            )
        return request

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int], dict[str, Any] | None]:
        extra: dict[str, Any] | None = None
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "inputs"}
            if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise InputError(
                    "a prompt that is a mapping has either 'prompt' or 'prompt_token_ids', and "
                    f"'inputs' where the model takes more; this one has {', '.join(prompt)}"
                )
            extra = dict(prompt.get("inputs") or {}) or None
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("the engine has no tokenizer; give the prompt as token ids")
            try:
                return prompt, list(self.tokenizer(prompt)["input_ids"]), extra
            except (TypeError, UnicodeError) as error:
                raise InputError(f"the tokenizer refuses the prompt: {error}") from error
        tokens: Any = prompt
        try:
            ids = [index(token) for token in tokens]
        except TypeError as error:
            raise InputError("a prompt is text or a list of token ids") from error
        return None, ids, extra

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise InputError("the prompt has no tokens; give at least one")
        if len(ids) >= self.max_model_len:
            raise InputError(
                f"the prompt has {len(ids)} tokens and the engine's max_model_len is "
                f"{self.max_model_len}, with at least one token to generate; shorten the prompt or "
                "raise max_model_len"
            )
        size = self.vocab_size
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise InputError(f"token id {wrong} is outside the vocabulary of {size} tokens")
        named = {"logit_bias": params.logit_bias or (), "stop_token_ids": params.stop_token_ids}
        for name, tokens in named.items():
            for token in tokens or ():
                if token >= size:
                    raise InputError(
                        f"{name}: token id {token} is outside the vocabulary of {size} tokens"
                    )
        self._check_that_some_token_may_come(params)
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and the engine has none")
        if params.min_tokens > self.max_model_len - len(ids):
            raise InputError(
                f"min_tokens {params.min_tokens} does not fit behind a prompt of {len(ids)} tokens "
                f"into max_model_len {self.max_model_len}"
            )

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        ends = frozenset(params.stop_token_ids or ())
        if params.structured_outputs is not None or not params.ignore_eos:
            ends |= self.ends
        return ends

    def _check_that_some_token_may_come(self, params: SamplingParams) -> None:
        barred = {token for token, bias in (params.logit_bias or {}).items() if bias == -math.inf}
        if len(barred) == self.vocab_size:
            raise InputError("logit_bias bars every token with -inf; leave at least one")
        held = barred | self._ends(params)
        if params.min_tokens and len(held) == self.vocab_size:
            raise InputError(
                f"logit_bias bars every token but those that end the text, and min_tokens "
                f"{params.min_tokens} bars those; lower min_tokens or leave another token"
            )
