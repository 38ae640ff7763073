"""The trial of a strategy: the engine's cache against the model's own, on random tokens."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetor.engine.model import ServedModel
from moetor.engine.outputs import RequestMetrics
from moetor.engine.params import SamplingParams
from moetor.engine.runner import Runner
from moetor.engine.sequence import Request, Scheduled, Sequence
from moetor.engine.strategy import (
    ENCODER_DECODER,
    Strategy,
    expected_strategy,
    layer_shapes,
)
from moetor.errors import UnsupportedError

Plan = tuple[tuple[int, ...], ...]
_LENGTHS = (21, 9, 38)
_BLOCK = 8
# Tokens of each sequence in each call: parts of prompts among single tokens, and single tokens.
CHUNKED: Plan = ((7, 9, 0), (14, 0, 30), (0, 0, 8), (1, 1, 1), (1, 1, 1))
_WHOLE: Plan = ((21, 9, 0), (1, 0, 38), (1, 1, 1), (0, 1, 1))
# Of a row's difference, relative to the logits: a wrong key gives about 1, another order of sums a
# few roundings. In half precision a token may change its experts, so that the median is taken.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
_HALF_TOLERANCE = 0.3


def choose_strategy(served: ServedModel) -> Strategy:
    """The best strategy under which the model gives its own logits.

    Raises:
        UnsupportedError: there is none.
        Exception: what the model raises with its own cache.
    """
    if served.is_encoder_decoder:
        return ENCODER_DECODER
    expected = expected_strategy(served.config)
    tokens = random_tokens(served)
    wanted, example = _own_logits(served, tokens)
    shapes = layer_shapes(served.config, example)
    reason = expected.reason
    if expected.paged:
        best = replace(expected, shapes=shapes, example_layers=example)
        for candidate in (best, replace(best, chunked_prefill=False)):
            failure = _failure(served, candidate, tokens, wanted)
            if failure is None:
                return replace(candidate, proved=True)
            if candidate.chunked_prefill:
                reason = f"with the engine's cache {failure}"
    # In one piece, as `generate` has it: some of these caches are not exact otherwise.
    own = Strategy(name="own cache", reason=reason, shapes=shapes, chunked_prefill=False)
    failure = _failure(served, own, tokens, wanted)
    if failure is None:
        return replace(own, proved=True)
    raise UnsupportedError(
        f"{type(served.model).__name__} does not give the same logits twice: with a cache of its "
        f"own and the prompt in one piece {failure}"
    )


def random_tokens(served: ServedModel) -> list[list[int]]:
    """Three sequences that no trial need tokenise."""
    generator = torch.Generator().manual_seed(1)
    kept = served.placeholders()
    ids = [i for i in range(3, min(served.vocab_size, 4096)) if i not in kept]
    return [
        [ids[i] for i in torch.randint(len(ids), (length + 2,), generator=generator).tolist()]
        for length in _LENGTHS
    ]


@torch.inference_mode()
def _own_logits(served: ServedModel, tokens: list[list[int]]) -> tuple[list[Tensor], list[object]]:
    """Of each sequence's last three tokens [3, V], and the layers of the last cache."""
    device, wanted = served.device, []
    layers: list[object] = []
    for ids in tokens:
        cache: Any = None
        found = []
        begin = 0
        for end in (len(ids) - 2, len(ids) - 1, len(ids)):
            given = torch.tensor([ids[begin:end]], device=device)
            places = torch.arange(begin, end, device=device)[None]
            last = torch.tensor([end - begin - 1], device=device)
            logits, cache = served(given, places, cache, last)
            found.append(logits)
            begin = end
        wanted.append(torch.cat(found).float())
        layers = list(cache.layers)
    return wanted, layers


def _failure(
    served: ServedModel, strategy: Strategy, tokens: list[list[int]], wanted: list[Tensor]
) -> str | None:
    """What goes wrong under a strategy, in half a sentence; None where nothing does."""
    found = run_plan(served, strategy, tokens, CHUNKED if strategy.chunked_prefill else _WHOLE)
    if isinstance(found, str):
        return found
    return apart(found, wanted)


def apart(found: list[Tensor], wanted: list[Tensor]) -> str | None:
    """Says that logits [3, V] of some sequences differ by more than their dtype explains."""
    both = zip(found, wanted, strict=True)
    worst = max(_difference(got.float(), own.float()) for got, own in both)
    limit = _TOLERANCE.get(found[0].dtype, _HALF_TOLERANCE)
    # Written so that a result that is no number fails.
    return None if worst <= limit else f"its logits differ by {worst:.2g} of their size"


def run_plan(
    served: ServedModel,
    strategy: Strategy,
    tokens: list[list[int]],
    plan: Plan,
    *,
    batch_invariant: bool = False,
) -> list[Tensor] | str:
    """Logits [3, V] of each sequence's last three tokens; or what goes wrong, in half a sentence.

    Args:
        plan: tokens of each sequence in each call.
    """
    blocks_each = -(-max(map(len, tokens)) // _BLOCK)
    runner = Runner(
        served,
        strategy,
        num_blocks=len(tokens) * blocks_each + 1,
        block_size=_BLOCK,
        rows=len(tokens),
        max_model_len=blocks_each * _BLOCK,
        batch_invariant=batch_invariant,
    )
    sequences = [_sequence(index, ids, blocks_each) for index, ids in enumerate(tokens)]
    found: list[list[Tensor]] = [[] for _ in tokens]
    done = [0] * len(tokens)
    for counts in plan:
        parts = []
        for sequence in sorted(sequences, key=lambda s: counts[s.index] > 1):
            count = counts[sequence.index]
            if count:
                start = done[sequence.index]
                done[sequence.index] += count
                samples = done[sequence.index] >= len(sequence.token_ids) - 2
                parts.append(Scheduled(sequence, start, count, samples, False, 0))
        errors: dict[Sequence, Exception] = {}
        with torch.inference_mode():
            rows = runner.forward(parts, errors)
        for error in errors.values():
            text = str(error).strip().splitlines() or [type(error).__name__]
            return f"it raises {type(error).__name__}: {text[0][:120]}"
        merged = list(rows.merged()) if rows.logits else []
        for part in rows.parts:
            if part.samples:
                found[part.sequence.index].append(merged.pop(0))
    return [torch.stack(rows) for rows in found]


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Of [3, V]: the median row's error relative to its size; infinite where it is no number."""
    scale = wanted.norm(dim=-1).clamp_min(1e-6)
    error = ((found - wanted).norm(dim=-1) / scale).median().item()
    return error if error == error else float("inf")


def _sequence(index: int, ids: list[int], blocks_each: int) -> Sequence:
    request = Request(str(index), None, ids, SamplingParams(), RequestMetrics(time.monotonic()))
    first = 1 + index * blocks_each
    return Sequence(
        request=request,
        index=index,
        seed=0,
        ends=frozenset(),
        limit=1,
        token_ids=ids,
        prompt_len=len(ids),
        row=index,
        blocks=list(range(first, first + blocks_each)),
    )
