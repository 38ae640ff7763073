"""Which tokens each step computes: first come first served, long prompts in chunks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from moetor.engine.blocks import BlockManager
from moetor.engine.outputs import FinishReason
from moetor.engine.sequence import Request, Scheduled, Sequence, Step


@dataclass(slots=True)
class SchedulerCounters:
    """What the scheduler has done since the start."""

    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0


class Scheduler:
    """Plans steps over running and waiting sequences.

    Sequences that have one token to compute come first, so that a long prompt never holds up those
    that generate; prompts share what is left of the budget, in the order of arrival. Where the
    cache is full, the sequence that came last gives its blocks back and is computed again later.
    A sequence whose tokens would not fit into the whole cache alone must be refused before it is
    added; the oldest one can therefore always go on.

    Args:
        blocks: of the cache.
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: tokens of one step.
        chunked_prefill: whether a prompt may be computed in parts; where not, it is computed alone
            in its step if it is longer than the budget.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunked_prefill: bool = True,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_batched_tokens
        self.chunked_prefill = chunked_prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counters = SchedulerCounters()
        self._rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.waiting and not self.running

    @property
    def rows_used(self) -> int:
        """Rows that sequences hold."""
        return self.max_num_seqs - len(self._rows)

    def add(self, request: Request) -> None:
        """Puts a request's sequences at the end of the queue."""
        self.waiting.extend(request.sequences)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence and frees all that it holds, at once."""
        sequence.finish_reason = reason
        if sequence.row is not None:
            self.running.remove(sequence)
            self._let_go(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Step:
        """The next step; without parts where nothing can be computed now."""
        budget = self.budget
        decodes: list[Scheduled] = []
        prompts: list[Scheduled] = []
        done: set[Sequence] = set()
        preempted = False
        # A sequence that is preempted here has not been reached yet: it stands further back.
        queue = [s for s in self.running if self._left(s) == 1]
        queue += [s for s in self.running if self._left(s) > 1]
        for sequence in queue:
            if budget == 0:
                break
            if sequence.row is None:
                continue
            count = self._chunk(sequence, budget, alone=not decodes and not prompts)
            if count == 0:
                continue
            while not self.blocks.grow(sequence.blocks, sequence.computed + count):
                victim = self._victim(sequence, done)
                preempted = True
                if victim is None:
                    break
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                part = self._plan(sequence, count)
                (decodes if part.count == 1 else prompts).append(part)
                done.add(sequence)
                budget = max(0, budget - count)
        while self.waiting and budget > 0 and not preempted and self._rows:
            sequence = self.waiting[0]
            if sequence.pending:
                break
            admitted = self._admit(sequence, budget, alone=not decodes and not prompts)
            if admitted is None:
                break
            (decodes if admitted.count == 1 else prompts).append(admitted)
            budget = max(0, budget - admitted.count)
        return Step([*decodes, *prompts])

    def _left(self, sequence: Sequence) -> int:
        """Tokens of a running sequence that are not computed; 0 where its last one is under way."""
        if sequence.generated >= sequence.limit:
            return 0
        return sequence.total - sequence.computed

    def _chunk(self, sequence: Sequence, budget: int, *, alone: bool) -> int:
        left = self._left(sequence)
        if left <= budget:
            return left
        if self.chunked_prefill and sequence.request.extra is None:
            return budget
        return left if alone else 0

    def _plan(self, sequence: Sequence, count: int) -> Scheduled:
        start = sequence.computed
        sequence.computed += count
        samples = sequence.computed == sequence.total
        part = Scheduled(
            sequence=sequence,
            start=start,
            count=count,
            samples=samples,
            pending=sequence.computed > sequence.known,
            position=sequence.generated,
        )
        if samples:
            sequence.pending += 1
        return part

    def _admit(self, sequence: Sequence, budget: int, *, alone: bool) -> Scheduled | None:
        """Lets the first of the queue run, or says that it must wait."""
        asks = sequence.params.prompt_logprobs is None and sequence.request.extra is None
        if asks:
            # The last token must be computed: its logits are what is wanted.
            found, hashes = self.blocks.find(sequence.token_ids, sequence.known - 1)
        else:
            found, hashes = [], []
        sequence.computed = len(found) * self.blocks.block_size
        count = self._chunk(sequence, budget, alone=alone)
        # A spare block for each running sequence, so that admitting one does not preempt it soon.
        spare = min(len(self.running), self.blocks.total // 100)
        wanted = self.blocks.needed(sequence.computed + count) - len(found)
        if count == 0 or wanted + spare > self.blocks.available:
            self.blocks.release(found)
            sequence.computed = 0
            return None
        self.waiting.popleft()
        self.blocks.grow(found, sequence.computed + count)
        sequence.blocks, sequence.hashes = found, hashes
        sequence.row = self._rows.pop()
        sequence.written_blocks = 0
        self.running.append(sequence)
        if asks and self.blocks.prefix_caching:
            self.counters.prefix_query_tokens += sequence.known
            self.counters.prefix_hit_tokens += sequence.computed
        if sequence.request.metrics.num_preemptions == 0:
            sequence.request.metrics.num_cached_tokens = sequence.computed
        return self._plan(sequence, count)

    def _victim(self, sequence: Sequence, done: set[Sequence]) -> Sequence | None:
        """The last to come that is not part of the step yet; the sequence itself if need be."""
        for candidate in reversed(self.running):
            if candidate is sequence or candidate not in done:
                return candidate
        return None

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._let_go(sequence)
        sequence.computed = 0
        sequence.request.metrics.num_preemptions += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self._rows.append(sequence.row)
        sequence.row = None
        sequence.cache = None
        sequence.hashes = []
        self.blocks.release(sequence.blocks)
