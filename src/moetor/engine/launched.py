"""A step on its way: the model called, tokens chosen, tokens on the host."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moetor.engine.batch import kept_rows
from moetor.engine.outputs import Logprob
from moetor.engine.sampler import TokenLogprobs, joined_logprobs, token_logprobs
from moetor.engine.sequence import Scheduled, Sequence, Step
from moetor.engine.transfer import to_device
from moetor.errors import ParallelError
from moetor.parallel.launch import NO_ANSWER

# A step of a model over several ranks is polled: closely at first, then with naps of this share of
# the time that has passed. A sleep of no time, too, lets other threads have their turn.
_BUSY_SECONDS, _NAP_SHARE, _LONGEST_NAP = 0.0002, 0.05, 0.001


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found, on the host.

    Attributes:
        tokens: by the sequence that sampled.
        logprobs: of these tokens, for those that asked.
        prompt_logprobs: by sequence: first position, and one mapping for each position.
        errors: by the sequence that the model could not compute.
        model_seconds: in the model and in waiting for it.
    """

    tokens: dict[Sequence, int]
    logprobs: dict[Sequence, dict[int, Logprob]]
    prompt_logprobs: dict[Sequence, tuple[int, list[dict[int, Logprob]]]]
    errors: dict[Sequence, Exception]
    model_seconds: float


@dataclass(slots=True)
class Started:
    """A step whose model call is under way, and whose tokens are not chosen yet.

    Attributes:
        parts: those that sample.
        logits_RV: of these parts, or this rank's part of them; None where there are none.
        likeliest_R: of these logits, where a graph took them along with the model.
        prompts: log-probabilities of prompts.
        errors: by the sequence that the model could not compute.
        model_seconds: in the model.
    """

    step: Step
    parts: list[Scheduled]
    logits_RV: Tensor | None
    likeliest_R: Tensor | None
    prompts: list[tuple[Scheduled, TokenLogprobs]]
    errors: dict[Sequence, Exception]
    model_seconds: float

    @property
    def waits(self) -> bool:
        """Whether what a part may sample follows from a token of the step before, which the host
        does not know yet.
        """
        return any(part.pending and part.sequence.grammar is not None for part in self.parts)


@dataclass(slots=True)
class Launched:
    """A step that is under way on the device.

    Attributes:
        tokens_R, logprobs: what was sampled, on the host once the event has come.
        prompts: log-probabilities of prompts, likewise.
        event: behind the last copy to the host; None on a CPU.
        patience: seconds that its result is waited for at most; None for as long as it takes.
    """

    step: Step
    parts: list[Scheduled]
    tokens_R: Tensor | None
    logprobs: TokenLogprobs | None
    prompts: list[tuple[Scheduled, TokenLogprobs]]
    errors: dict[Sequence, Exception]
    model_seconds: float
    event: Any = None
    patience: float | None = None

    def result(self) -> StepResult:
        """Waits for it: the one synchronisation of a step."""
        begin = time.perf_counter()
        tokens: list[int] = []
        if self.event is not None:
            self._wait()
        if self.tokens_R is not None:
            tokens = self.tokens_R.tolist()
        waited = time.perf_counter() - begin
        sequences = [part.sequence for part in self.parts]
        logprobs: dict[Sequence, dict[int, Logprob]] = {}
        if self.logprobs is not None:
            found = self.logprobs
            most = {row: sequences[row].params.logprobs or 0 for row in found.rows}
            taken = [tokens[row] for row in found.rows]
            for row, entry in zip(found.rows, _mappings(found, taken, most), strict=True):
                logprobs[sequences[row]] = entry
        prompts = {}
        for part, found in self.prompts:
            sequence = part.sequence
            most = dict.fromkeys(found.rows, sequence.params.prompt_logprobs or 0)
            taken = [sequence.token_ids[position] for position in found.rows]
            prompts[sequence] = (found.rows[0], _mappings(found, taken, most))
        return StepResult(
            dict(zip(sequences, tokens, strict=True)),
            logprobs,
            prompts,
            self.errors,
            self.model_seconds + waited,
        )

    def _wait(self) -> None:
        """Waits for the device; where it waits for other ranks in turn, not for ever.

        Raises:
            ParallelError: `patience` is over. A captured graph has no time limit of its own.
        """
        if self.patience is None:
            self.event.synchronize()
            return
        begin = time.monotonic()
        while not self.event.query():
            waited = time.monotonic() - begin
            if waited > self.patience:
                raise ParallelError(f"another rank {NO_ANSWER} in {self.patience:g} s")
            nap = 0.0 if waited < _BUSY_SECONDS else min(_NAP_SHARE * waited, _LONGEST_NAP)
            time.sleep(nap)


def _mappings(
    found: TokenLogprobs, taken: list[int], most: dict[int, int]
) -> list[dict[int, Logprob]]:
    columns = (found.taken_R, found.rank_R, found.top_RN, found.ids_RN)
    own, ranks, tops, ids = (column.tolist() for column in columns)
    made = []
    for place, row in enumerate(found.rows):
        entry = {
            token: Logprob(value, rank + 1)
            for rank, (token, value) in enumerate(zip(ids[place], tops[place], strict=True))
            if rank < most[row]
        }
        entry.setdefault(taken[place], Logprob(own[place], ranks[place]))
        made.append(entry)
    return made


@dataclass(slots=True)
class Rows:
    """Logits of a step, and how many rows of them each part has."""

    parts: list[Scheduled] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def add(self, parts: Items[Scheduled], logits: Tensor) -> None:
        """Those of one model call."""
        self.parts += parts
        self.counts += map(kept_rows, parts)
        self.logits.append(logits)

    def merged(self) -> Tensor:
        """All of them."""
        return self.logits[0] if len(self.logits) == 1 else torch.cat(self.logits)


def prompt_logprobs(
    part: Scheduled, logits_RV: Tensor, *, one_by_one: bool = False
) -> TokenLogprobs | None:
    """Of the prompt's tokens that follow those of this part.

    Args:
        one_by_one: a row's bits are not to depend on how many rows there are.
    """
    ids, end = part.sequence.token_ids, part.sequence.prompt_len
    last = min(part.start + part.count, end - 1)
    if last <= part.start:
        return None
    following = to_device(ids[part.start + 1 : last + 1], logits_RV.device)
    rows = list(range(part.start + 1, last + 1))
    most = part.sequence.params.prompt_logprobs or 0
    logits_RV = logits_RV[: len(rows)].float()
    if not one_by_one:
        return token_logprobs(logits_RV, following, most, rows)
    return joined_logprobs(
        [
            token_logprobs(logits_RV[place : place + 1], following[place : place + 1], most, [row])
            for place, row in enumerate(rows)
        ]
    )
