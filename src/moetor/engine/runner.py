"""Runs steps: one model call for all tokens where the family allows it, then sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import ExitStack, suppress
from typing import cast

import torch
from torch import Tensor

from moetor.engine.alone import AloneCaller
from moetor.engine.batch import (
    BlockTable,
    DeviceInputs,
    device_inputs,
    host_inputs,
    tokens_apart,
)
from moetor.engine.cache import Batch, EngineCache
from moetor.engine.launched import Launched, Rows, Started, prompt_logprobs
from moetor.engine.load import ExpertLoad
from moetor.engine.lockstep import Agreed, Lockstep
from moetor.engine.messages import gather
from moetor.engine.model import ServedModel
from moetor.engine.replay import StepGraphs
from moetor.engine.routes import SequenceRoutes
from moetor.engine.sampler import Sampled, Sampler, TokenLogprobs
from moetor.engine.sequence import Scheduled, Sequence, Step
from moetor.engine.state import StateSlots
from moetor.engine.strategy import Strategy
from moetor.engine.transfer import to_device, to_host
from moetor.errors import ConfigError
from moetor.kernels.rows_apart import rows_apart
from moetor.layer.offload import ExpertOffload
from moetor.parallel.eplb.balancer import ExpertBalancer
from moetor.parallel.groups import ParallelGroups
from moetor.parallel.launch import explain_waiting


class Runner:
    """Owns the cache's tensors, the state slots and the tables by row.

    Args:
        served: the model.
        strategy: how its family is cached.
        num_blocks, block_size: of the paged cache.
        rows: sequences at the same time.
        max_model_len: tokens of a sequence.
        load: counts what experts are chosen, in every call.
        groups: the ranks that the model is spread over; None for a whole one.
        balancer: moves experts between steps, under EPLB.
        offload: experts in host memory.
        batch_invariant: a token's bits depend on its own sequence alone.
    """

    def __init__(
        self,
        served: ServedModel,
        strategy: Strategy,
        *,
        num_blocks: int,
        block_size: int,
        rows: int,
        max_model_len: int,
        load: ExpertLoad | None = None,
        groups: ParallelGroups | None = None,
        balancer: ExpertBalancer | None = None,
        offload: ExpertOffload | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.served, self.strategy, self.load = served, strategy, load
        self.batch_invariant = batch_invariant
        self.lockstep = Lockstep(groups) if groups is not None and groups.config.joint else None
        self._ranks = groups
        self._patience = None if groups is None else groups.config.timeout
        self.balancer = balancer
        device = served.device
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.blocks = BlockTable(rows, max_blocks, block_size)
        self.sampler = Sampler(rows, device, batch_invariant=batch_invariant)
        # One row more than there are sequences: padded rows of a graph write there.
        self.last_token_P = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.alone = AloneCaller(served)
        self.cache: EngineCache | None = None
        self.states: StateSlots | None = None
        self.routes: SequenceRoutes | None = None
        if strategy.paged:
            self.cache = EngineCache(
                served.config,
                strategy.shapes,
                num_blocks=num_blocks,
                block_size=block_size,
                device=device,
            )
            if strategy.has_states:
                self.states = StateSlots(
                    served.config, self.cache.layers, strategy.example_layers, rows + 1
                )
        self.graphs = StepGraphs(
            served,
            self.cache,
            self.states,
            blocks=self.blocks,
            last_token_P=self.last_token_P,
            max_blocks=max_blocks,
            lockstep=self.lockstep,
            recorder=load,
            offload=offload,
            balanced=balancer is not None,
        )

    def keep_routes(self, num_blocks: int, block_size: int) -> None:
        """Notes from now on which experts each token goes to; before graphs are captured.

        Raises:
            ConfigError: it cannot be noted here.
        """
        if self.cache is None or self._ranks is not None:
            reason = "each sequence has a cache of its own" if self.cache is None else ""
            raise ConfigError(
                "enable_return_routed_experts is for one rank and a paged cache; here "
                + (reason or "several ranks share the model")
            )
        self.routes = SequenceRoutes(
            self.served.composite,
            self.cache,
            slots=num_blocks * block_size,
            block_size=block_size,
            outer=self.load,
        )
        self.graphs.recorder = self.routes

    @torch.inference_mode()
    def start(self, step: Step) -> Started | None:
        """Calls the model; `sample` follows, and no other step between the two.

        Returns:
            None where neither this rank nor one that shares its experts has anything to compute.
        """
        agreed = self._agree(step)
        if agreed is not None and not agreed.calls:
            return None
        started = self.graphs.replay(step, agreed) or self.graphs.replay_prompts(step)
        started = started or self._run(step, agreed)
        if self.balancer is not None:
            self.balancer.step()
        return started

    def _agree(self, step: Step) -> Agreed | None:
        """What the ranks do in this step, where they must do it together."""
        if self.lockstep is None:
            return None
        decode = self.graphs.decode
        plain = decode is not None and self.graphs.plain(step.parts)
        if plain and decode is not None:
            plain = len(step.parts) <= decode.sizes[-1]
        groups = self._groups(step.parts)
        rows = [sum(part.count for part in group) for group, _ in groups]
        return self.lockstep.agree(rows, replay=plain)

    def _run(self, step: Step, agreed: Agreed | None) -> Started:
        """The step by the model's own code."""
        begin = time.perf_counter()
        errors: dict[Sequence, Exception] = {}
        with ExitStack() as around:
            if agreed is not None and self.lockstep is not None:
                around.enter_context(self.lockstep.bounded(agreed.rows))
            rows = self.forward(step.parts, errors)
            for _ in range(0 if agreed is None else agreed.calls - len(self._groups(step.parts))):
                self._call_nobody()
        model_seconds = time.perf_counter() - begin
        sampling: list[Scheduled] = []
        places: list[int] = []
        prompts: list[tuple[Scheduled, TokenLogprobs]] = []
        logits = rows.merged() if rows.logits else None
        first = 0
        for part, count in zip(rows.parts, rows.counts, strict=True):
            if part.samples:
                sampling.append(part)
                places.append(first + count - 1)
            if count and part.sequence.params.prompt_logprobs is not None:
                assert logits is not None
                own = self.served.whole(logits[first : first + count])
                found = prompt_logprobs(part, own, one_by_one=self.batch_invariant)
                if found is not None:
                    prompts.append((part, found))
            first += count
        if logits is not None and len(places) != logits.shape[0]:
            logits = logits[to_device(places, logits.device)] if places else None
        return Started(step, sampling, logits, None, prompts, errors, model_seconds)

    @torch.inference_mode()
    def sample(self, started: Started) -> Launched:
        """Chooses the step's tokens; they are also kept on the device, for the next one.

        Sequences that have ended since the step was started are left out.
        """
        parts, logits, tokens = started.parts, started.logits_RV, started.likeliest_R
        going = [row for row, part in enumerate(parts) if not part.sequence.finished]
        if logits is not None and len(going) != len(parts):
            parts = [parts[row] for row in going]
            kept = to_device(going, logits.device)
            logits = logits[kept]
            tokens = None if tokens is None else tokens[kept]
        sampled = None
        if parts:
            assert logits is not None
            plain = self.sampler.plain(parts)
            if tokens is not None and plain:
                sampled = Sampled(tokens, None)
            else:
                if plain:
                    sampled = Sampled(self.served.likeliest(logits), None)
                else:
                    sampled = self.sampler.sample(self.served.whole(logits), parts)
                self._remember([part.sequence.row for part in parts], sampled.tokens_R)
        return self._fetched(started, parts, sampled)

    def _call_nobody(self) -> None:
        """A model call for other ranks' sake: one token, in the row and block of nobody."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        batch = Batch(
            slots_T=zero,
            block_table_SM=torch.zeros((1, 1), dtype=torch.int32, device=self.device),
            seq_lens_S=torch.ones(1, dtype=torch.int32, device=self.device),
            query_start_S1=torch.arange(2, dtype=torch.int32, device=self.device),
            num_decodes=1,
            max_query_len=1,
            lens=[1],
            query_lens=[1],
        )
        self.graphs.compute(zero, zero, zero + (self.last_token_P.shape[0] - 1), batch)

    def forward(self, parts: Items[Scheduled], errors: dict[Sequence, Exception]) -> Rows:
        """Logits of all parts; a part that the model cannot compute goes into `errors`."""
        self.blocks.update(parts)
        rows = Rows()
        for group, call in self._groups(parts):
            try:
                with self.graphs.recording():
                    logits = call(group)
                rows.add(group, logits)
                continue
            except Exception as error:
                self._check_that_all_failed(error)
                if len(group) == 1:
                    errors[group[0].sequence] = error
                    continue
            # Writing the same keys and values a second time changes nothing.
            for part in group:
                try:
                    with self.graphs.recording():
                        logits = call([part])
                    rows.add([part], logits)
                except Exception as error:
                    self._check_that_all_failed(error)
                    errors[part.sequence] = error
        return rows

    def _check_that_all_failed(self, error: Exception) -> None:
        """Ranks that compute the same go on together where all of them have failed alike. Another
        one may be in the middle of the call instead, and does not answer: then none can go on.

        Raises:
            Exception: the error, where they cannot.
        """
        if self._ranks is None:
            return
        # Who has waited for another rank in vain must not wait for its answer just as long.
        if self.lockstep is None and explain_waiting(str(error)) is None:
            with suppress(RuntimeError):
                if len(set(gather(type(error).__name__, self._ranks.aside))) == 1:
                    return
        raise error

    def _groups(
        self, parts: Items[Scheduled]
    ) -> list[tuple[list[Scheduled], Callable[[list[Scheduled]], Tensor]]]:
        """Which parts go through the model together, and how."""
        own = [part for part in parts if self.graphs.goes_alone(part)]
        rest = [part for part in parts if not self.graphs.goes_alone(part)]
        groups: list[tuple[list[Scheduled], Callable[[list[Scheduled]], Tensor]]] = [
            ([part], self._call_own) for part in own
        ]
        if not rest:
            return groups
        if self.states is None:
            return [(rest, self._call_packed), *groups]
        # A sequence without a past has no state to take out of its slot.
        together = [part for part in rest if part.count == 1 and part.start]
        if together:
            groups.append((together, self._call_states))
        single = [part for part in rest if part.count > 1 or not part.start]
        return [*groups, *(([part], self._call_states) for part in single)]

    def _inputs(self, parts: list[Scheduled]) -> DeviceInputs:
        pending = any(part.pending for part in parts)
        host = host_inputs(parts, self.blocks)
        if self.batch_invariant:
            host = tokens_apart(host)
        return device_inputs(host, self.last_token_P, any_pending=pending)

    def _call_packed(self, parts: list[Scheduled]) -> Tensor:
        """All tokens in one row."""
        assert self.cache is not None
        inputs = self._inputs(parts)
        with ExitStack() as around:
            around.enter_context(self.served.paged_attention())
            around.enter_context(self.cache.running(inputs.batch, parts[0].start))
            if self.batch_invariant:
                around.enter_context(rows_apart())
            logits, _ = self.served(
                inputs.ids_T[None],
                inputs.positions_T[None],
                self.cache,
                inputs.keep,
            )
        return logits

    def _call_states(self, parts: list[Scheduled]) -> Tensor:
        """A row for each sequence: one token of several, or several tokens of one."""
        assert self.cache is not None
        assert self.states is not None
        inputs = self._inputs(parts)
        rows = len(parts)
        if parts[0].start:
            self.states.load(inputs.rows_S)
        else:
            self.states.clear()
        with self.served.paged_attention(), self.cache.running(inputs.batch, parts[0].start):
            logits, _ = self.served(
                inputs.ids_T.view(rows, -1),
                inputs.positions_T.view(rows, -1),
                self.cache,
                inputs.keep,
            )
        self.states.store(inputs.rows_S)
        return logits

    def _call_own(self, parts: list[Scheduled]) -> Tensor:
        """One sequence with the model's own cache."""
        inputs = self._inputs(parts)
        return self.alone(parts[0], inputs.ids_T, inputs.positions_T, inputs.keep)

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept of a sequence that has ended."""
        sequence.cache = None
        self.sampler.forget(sequence)

    def _remember(self, rows: list[int | None], tokens_R: Tensor) -> None:
        self.last_token_P.index_copy_(0, to_device(cast("list[int]", rows), self.device), tokens_R)

    def _fetched(
        self, started: Started, parts: list[Scheduled], sampled: Sampled | None
    ) -> Launched:
        """Starts the copies of all that the host will read: later ones would wait for the next
        step, too.
        """
        logprobs = None if sampled is None else sampled.logprobs
        launched = Launched(
            started.step,
            parts,
            None if sampled is None else to_host(sampled.tokens_R),
            None if logprobs is None else logprobs.to_host(),
            [(part, found.to_host()) for part, found in started.prompts],
            started.errors,
            started.model_seconds,
            patience=self._patience,
        )
        if self.device.type == "cuda" and (sampled is not None or launched.prompts):
            launched.event = torch.cuda.Event()
            launched.event.record()
        return launched
