"""From the fields of a request to the engine's `SamplingParams`."""

from __future__ import annotations

from typing import Any

from moetor.engine import SamplingParams
from moetor.errors import InputError
from moetor.server.errors import refusal
from moetor.server.forms import Form
from moetor.server.protocol import Sampling

_SAME_NAME = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
MAX_BIAS = 100.0
MAX_STOPS = 64


def sampling_params(
    body: Sampling,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    form: Form | None = None,
) -> SamplingParams:
    """What the request asks of sampling.

    Args:
        max_tokens: to generate at most; None up to the model's length.
        logprobs, prompt_logprobs: as the engine takes them.
        form: of the text.

    Raises:
        ApiError: status 400, naming the field.
    """
    asked: dict[str, Any] = {
        name: getattr(body, name) for name in _SAME_NAME if getattr(body, name) is not None
    }
    if body.seed is not None:
        # OpenAI's seeds are 64-bit integers with a sign.
        if not -(2**63) <= body.seed < 2**64:
            raise refusal(f"seed {body.seed} does not fit into 64 bits", "seed")
        asked["seed"] = body.seed % 2**64
    if body.stop is not None and body.stop != []:
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        if len(stops) > MAX_STOPS:
            raise refusal(f"stop has {len(stops)} strings; at most {MAX_STOPS} work", "stop")
        asked["stop"] = stops
    if body.logit_bias is not None:
        asked["logit_bias"] = _logit_bias(body.logit_bias)
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=None if form is None else form.asked,
            **asked,
        )
    except InputError as error:
        raise refusal(str(error), blamed(body, str(error))) from error


def blamed(body: Sampling, message: str) -> str | None:
    """The field that one of the engine's messages begins with."""
    word = message.split(" ", 1)[0].rstrip(":")
    return word if word in type(body).model_fields else None


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for token, bias in given.items():
        if not token.isascii() or not token.isdecimal() or len(token) > 9:
            raise refusal(f"logit_bias: {token[:40]!r} is not a token id", "logit_bias")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise refusal(
                f"logit_bias: {bias} for token {token} must be between -100 and 100", "logit_bias"
            )
        biases[int(token)] = bias
    return biases
