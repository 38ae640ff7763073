"""What data-parallel groups tell one another after a step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields, replace

from moetor.engine.outputs import EngineStats, FinishReason, Logprob
from moetor.engine.sequence import Sequence

_OWN_FIELDS = ("kv_cache_usage", "steps", "step_seconds", "host_seconds", "graph_steps")


@dataclass(frozen=True, slots=True)
class SequenceNews:
    """What a sequence got since it was told last."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class RequestNews:
    """What became of a request at its home."""

    request_id: str
    sequences: list[SequenceNews]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    cached_tokens: int
    preemptions: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Told:
    """What a data-parallel group says after a step.

    Attributes:
        tokens: int64 [N, 3]: request, sequence and its next token, where that is all there is to
            say: nearly always, and for hundreds of sequences, so that objects would take too long.
        news: of the other requests.
        flying: whether a step is under way.
    """

    tokens: array[int]
    news: list[RequestNews]
    flying: bool
    stats: EngineStats


def follow_sequence(sequence: Sequence, told: SequenceNews) -> None:
    """Gives a sequence that is computed elsewhere what it got there."""
    if sequence.finished:
        return
    sequence.token_ids.extend(told.tokens)
    if sequence.logprobs is not None:
        sequence.logprobs.extend(told.logprobs)
        both = zip(told.tokens, told.logprobs, strict=True)
        sequence.cumulative_logprob += sum(found[token].logprob for token, found in both)
    if sequence.text is not None and sequence.params.stop:
        since = len(sequence.text.text)
        for token in told.tokens:
            sequence.text.extend([token])
        if sequence.known - sequence.prompt_len >= sequence.limit:
            sequence.text.finish()
        if isinstance(told.stop_reason, str):
            sequence.text.find_stop(since)
    sequence.finish_reason, sequence.stop_reason = told.finish_reason, told.stop_reason


def added(one: EngineStats, other: EngineStats) -> EngineStats:
    """Counters of two groups together; times and steps are those of `one`."""
    summed = {
        field.name: getattr(one, field.name) + getattr(other, field.name)
        for field in fields(EngineStats)
        if field.name not in _OWN_FIELDS
    }
    return replace(
        one, **summed, kv_cache_usage=summed["blocks_used"] / max(1, summed["blocks_total"])
    )
