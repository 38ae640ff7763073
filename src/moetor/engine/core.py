"""The engine's loop body: schedule, launch, take the tokens in.

On a CUDA device step n + 1 is scheduled and launched before the tokens of step n are waited for:
the new tokens are fed back on the device, and what the host finds out late (an end token, a stop
string) costs a token that is thrown away. Where a text must follow a grammar, the model is launched
the same way, but what it may sample follows from the token before: step n is read, and the masks of
step n + 1 are computed, while the model of step n + 1 runs.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from moetor.engine.grammar import GrammarCompiler, GrammarError
from moetor.engine.launched import Launched, Started, StepResult
from moetor.engine.load import expert_counts
from moetor.engine.news import request_output
from moetor.engine.outputs import EngineStats, FinishReason, Logprob, RequestOutput
from moetor.engine.runner import Runner
from moetor.engine.scheduler import Scheduler
from moetor.engine.sequence import Request, Scheduled, Sequence, Step
from moetor.engine.text import TextBuilder, decode_function
from moetor.errors import ConfigError


class EngineCore:
    """Requests in, outputs out, one step at a time. Not thread-safe.

    Args:
        runner, scheduler: of the model.
        tokenizer: None leaves texts empty.
        grammars: for texts that must have a form.
        overlap: whether a step is launched before the one before it is read.

    Attributes:
        fatal: an error after which the device answers nothing else any more.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Any,
        grammars: GrammarCompiler,
        *,
        overlap: bool,
    ) -> None:
        self.runner, self.scheduler, self.tokenizer = runner, scheduler, tokenizer
        self.grammars = grammars
        self.requests: dict[str, Request] = {}
        self.fatal: Exception | None = None
        self._overlap = overlap
        self._flying: Launched | None = None
        self._decoders: dict[bool, Any] = {}
        self._pieces: dict[int, str] = {}
        self._counts = dict.fromkeys(
            ("prompt", "generated", "finished", "aborted", "failed", "steps"), 0
        )
        self._step_seconds = self._host_seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.idle and self._flying is None

    @property
    def shared(self) -> bool:
        """Whether other ranks make the same steps."""
        return False

    @property
    def data_parallel_size(self) -> int:
        """Cores that share the requests out."""
        return 1

    @property
    def patience(self) -> float | None:
        """Seconds without a step after which `rest` is to be called; None where nobody waits."""
        return None

    def expert_load(self) -> dict[str, list[int]]:
        """Tokens of each expert since the start, by the layer's path.

        Raises:
            ConfigError: nothing is counted.
        """
        return expert_counts(self.runner.load)

    def lead(self) -> None:
        """Tells whoever follows this core what it does, from now on."""

    def follow(self) -> None:
        """Does what another core does, until it ends; this one is nobody's follower."""
        raise ConfigError("an engine on one rank has nobody to follow")

    def rest(self) -> None:
        """Tells whoever waits for this core that there is nothing to do."""

    def close(self, error: BaseException | None = None) -> None:
        """Tells whoever waits for this core that no step follows, and why if not as planned."""

    def add(self, request: Request) -> None:
        """Queues a request, which `Intake` has found to be sound."""
        form = request.params.structured_outputs
        if form is not None:
            for sequence in request.sequences:
                sequence.grammar = self.grammars.start(form)
        self._register(request)
        self.scheduler.add(request)

    def _register(self, request: Request) -> None:
        self.requests[request.request_id] = request
        if self.tokenizer is not None:
            params = request.params
            decode = self._decoder(params.skip_special_tokens)
            for sequence in request.sequences:
                sequence.text = TextBuilder(
                    decode,
                    request.prompt_ids,
                    params.stop or (),
                    include_stop=params.include_stop_str_in_output,
                )

    def abort(self, request_id: str) -> Request | None:
        """Ends a request and frees what it holds; None where there is none of this name."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self._counts["aborted"] += 1
        self._end(request, "abort")
        return request

    def fail_all(self, error: Exception) -> list[Request]:
        """Ends every request with an error."""
        self._flying = None
        failed = list(self.requests.values())
        for request in failed:
            self.fail(request, error)
        return failed

    def step(self) -> list[Request]:
        """One step; the requests that it changed. Where a step is lost, its requests end with the
        error, and the others go on.
        """
        begin = time.perf_counter()
        step = self.scheduler.schedule()
        changed: dict[str, Request] = {}
        before, self._flying = self._flying, None
        launched: Launched | None = None
        if self._worth_starting(step):
            try:
                started = self._start(step)
                if before is not None and started is not None and started.waits:
                    self._receive(before, begin, changed)
                    before = None
                if started is not None:
                    launched = self.runner.sample(started)
                    self._note_errors(launched, changed)
            except Exception as error:
                self._lose(step, error, changed)
        ready, self._flying = (before, launched) if self._overlap else (launched, None)
        if ready is not None:
            self._receive(ready, begin, changed)
        return list(changed.values())

    def _receive(self, launched: Launched, begin: float, changed: dict[str, Request]) -> None:
        """Waits for a step's tokens and takes them in.

        Args:
            begin: of the call of `step` that this belongs to.
        """
        try:
            result = launched.result()
        except Exception as error:
            self._lose(launched.step, error, changed)
        else:
            self._take(launched, result, changed)
            self._step_seconds = time.perf_counter() - begin
            self._host_seconds = self._step_seconds - result.model_seconds

    def stats(self) -> EngineStats:
        """The counters."""
        scheduler, counts = self.scheduler, self._counts
        blocks, done = scheduler.blocks, scheduler.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_cache_usage=blocks.used / max(1, blocks.total),
            blocks_used=blocks.used,
            blocks_total=blocks.total,
            rows_used=scheduler.rows_used,
            prefix_hit_tokens=done.prefix_hit_tokens,
            prefix_query_tokens=done.prefix_query_tokens,
            prompt_tokens=counts["prompt"],
            generated_tokens=counts["generated"],
            requests_finished=counts["finished"],
            requests_aborted=counts["aborted"],
            requests_failed=counts["failed"],
            preemptions=done.preemptions,
            steps=counts["steps"],
            step_seconds=self._step_seconds,
            host_seconds=self._host_seconds,
            graph_steps=self.runner.graphs.replayed,
        )

    def _worth_starting(self, step: Step) -> bool:
        return bool(step.parts)

    def _start(self, step: Step) -> Started | None:
        now = time.monotonic()
        for part in step.parts:
            metrics = part.sequence.request.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
            self._counts["prompt"] += max(0, min(part.count, part.sequence.prompt_len - part.start))
        self._counts["steps"] += bool(step.parts)
        return self.runner.start(step)

    def _note_errors(self, launched: Launched, changed: dict[str, Request]) -> None:
        for sequence, error in launched.errors.items():
            request = sequence.request
            if not request.finished:
                self.fail(request, error)
                changed[request.request_id] = request

    def _lose(self, step: Step, error: Exception, changed: dict[str, Request]) -> None:
        requests = (part.sequence.request for part in step.parts)
        for request in {request.request_id: request for request in requests}.values():
            if not request.finished:
                self.fail(request, error)
                changed[request.request_id] = request

    def _take(self, launched: Launched, result: StepResult, changed: dict[str, Request]) -> None:
        now = time.monotonic()
        for part in launched.step.parts:
            sequence = part.sequence
            self._prompt_logprobs(part, result)
            token = result.tokens.get(sequence)
            if token is not None:
                sequence.pending -= 1
            if sequence.finished:
                continue
            in_blocks = self.runner.strategy.prefix_caching and not sequence.request.extra
            if in_blocks and sequence.row is not None:
                self.scheduler.blocks.file(
                    sequence.blocks,
                    sequence.hashes,
                    sequence.token_ids,
                    part.start + part.count,
                )
            if token is not None:
                metrics = sequence.request.metrics
                if metrics.first_token_time is None:
                    metrics.first_token_time = now
                try:
                    self._append(sequence, token, result.logprobs.get(sequence))
                except GrammarError as error:
                    self.fail(sequence.request, error)
                changed[sequence.request.request_id] = sequence.request
        for request in changed.values():
            if request.finished and request.request_id in self.requests:
                self._close(request)
                self._counts["finished"] += 1

    def _append(self, sequence: Sequence, token: int, logprobs: dict[int, Logprob] | None) -> None:
        params = sequence.params
        sequence.token_ids.append(token)
        self._counts["generated"] += 1
        if logprobs is not None and sequence.logprobs is not None:
            sequence.cumulative_logprob += logprobs[token].logprob
            sequence.logprobs.append(self._with_text(logprobs))
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
        count = sequence.known - sequence.prompt_len
        if token in sequence.ends and count > params.min_tokens:
            own = token in (params.stop_token_ids or ())
            sequence.stop_reason = token if own else None
            self._finish(sequence, "stop")
            return
        if params.stop and sequence.text is not None:
            since = len(sequence.text.text)
            sequence.text.extend([token])
            if count >= sequence.limit:
                sequence.text.finish()
            stop = sequence.text.find_stop(since) if count >= params.min_tokens else None
            if stop is not None:
                sequence.stop_reason = stop
                self._finish(sequence, "stop")
                return
        if sequence.grammar is not None and sequence.grammar.finished:
            self._finish(sequence, "stop")
        elif count >= sequence.limit:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if self.runner.routes is not None and reason in ("stop", "length"):
            sequence.routed_experts = self.runner.routes.of(sequence)
        self.scheduler.finish(sequence, reason)
        self.runner.forget(sequence)

    def _end(self, request: Request, reason: FinishReason) -> None:
        for sequence in request.sequences:
            if not sequence.finished:
                self._finish(sequence, reason)
        self._close(request)

    def fail(self, request: Request, error: Exception) -> None:
        """Ends a request with an error and frees what it holds."""
        lines = str(error).strip().splitlines() or [""]
        request.error = f"{type(error).__name__}: {lines[0]}".rstrip(": ")
        self._counts["failed"] += 1
        if isinstance(error, torch.AcceleratorError):
            self.fatal = error
        self._end(request, "error")

    def _close(self, request: Request) -> None:
        request.metrics.finished_time = time.monotonic()
        self.requests.pop(request.request_id, None)

    def _prompt_logprobs(self, part: Scheduled, result: StepResult) -> None:
        found = result.prompt_logprobs.get(part.sequence)
        held = part.sequence.request.prompt_logprobs
        # Every sequence of the request has the same prompt.
        if found is None or held is None or part.sequence.index:
            return
        # A preempted one computes it again, in other parts.
        known = len(held) - found[0]
        held.extend(self._with_text(entry) for entry in found[1][known:])

    def _with_text(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is None:
            return entry
        return {
            token: Logprob(found.logprob, found.rank, self._piece(token))
            for token, found in entry.items()
        }

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decoder(False)([token])
        return self._pieces[token]

    def _decoder(self, skip_special_tokens: bool) -> Any:
        if skip_special_tokens not in self._decoders:
            self._decoders[skip_special_tokens] = decode_function(
                self.tokenizer, skip_special_tokens=skip_special_tokens
            )
        return self._decoders[skip_special_tokens]

    def output(self, request: Request) -> RequestOutput:
        """The request's state now; what is new in it counts as handed out."""
        return request_output(request)
