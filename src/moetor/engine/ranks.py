"""The engine's core on one of several ranks.

The ranks of a tensor-parallel group schedule and sample alike, so that nothing but the model
communicates. Data-parallel groups have different requests: each request has one home, every rank
knows them all, and after a step the groups tell one another what became of theirs. So all ranks may
be driven by the same calls, as `LLM` does; under a server rank 0 decides, and tells the others
before every step what it has been asked (`lead`, `follow`).
"""

from __future__ import annotations

import itertools
import pickle
import time
import zlib
from array import array
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from moetor.engine.core import EngineCore
from moetor.engine.grammar import GrammarCompiler
from moetor.engine.load import summed
from moetor.engine.messages import broadcast, gather
from moetor.engine.outputs import EngineStats, Logprob
from moetor.engine.rank_news import RequestNews, SequenceNews, Told, added, follow_sequence
from moetor.engine.runner import Runner
from moetor.engine.scheduler import Scheduler
from moetor.engine.sequence import Request, Sequence, Step
from moetor.errors import MoetorError, ParallelError
from moetor.parallel.groups import ParallelGroups, agree
from moetor.parallel.launch import explain_waiting, tell_launcher

# Steps between two looks at whether a tensor-parallel group has made the same tokens.
_COMPARE_EVERY = 64
# Of the time after which a rank gives up waiting: rank 0 is heard so often while it has no work.
REST_SHARE = 0.1
_Next = Literal["step", "rest", "load", "end"]


@dataclass(frozen=True, slots=True)
class _Orders:
    """What rank 0 has done since the last step, and what it does next."""

    what: _Next
    done: list[tuple[Literal["add", "abort"], bytes]]
    error: str | None = None


