"""Steps as CUDA graphs: which ones there are, their model calls, and replaying them."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moetor.engine.batch import BlockTable, host_inputs, kept_rows, no_inputs
from moetor.engine.cache import Batch, EngineCache
from moetor.engine.graphs import DecodeGraphs, graph_sizes
from moetor.engine.launched import Started
from moetor.engine.load import ExpertLoad
from moetor.engine.lockstep import Agreed, Lockstep
from moetor.engine.model import ServedModel
from moetor.engine.prompt_graphs import PromptGraphs, prompt_sizes
from moetor.engine.rotary import RotaryTables
from moetor.engine.routes import SequenceRoutes
from moetor.engine.sequence import Scheduled, Step
from moetor.engine.state import StateSlots
from moetor.layer.context import only_tokens
from moetor.layer.offload import ExpertOffload


class StepGraphs:
    """Captures steps and replays them.

    Args:
        served: the model.
        cache: its paged cache; None where each sequence has one of its own.
        states: of the layers that keep no keys.
        blocks: of each row.
        last_token_P: token that each row sampled last; its last row belongs to nobody.
        max_blocks: of a sequence.
        lockstep: the agreement with ranks that share the experts.
        recorder: notes what experts are chosen, also in replayed steps.
        offload: experts in host memory.
        balanced: whether layers count what experts are chosen, to move them.

    Attributes:
        decode: of steps of single tokens; None before they are captured.
        prompts: of steps with prompts; likewise.
        replayed: steps so far.
    """

    def __init__(
        self,
        served: ServedModel,
        cache: EngineCache | None,
        states: StateSlots | None,
        *,
        blocks: BlockTable,
        last_token_P: Tensor,
        max_blocks: int,
        lockstep: Lockstep | None = None,
        recorder: ExpertLoad | None = None,
        offload: ExpertOffload | None = None,
        balanced: bool = False,
    ) -> None:
        self.served, self.cache, self.states = served, cache, states
        self.lockstep, self.offload, self._balanced = lockstep, offload, balanced
        self.recorder: ExpertLoad | SequenceRoutes | None = recorder
        self.decode: DecodeGraphs | None = None
        self.prompts: PromptGraphs | None = None
        self.replayed = 0
        self._rotary: RotaryTables | None = None
        self._blocks, self._last_token_P, self._max_blocks = blocks, last_token_P, max_blocks

    def drop(self) -> None:
        """Nothing is replayed any more."""
        self.decode = self.prompts = None

    def goes_alone(self, part: Scheduled) -> bool:
        """Whether a part goes through the model with a cache of its own."""
        return self.cache is None or part.sequence.request.extra is not None

    def recording(self) -> AbstractContextManager[None]:
        """What experts are chosen by the model call inside is noted."""
        return nullcontext() if self.recorder is None else self.recorder.recording()

    @property
    def stream_min_tokens(self) -> int | None:
        """From how many tokens on experts are copied to the GPU, which no graph can hold."""
        return None if self.offload is None else self.offload.stream_min_tokens

    @property
    def sizes(self) -> list[int]:
        """Batch sizes to capture."""
        sizes, bound = graph_sizes(self._last_token_P.shape[0] - 1), self.stream_min_tokens
        return sizes if bound is None else [size for size in sizes if size < bound]

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Captures the decoding step in CUDA graphs; from then on it is replayed.

        Raises:
            RuntimeError: something in the model cannot be captured.
        """
        with torch.inference_mode():
            positions = self._max_blocks * self._blocks.block_size
            self._rotary = RotaryTables(self.served.model, positions)
        graphs = DecodeGraphs(
            self.compute if self.lockstep is None else self._compute_together,
            self.served.likeliest,
            self._last_token_P,
            max_blocks=self._max_blocks,
            sizes=self.sizes,
        )
        with torch.inference_mode():
            graphs.capture(progress)
        self.decode = graphs

    def capture_prompts(
        self, max_tokens: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Captures steps with prompts in CUDA graphs, where all parts go through the model in one
        row, on one rank's account, with the experts on the GPU. The routes of each token are noted
        by its place in the cache, which padding does not have.

        Args:
            max_tokens: of a step.

        Raises:
            RuntimeError: something in the model cannot be captured.
        """
        routes = self.recorder if isinstance(self.recorder, SequenceRoutes) else None
        shared = (self.lockstep, routes, self.offload, self.states)
        if self.cache is None or any(one is not None for one in shared):
            return
        graphs = PromptGraphs(
            self._compute_prompts,
            self.served.likeliest,
            self._last_token_P,
            sequences=self._last_token_P.shape[0] - 1,
            max_blocks=self._max_blocks,
            sizes=prompt_sizes(max_tokens),
        )
        with torch.inference_mode():
            graphs.capture(progress)
        self.prompts = graphs

    def _compute_prompts(
        self, ids_T: Tensor, positions_T: Tensor, keep_S: Tensor, batch: Batch
    ) -> Tensor:
        """Logits [S, V] of some tokens of packed parts; everything it needs is on the device."""
        assert self.cache is not None
        with (
            self.recording(),
            self._only_tokens(lambda: batch.slots_T >= 0),
            self.served.paged_attention(),
            self.cache.running(batch, 1),
        ):
            logits, _ = self.served(ids_T[None], positions_T[None], self.cache, keep_S)
        return logits

    def _only_tokens(self, tokens: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """Which rows of a call are somebody's, where anything is counted: bool [T]."""
        return (
            only_tokens(tokens()) if self.recorder is not None or self._balanced else nullcontext()
        )

    def compute(self, ids_S: Tensor, positions_S: Tensor, rows_S: Tensor, batch: Batch) -> Tensor:
        """Logits [S, V] of one token of each row; everything it needs is on the device."""
        assert self.cache is not None
        shape = (1, -1) if self.states is None else (-1, 1)
        nobody = self._last_token_P.shape[0] - 1
        if self.states is not None:
            self.states.load(rows_S)
        looked_up = nullcontext() if self._rotary is None else self._rotary.used()
        with (
            self.recording(),
            self._only_tokens(lambda: rows_S != nobody),
            looked_up,
            self.served.paged_attention(),
            self.cache.running(batch, 1),
        ):
            logits, _ = self.served(
                ids_S.view(shape), positions_S.view(shape), self.cache, rows=None
            )
        if self.states is not None:
            self.states.store(rows_S)
        return logits

    def _compute_together(
        self, ids_S: Tensor, positions_S: Tensor, rows_S: Tensor, batch: Batch
    ) -> Tensor:
        """The same where other ranks replay the same size."""
        assert self.lockstep is not None
        with self.lockstep.bounded(ids_S.shape[0]):
            return self.compute(ids_S, positions_S, rows_S, batch)

    def plain(self, parts: Items[Scheduled]) -> bool:
        """Whether all are single tokens behind others, as the graphs have them."""
        return all(
            part.count == 1 and part.samples and part.start and not self.goes_alone(part)
            for part in parts
        )

    def replay(self, step: Step, agreed: Agreed | None) -> Started | None:
        """The step by a graph; None where it is none that was captured."""
        parts = step.parts
        if self.decode is None or not (self.plain(parts) if agreed is None else agreed.replay):
            return None
        begin = time.perf_counter()
        self._blocks.update(parts)
        if self.offload is not None:
            self.offload.step()  # layers cannot, in a graph
        host = host_inputs(parts, self._blocks) if parts else no_inputs()
        found = self.decode.run(host, 0 if agreed is None else agreed.rows)
        if found is None:
            return None
        self.replayed += 1
        logits, tokens = found
        return Started(step, parts, logits, tokens, [], {}, time.perf_counter() - begin)

    def replay_prompts(self, step: Step) -> Started | None:
        """The same for a step with prompts."""
        parts = step.parts
        if (
            self.prompts is None
            or not self.prompts.holds(sum(part.count for part in parts), len(parts))
            or any(self.goes_alone(part) or kept_rows(part) != part.samples for part in parts)
        ):
            return None
        begin = time.perf_counter()
        self._blocks.update(parts)
        found = self.prompts.run(host_inputs(parts, self._blocks))
        self.replayed += 1
        sampling = [part for part in parts if part.samples]
        logits, tokens = found if sampling else (None, None)
        return Started(step, sampling, logits, tokens, [], {}, time.perf_counter() - begin)
