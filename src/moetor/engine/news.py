"""What a step changed, on its way from the engine to whoever waits for it.

The engine's own request stays where the model runs. Whoever asked holds a copy of it, which news
bring up to date, and both are read by the same function, `request_output`. News are tuples of
plain values, because a process of its own pickles them at every step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from moetor.engine.outputs import (
    CompletionOutput,
    EngineStats,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from moetor.engine.sequence import Request, Sequence
from moetor.engine.text import Decode, RelayedText, TextBuilder


class SequenceNews(NamedTuple):
    """What is new of one sequence.

    Attributes:
        number: of the sequence among the request's.
        text: where the engine decodes, because stop strings are looked for; None where the holder
            of the copy does.
        logprobs: of the new tokens; None unless they were asked for.
    """

    number: int
    token_ids: list[int]
    text: str | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    routed_experts: Any = None


class RequestNews(NamedTuple):
    """What is new of one request.

    Attributes:
        metrics: with the first news and the last.
        prompt_logprobs: the same, where they were asked for.
    """

    request_id: str
    sequences: list[SequenceNews]
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None


class Batch(NamedTuple):
    """What one turn of the engine's loop has to tell.

    Attributes:
        tokens: request ids, each with one token: what is new of most requests after most steps,
            and costs a tenth of other news to tell.
        news: of the other requests.
        stats: the engine's state after it; None where it was told a moment ago and no request has
            come or gone since.
        errors: that occurred in it.
        dead: why the engine has ended, where it has.
    """

    tokens: list[tuple[str, int]]
    news: list[RequestNews]
    stats: EngineStats | None
    errors: list[str]
    dead: str | None = None


def copy_of(request: Request, decode: Decode | None) -> Request:
    """A copy that news bring up to date.

    Args:
        decode: makes the text of token ids; None where no text is wanted.
    """
    made = replace(request, metrics=replace(request.metrics), sequences=[], extra=None)
    params = request.params
    for sequence in request.sequences:
        own = replace(
            sequence,
            request=made,
            token_ids=list(sequence.token_ids),
            logprobs=None if sequence.logprobs is None else [],
        )
        if decode is not None:
            own.text = (
                RelayedText()
                if params.stop
                else TextBuilder(decode, request.prompt_ids, (), include_stop=False)
            )
        made.sequences.append(own)
    return made


def take_token(request: Request, token: int) -> None:
    """Brings a copy up to date of which `new_token` told all that is new."""
    request.sequences[0].token_ids.append(token)


def take_news(request: Request, news: RequestNews) -> None:
    """Brings a copy up to date."""
    for told in news.sequences:
        sequence = request.sequences[told.number]
        sequence.token_ids += told.token_ids
        if told.text is not None:
            sequence.text.add(told.text)
        if told.logprobs is not None and sequence.logprobs is not None:
            sequence.logprobs += told.logprobs
            for token, entry in zip(told.token_ids, told.logprobs, strict=True):
                sequence.cumulative_logprob += entry[token].logprob
        sequence.finish_reason, sequence.stop_reason = told.finish_reason, told.stop_reason
        sequence.routed_experts = told.routed_experts
    if news.metrics is not None:
        request.metrics = news.metrics
    if news.prompt_logprobs is not None:
        request.prompt_logprobs = news.prompt_logprobs
    request.error = news.error


def new_token(request: Request) -> int | None:
    """The token that is all that is new in the engine's own request, which counts as told then;
    None where there is more to tell: `news_of` does.
    """
    if len(request.sequences) != 1 or request.params.stop:
        return None
    sequence = request.sequences[0]
    reported = sequence.reported
    if (
        sequence.finish_reason is not None
        or sequence.logprobs is not None
        or reported == 0
        or len(sequence.token_ids) != sequence.prompt_len + reported + 1
    ):
        return None
    sequence.reported = reported + 1
    return sequence.token_ids[-1]


def news_of(request: Request) -> RequestNews:
    """What is new in the engine's own request since it was asked last."""
    told = []
    first = True
    finished = True
    for sequence in request.sequences:
        begin = sequence.prompt_len + sequence.reported
        first = first and sequence.reported == 0
        finished = finished and sequence.finished
        new = sequence.token_ids[begin:]
        if not new and not sequence.finished:
            continue
        text = None
        if request.params.stop and sequence.text is not None:
            text = _report(sequence)[1]
        logprobs = None if sequence.logprobs is None else sequence.logprobs[sequence.reported :]
        sequence.reported += len(new)
        told.append(
            SequenceNews(
                sequence.index,
                new,
                text,
                logprobs,
                sequence.finish_reason,
                sequence.stop_reason,
                sequence.routed_experts,
            )
        )
    if not (first or finished):
        return RequestNews(request.request_id, told)
    return RequestNews(
        request.request_id, told, request.metrics, request.prompt_logprobs, request.error
    )


def request_output(request: Request, *, delta: bool = False) -> RequestOutput:
    """The request's state now; what is new in it counts as handed out.

    Args:
        delta: give of each continuation only what is new.
    """
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_ids,
        outputs=[_completion(sequence, delta) for sequence in request.sequences],
        finished=request.finished,
        metrics=request.metrics,
        prompt_logprobs=request.prompt_logprobs,
        error=request.error,
    )


def _completion(sequence: Sequence, delta: bool) -> CompletionOutput:
    text, new = ("", "") if sequence.text is None else _report(sequence)
    begin, logprobs = sequence.reported, sequence.logprobs
    new_ids = sequence.token_ids[sequence.prompt_len + begin :]
    if delta:  # a long text is not copied for every token of it
        text, ids = new, new_ids
        logprobs = None if logprobs is None else logprobs[begin:]
    else:
        ids = sequence.output_ids
        logprobs = None if logprobs is None else list(logprobs)
    sequence.reported = begin + len(new_ids)
    return CompletionOutput(
        index=sequence.index,
        text=text,
        token_ids=ids,
        cumulative_logprob=None if logprobs is None else sequence.cumulative_logprob,
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        new_text=new,
        new_token_ids=new_ids,
        routed_experts=sequence.routed_experts,
    )


def _report(sequence: Sequence) -> tuple[str, str]:
    """Its text as `report` of its builder gives it, which takes in the tokens it has not seen."""
    ids, end = sequence.token_ids, sequence.known
    # The token that ended the text is no part of it.
    if sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str):
        end -= end > sequence.prompt_len and ids[-1] in sequence.ends
    seen = sequence.prompt_len + sequence.text.count
    report: tuple[str, str] = sequence.text.report(ids[seen:end], final=sequence.finished)
    return report