class RankedCore(EngineCore):
    """Every rank makes the same calls in the same order, or follows rank 0.

    A failed step cannot be tried again, as other ranks may be in the middle of it: its error ends
    the core, and is raised.

    Args:
        groups: of the model.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Any,
        grammars: GrammarCompiler,
        *,
        overlap: bool,
        groups: ParallelGroups,
    ) -> None:
        super().__init__(runner, scheduler, tokenizer, grammars, overlap=overlap)
        self.groups = groups
        self._homes: dict[str, int] = {}
        self._sequences = [0] * self.data_parallel_size
        self._told: dict[Sequence, int] = {}
        self._numbers = itertools.count()
        self._number_of: dict[str, int] = {}
        self._by_number: dict[int, Request] = {}
        self._others: list[Told] = []
        self._digest = self._passes = 0
        self._leads = False
        self._done: list[tuple[Literal["add", "abort"], bytes]] = []

    @property
    def shared(self) -> bool:
        """See `EngineCore.shared`."""
        return True

    @property
    def data_parallel_size(self) -> int:
        """See `EngineCore.data_parallel_size`."""
        return self.groups.config.data_parallel_size

    @property
    def idle(self) -> bool:
        """Whether no rank has anything to do."""
        flying = self._flying is not None or any(one.flying for one in self._others)
        return not self.requests and not flying

    def add(self, request: Request) -> None:
        """Queues a request at the data-parallel group with the fewest unfinished sequences."""
        if self._leads:
            self._done.append(("add", pickle.dumps(request)))
        home = self._sequences.index(min(self._sequences))
        self._homes[request.request_id] = home
        number = next(self._numbers)
        self._number_of[request.request_id], self._by_number[number] = number, request
        self._sequences[home] += len(request.sequences)
        if home == self.groups.data_rank:
            super().add(request)
        else:
            self._register(request)

    def abort(self, request_id: str) -> Request | None:
        """See `EngineCore.abort`."""
        if self._leads:
            self._done.append(("abort", request_id.encode()))
        here = self._homes.get(request_id) == self.groups.data_rank
        request = super().abort(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            self._told.pop(sequence, None)
        if not here:
            self._counts["aborted"] -= 1  # its home counts it
        return request

    def fail_all(self, error: Exception) -> list[Request]:
        """See `EngineCore.fail_all`; the ranks cannot be put in step again."""
        if self.fatal is None:
            self._stopped_by(error)
        return super().fail_all(error)

    def _stopped_by(self, error: Exception) -> Exception:
        """No further step is possible; the launcher ends the ranks, one of which may hang."""
        self.fatal = failure(error)
        tell_launcher(str(self.fatal))
        return self.fatal

    def step(self) -> list[Request]:
        """See `EngineCore.step`.

        Raises:
            ParallelError: the step failed, here or on another rank; no further one is possible.
        """
        if self.fatal is not None:
            raise ParallelError(f"the engine has stopped: {self.fatal}")
        try:
            if self._leads:
                self._order("step")
            changed = super().step()
            if self.data_parallel_size > 1:
                changed += self._exchange(changed)
            self._compare()
        except Exception as error:
            raise self._stopped_by(error) from error
        return changed

    def stats(self) -> EngineStats:
        """The counters of all data-parallel groups; times and steps are this rank's."""
        mine = super().stats()
        for told in self._others:
            mine = added(mine, told.stats)
        return mine

    def expert_load(self) -> dict[str, list[int]]:
        """See `EngineCore.expert_load`: the sum over the ranks, which exchange it here and not in
        a step. Every rank calls it, or rank 0 leads.
        """
        if self.runner.load is None:
            return super().expert_load()  # refuses; on all ranks alike
        try:
            if self._leads:
                self._order("load")
            own = self.runner.load.own_counts(self.groups.tensor.rank())
            return summed(gather(own, self.groups.world))
        except Exception as error:
            raise self._stopped_by(error) from error

    def _worth_starting(self, step: Step) -> bool:
        return bool(step.parts) or self.runner.lockstep is not None

    def _lose(self, step: Step, error: Exception, changed: dict[str, Request]) -> None:
        raise error

    def _append(self, sequence: Sequence, token: int, logprobs: dict[int, Logprob] | None) -> None:
        self._digest = zlib.crc32(token.to_bytes(8, "little"), self._digest)
        super()._append(sequence, token, logprobs)

    def _close(self, request: Request) -> None:
        super()._close(request)
        home = self._homes.pop(request.request_id, None)
        if home is None:
            return
        self._sequences[home] -= len(request.sequences)
        self._by_number.pop(self._number_of.pop(request.request_id))

    def _compare(self) -> None:
        """A tensor-parallel group whose ranks sampled different tokens would go on with caches that
        do not belong together.
        """
        self._passes += 1
        if self.groups.config.tensor_parallel_size > 1 and self._passes % _COMPARE_EVERY == 0:
            agree({"the tokens that they have generated": self._digest}, self.groups.tensor)

    # Between data-parallel groups.

    def _exchange(self, changed: list[Request]) -> list[Request]:
        """Tells what became of this group's requests, and hears of the others'."""
        tokens: array[int] = array("q")
        news = [self._news(request) for request in changed if not self._brief(request, tokens)]
        mine = Told(tokens, news, self._flying is not None, super().stats())
        told = gather(mine, self.groups.data)
        told.pop(self.groups.data_rank)
        heard: dict[int, Request] = {}
        for one in told:
            self._hear_tokens(one.tokens, heard)
            for single in one.news:
                if single.request_id in self.requests:
                    request = self._hear(single)
                    heard[id(request)] = request
        self._others = [replace(one, tokens=array("q"), news=[]) for one in told]
        return list(heard.values())

    def _brief(self, request: Request, tokens: array[int]) -> bool:
        """Adds the request's next tokens to `tokens`, unless there is more to say of it."""
        if request.finished or request.error is not None:
            return False
        number = self._number_of[request.request_id]
        found: list[int] = []
        for index, sequence in enumerate(request.sequences):
            since = self._told.get(sequence, 0)
            new = sequence.known - sequence.prompt_len - since
            if not since or new > 1 or sequence.finished or sequence.logprobs is not None:
                return False
            if new:
                found += (number, index, sequence.token_ids[-1])
        for index in found[1::3]:
            self._told[request.sequences[index]] += 1
        tokens.extend(found)
        return True

    def _hear_tokens(self, tokens: array[int], heard: dict[int, Request]) -> None:
        for place in range(0, len(tokens), 3):
            request = self._by_number.get(tokens[place])
            if request is None:  # aborted meanwhile
                continue
            sequence, token = request.sequences[tokens[place + 1]], tokens[place + 2]
            if sequence.finished:
                continue
            if sequence.text is not None and sequence.params.stop:
                sequence.text.extend([token])
            sequence.token_ids.append(token)
            heard[id(request)] = request

    def _news(self, request: Request) -> RequestNews:
        sequences = []
        for sequence in request.sequences:
            since = self._told.get(sequence, 0)
            tokens = sequence.output_ids[since:]
            logprobs = [] if sequence.logprobs is None else sequence.logprobs[since:]
            self._told[sequence] = since + len(tokens)
            if sequence.finished:
                self._told.pop(sequence)
            sequences.append(
                SequenceNews(tokens, logprobs, sequence.finish_reason, sequence.stop_reason)
            )
        metrics = request.metrics
        return RequestNews(
            request.request_id,
            sequences,
            request.prompt_logprobs if request.finished else None,
            metrics.num_cached_tokens,
            metrics.num_preemptions,
            request.error,
        )

    def _hear(self, news: RequestNews) -> Request:
        request = self.requests[news.request_id]
        request.error = news.error
        if news.prompt_logprobs is not None:
            request.prompt_logprobs = news.prompt_logprobs
        metrics, now = request.metrics, time.monotonic()
        metrics.num_cached_tokens = news.cached_tokens
        metrics.num_preemptions = news.preemptions
        metrics.first_scheduled_time = metrics.first_scheduled_time or now
        for sequence, told in zip(request.sequences, news.sequences, strict=True):
            if told.tokens:
                metrics.first_token_time = metrics.first_token_time or now
            follow_sequence(sequence, told)
        if request.finished:
            self._close(request)
        return request

    # Under a server.

    @property
    def patience(self) -> float | None:
        """See `EngineCore.patience`."""
        return self.groups.config.timeout * REST_SHARE if self._leads else None

    def lead(self) -> None:
        """See `EngineCore.lead`: on rank 0; the others must `follow`."""
        assert self.groups.rank == 0, "the server is on rank 0"
        self._leads = True

    def rest(self) -> None:
        """See `EngineCore.rest`.

        Raises:
            ParallelError: another rank has ended.
        """
        try:
            self._order("rest")
        except Exception as error:
            raise self._stopped_by(error) from error

    def close(self, error: BaseException | None = None) -> None:
        """Ends the ranks that follow, as far as they are still there."""
        if self._leads:
            self._leads = False
            with suppress(RuntimeError):
                self._order("end", None if error is None else str(error))

    def _order(self, what: _Next, error: str | None = None) -> None:
        done, self._done = self._done, []
        broadcast(_Orders(what, done, error), self.groups.world)

    def _add_or_fail(self, request: Request) -> None:
        """As rank 0 has queued it; what it could not queue ends here as there."""
        try:
            self.add(request)
        except Exception as error:
            self.fail(request, error)

    def follow(self) -> None:
        """Does what rank 0 does, until it ends.

        Raises:
            ParallelError: rank 0 or a step has failed, or rank 0 was silent for too long.
        """
        while True:
            try:
                orders: _Orders = broadcast(None, self.groups.world)
            except Exception as error:
                raise failure(error) from error
            for what, words in orders.done:
                if what == "add":
                    self._add_or_fail(pickle.loads(words))
                else:
                    self.abort(words.decode())
            if orders.error is not None:
                raise ParallelError(f"rank 0 has stopped: {orders.error}")
            if orders.what == "end":
                return
            if orders.what == "step":
                self.step()
            elif orders.what == "load":
                self.expert_load()


def failure(error: Exception) -> Exception:
    """The error as it is told: what a collective's own error means."""
    if isinstance(error, MoetorError):
        return error
    text = f"{type(error).__name__}: {error}"
    return ParallelError(explain_waiting(text) or text)
