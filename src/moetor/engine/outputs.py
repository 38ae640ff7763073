"""What a request gives back, and what the engine says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of one token, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: among the request's n.
        text: decoded so far; characters that further tokens may still change are held back.
        token_ids: generated so far, with the token that ended it.
        new_text, new_token_ids: what is new since the request's last output.
        cumulative_logprob: sum over the tokens, None unless `logprobs` was asked for.
        logprobs: token id to `Logprob`, one mapping for each token; None unless asked for.
        finish_reason: `stop`, `length`, `abort` or `error`; None while it goes on.
        stop_reason: the stop string or stop token id that ended it; None for an end token of the
            model.
        routed_experts: ids of the experts that each token of prompt and continuation went to, but
            for the last one, which was never computed: an array int32 [tokens, layers, top_k].
            With `enable_return_routed_experts`, once the continuation has ended.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    new_text: str = ""
    new_token_ids: list[int] = field(default_factory=list)
    routed_experts: Any = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of `time.monotonic`.

    Attributes:
        arrival_time: when it was added.
        first_scheduled_time: when its first token of the prompt was scheduled.
        first_token_time: when its first generated token was on the host.
        finished_time: when its last one was.
        num_cached_tokens: of the prompt, taken from the prefix cache.
        num_preemptions: how often its cache was taken away and computed again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first generated token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """The state of a request.

    Attributes:
        prompt: text, None where token ids were given.
        prompt_logprobs: one mapping for each token of the prompt, None for the first; None unless
            asked for.
        outputs: its n continuations.
        error: why it failed, where it did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counters of an engine since its start, and its state now.

    Attributes:
        running, waiting: sequences, now.
        kv_cache_usage: share of the cache's blocks that requests hold, 0 to 1.
        blocks_used, blocks_total: the same in blocks.
        rows_used: rows (and state slots) that requests hold.
        prefix_hit_tokens, prefix_query_tokens: prompt tokens found in the prefix cache, and asked.
        prompt_tokens, generated_tokens: computed for prompts, and sampled.
        requests_finished, requests_aborted, requests_failed: since the start.
        preemptions: sequences whose cache was taken away and computed again.
        steps: model steps.
        step_seconds: of the last step, from scheduling to its tokens.
        host_seconds: of that, what the engine itself took (all but the wait for the model).
        graph_steps: steps that replayed a CUDA graph.
    """

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    blocks_used: int = 0
    blocks_total: int = 0
    rows_used: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    requests_failed: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    host_seconds: float = 0.0
    graph_steps: int = 0
