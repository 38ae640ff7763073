"""Requests and their sequences, as the scheduler and the runner see them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moetor.engine.grammar import Grammar
from moetor.engine.outputs import FinishReason, Logprob, RequestMetrics
from moetor.engine.params import SamplingParams


@dataclass(slots=True)
class Request:
    """One prompt and its n sequences.

    Attributes:
        extra: further inputs of the model for the prompt (pixels and what belongs to them).
        prompt_logprobs: filled as the prompt of the first sequence is computed.
    """

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    extra: dict[str, Any] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether all its sequences are."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation.

    A token counts as computed when a step that makes its keys and values was scheduled; a token
    that such a step will sample, and that the host does not know yet, is pending.

    Attributes:
        seed: of its draws.
        ends: tokens that end it.
        limit: tokens of its continuation, at most.
        row: index of its row in the runner's tables and of its state slot, while it runs.
        blocks: of the paged cache, in order; `hashes` of those that are filed.
        cache: the model's own cache object, under the strategy that gives each sequence one.
        text: its incremental decoder.
        routed_experts: of all its tokens but the last, int32 [tokens, layers, top_k], once it has
            ended well and where the engine keeps them.
        grammar: how far the text has come in the form that it must have.
        reported: tokens that were reported to whoever asked.
        written_blocks: how many of `blocks` the runner's table has.
    """

    request: Request
    index: int
    seed: int
    ends: frozenset[int]
    limit: int
    token_ids: list[int]
    prompt_len: int
    computed: int = 0
    pending: int = 0
    row: int | None = None
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    cache: Any = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: Any = None
    grammar: Grammar | None = None
    routed_experts: Any = None
    reported: int = 0
    written_blocks: int = 0

    @property
    def params(self) -> SamplingParams:
        """Of its request."""
        return self.request.params

    @property
    def finished(self) -> bool:
        """Whether it will get no more tokens."""
        return self.finish_reason is not None

    @property
    def known(self) -> int:
        """Tokens that the host knows: the prompt's and the generated ones."""
        return len(self.token_ids)

    @property
    def total(self) -> int:
        """Tokens with the pending ones."""
        return len(self.token_ids) + self.pending

    @property
    def generated(self) -> int:
        """Generated tokens, with the pending ones."""
        return self.total - self.prompt_len

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens that the host knows."""
        return self.token_ids[self.prompt_len :]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's part in a step: its tokens from `start`, `count` of them.

    Attributes:
        samples: whether these are its last known tokens, so that a next one is sampled.
        pending: whether the last of these tokens is not known on the host yet.
        position: of the token that is sampled, among the generated ones.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    pending: bool
    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """What is computed together: single tokens first, then parts of prompts."""

    parts: list[Scheduled]
