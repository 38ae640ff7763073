"""Runs steps: one model call for all tokens where the family allows it, then sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

import torch
from torch import Tensor

from moetor.engine.alone import AloneCaller
from moetor.engine.batch import (
    BlockTable,
    DeviceInputs,
    device_inputs,
    host_inputs,
    kept_rows,
    no_inputs,
)
from moetor.engine.cache import Batch, EngineCache
from moetor.engine.graphs import DecodeGraphs, graph_sizes
from moetor.engine.launched import Launched, Rows, Started, prompt_logprobs
from moetor.engine.load import ExpertLoad
from moetor.engine.lockstep import Agreed, Lockstep
from moetor.engine.messages import gather
from moetor.engine.model import ServedModel
from moetor.engine.prompt_graphs import PromptGraphs, prompt_sizes
from moetor.engine.routes import SequenceRoutes
from moetor.engine.sampler import Sampled, Sampler, TokenLogprobs
from moetor.engine.sequence import Scheduled, Sequence, Step
from moetor.engine.state import StateSlots
from moetor.engine.strategy import Strategy
from moetor.errors import ConfigError
from moetor.layer.offload import ExpertOffload
from moetor.parallel.eplb.balancer import ExpertBalancer
from moetor.parallel.groups import ParallelGroups


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
    ) -> None:
        self.served, self.strategy, self.load, self.offload = served, strategy, load, offload
        self.lockstep = Lockstep(groups) if groups is not None and groups.config.joint else None
        self._ranks = groups
        self._patience = None if groups is None else groups.config.timeout
        self.balancer = balancer
        device = served.device
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.blocks = BlockTable(rows, max_blocks, block_size)
        self.sampler = Sampler(rows, device)
        # One row more than there are sequences: padded rows of a graph write there.
        self.last_token_P = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.alone = AloneCaller(served)
        self.graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None
        self.graph_steps = 0
        self._max_blocks = max_blocks
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

    def _recording(self) -> AbstractContextManager[None]:
        recorder = self.load if self.routes is None else self.routes
        return nullcontext() if recorder is None else recorder.recording()

    @torch.inference_mode()
    def start(self, step: Step) -> Started | None:
        """Calls the model; `sample` follows, and no other step between the two.

        Returns:
            None where neither this rank nor one that shares its experts has anything to compute.
        """
        agreed = self._agree(step)
        if agreed is not None and not agreed.calls:
            return None
        started = self._replay(step, agreed) or self._replay_prompts(step)
        started = started or self._run(step, agreed)
        if self.balancer is not None:
            self.balancer.step()
        return started

    def _agree(self, step: Step) -> Agreed | None:
        """What the ranks do in this step, where they must do it together."""
        if self.lockstep is None:
            return None
        plain = self.graphs is not None and self._plain(step.parts)
        if plain and self.graphs is not None:
            plain = len(step.parts) <= self.graphs.sizes[-1]
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
            with self._recording():
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
                found = prompt_logprobs(part, logits[first : first + count])
                if found is not None:
                    prompts.append((part, found))
            first += count
        if logits is not None and len(places) != logits.shape[0]:
            logits = logits[torch.tensor(places, device=logits.device)] if places else None
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
            kept = torch.tensor(going, device=logits.device)
            logits = logits[kept]
            tokens = None if tokens is None else tokens[kept]
        sampled = None
        if parts:
            assert logits is not None
            if tokens is not None and self.sampler.plain(parts):
                sampled = Sampled(tokens, None)
            else:
                sampled = self.sampler.sample(logits, parts)
                self._remember([part.sequence.row for part in parts], sampled.tokens_R)
        launched = Launched(
            started.step,
            parts,
            sampled,
            started.prompts,
            started.errors,
            started.model_seconds,
            patience=self._patience,
        )
        self._fetch(launched)
        return launched

    @property
    def stream_min_tokens(self) -> int | None:
        """From how many tokens on experts are copied to the GPU, which no graph can hold."""
        return None if self.offload is None else self.offload.stream_min_tokens

    @property
    def graph_sizes(self) -> list[int]:
        """Batch sizes to capture."""
        sizes, bound = graph_sizes(self.last_token_P.shape[0] - 1), self.stream_min_tokens
        return sizes if bound is None else [size for size in sizes if size < bound]

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Captures the decoding step in CUDA graphs; from then on it is replayed.

        Raises:
            RuntimeError: something in the model cannot be captured.
        """
        graphs = DecodeGraphs(
            self._decode if self.lockstep is None else self._decode_together,
            self.last_token_P,
            max_blocks=self._max_blocks,
            sizes=self.graph_sizes,
        )
        with torch.inference_mode(), self._recording():
            graphs.capture(progress)
        self.graphs = graphs

    def capture_prompts(
        self, max_tokens: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Captures steps with prompts in CUDA graphs, where all parts go through the model in one
        row, on one rank's account, with the experts on the GPU; padding would also be counted in
        the experts' load.

        Args:
            max_tokens: of a step.

        Raises:
            RuntimeError: something in the model cannot be captured.
        """
        shared = (self.lockstep, self.load, self.offload, self.states, self.routes)
        if not self.strategy.paged or any(one is not None for one in shared):
            return
        graphs = PromptGraphs(
            self._compute_prompts,
            self.last_token_P,
            sequences=self.last_token_P.shape[0] - 1,
            max_blocks=self._max_blocks,
            sizes=prompt_sizes(max_tokens),
        )
        with torch.inference_mode():
            graphs.capture(progress)
        self.prompt_graphs = graphs

    def _compute_prompts(
        self, ids_T: Tensor, positions_T: Tensor, keep_S: Tensor, batch: Batch
    ) -> Tensor:
        """Logits [S, V] of some tokens of packed parts; everything it needs is on the device."""
        assert self.cache is not None
        with self.served.paged_attention(), self.cache.running(batch, 1):
            logits, _ = self.served(ids_T[None], positions_T[None], self.cache, keep_S)
        return logits

    def _decode(self, ids_S: Tensor, positions_S: Tensor, rows_S: Tensor, batch: Batch) -> Tensor:
        """Logits [S, V] of one token of each row; everything it needs is on the device."""
        assert self.cache is not None
        shape = (1, -1) if self.states is None else (-1, 1)
        if self.states is not None:
            self.states.load(rows_S)
        with self.served.paged_attention(), self.cache.running(batch, 1):
            logits, _ = self.served(
                ids_S.view(shape), positions_S.view(shape), self.cache, rows=None
            )
        if self.states is not None:
            self.states.store(rows_S)
        return logits

    def _decode_together(
        self, ids_S: Tensor, positions_S: Tensor, rows_S: Tensor, batch: Batch
    ) -> Tensor:
        """The same where other ranks replay the same size."""
        assert self.lockstep is not None
        with self.lockstep.bounded(ids_S.shape[0]):
            return self._decode(ids_S, positions_S, rows_S, batch)

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
        self._decode(zero, zero, zero + (self.last_token_P.shape[0] - 1), batch)

    def _plain(self, parts: Items[Scheduled]) -> bool:
        """Whether all are single tokens behind others, as the graphs have them."""
        return all(
            part.count == 1 and part.samples and part.start and not self._goes_alone(part)
            for part in parts
        )

    def _replay(self, step: Step, agreed: Agreed | None) -> Started | None:
        """The step by a graph; None where it is none that was captured."""
        parts = step.parts
        if self.graphs is None or not (self._plain(parts) if agreed is None else agreed.replay):
            return None
        begin = time.perf_counter()
        self.blocks.update(parts)
        if self.offload is not None:
            self.offload.step()  # layers cannot, in a graph
        host = host_inputs(parts, self.blocks) if parts else no_inputs()
        found = self.graphs.run(host, 0 if agreed is None else agreed.rows)
        if found is None:
            return None
        self.graph_steps += 1
        logits, tokens = found
        return Started(step, parts, logits, tokens, [], {}, time.perf_counter() - begin)

    def _replay_prompts(self, step: Step) -> Started | None:
        """The same for a step with prompts."""
        parts = step.parts
        if self.prompt_graphs is None or any(
            self._goes_alone(part) or kept_rows(part) != part.samples for part in parts
        ):
            return None
        begin = time.perf_counter()
        self.blocks.update(parts)
        found = self.prompt_graphs.run(host_inputs(parts, self.blocks))
        if found is None:
            return None
        self.graph_steps += 1
        sampling = [part for part in parts if part.samples]
        logits, tokens = found if sampling else (None, None)
        return Started(step, sampling, logits, tokens, [], {}, time.perf_counter() - begin)

    def forward(self, parts: Items[Scheduled], errors: dict[Sequence, Exception]) -> Rows:
        """Logits of all parts; a part that the model cannot compute goes into `errors`."""
        self.blocks.update(parts)
        rows = Rows()
        for group, call in self._groups(parts):
            try:
                rows.add(group, call(group))
                continue
            except Exception as error:
                self._check_that_all_failed(error)
                if len(group) == 1:
                    errors[group[0].sequence] = error
                    continue
            # Writing the same keys and values a second time changes nothing.
            for part in group:
                try:
                    rows.add([part], call([part]))
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
        if self.lockstep is None:
            with suppress(RuntimeError):
                if len(set(gather(type(error).__name__, self._ranks.aside))) == 1:
                    return
        raise error

    def _groups(
        self, parts: Items[Scheduled]
    ) -> list[tuple[list[Scheduled], Callable[[list[Scheduled]], Tensor]]]:
        """Which parts go through the model together, and how."""
        own = [part for part in parts if self._goes_alone(part)]
        rest = [part for part in parts if not self._goes_alone(part)]
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

    def _goes_alone(self, part: Scheduled) -> bool:
        return not self.strategy.paged or part.sequence.request.extra is not None

    def _inputs(self, parts: list[Scheduled]) -> DeviceInputs:
        pending = any(part.pending for part in parts)
        return device_inputs(
            host_inputs(parts, self.blocks), self.last_token_P, any_pending=pending
        )

    def _call_packed(self, parts: list[Scheduled]) -> Tensor:
        """All tokens in one row."""
        assert self.cache is not None
        inputs = self._inputs(parts)
        with self.served.paged_attention(), self.cache.running(inputs.batch, parts[0].start):
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
        table = torch.tensor(rows, dtype=torch.int64)
        if self.device.type == "cuda":
            table = table.pin_memory().to(self.device, non_blocking=True)
        self.last_token_P.index_copy_(0, table, tokens_R)

    def _fetch(self, launched: Launched) -> None:
        """Starts the copy of the sampled tokens to the host."""
        if launched.sampled is None:
            return
        tokens = launched.sampled.tokens_R
        if self.device.type != "cuda":
            launched.host_tokens = tokens
            return
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        launched.host_tokens = host.copy_(tokens, non_blocking=True)
        launched.event = torch.cuda.Event()
        launched.event.record()
