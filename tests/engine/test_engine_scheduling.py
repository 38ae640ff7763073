"""Blocks, the prefix cache, the scheduler's promises, and what aborted requests leave behind."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.engine_cases import (
    assert_empty,
    greedy,
    make_engine,
    make_model,
    own_tokens,
    random_prompts,
    run_staggered,
)
from moetor.engine import SamplingParams
from moetor.engine.blocks import NULL_BLOCK, BlockManager
from moetor.engine.outputs import RequestMetrics
from moetor.engine.scheduler import Scheduler
from moetor.engine.sequence import Request, Sequence, Step


def request_of(name: str, prompt: int, new: int, rng: random.Random) -> Request:
    ids = [rng.randrange(5) for _ in range(prompt)]
    params = SamplingParams(max_tokens=new)
    request = Request(name, None, ids, params, RequestMetrics(0.0))
    request.sequences.append(Sequence(request, 0, 0, frozenset(), new, list(ids), prompt))
    return request


def finish_step(scheduler: Scheduler, step: Step, rng: random.Random) -> None:
    """As if the step had been computed: tokens arrive, full blocks are filed."""
    for part in step.parts:
        sequence = part.sequence
        if part.samples:
            sequence.pending -= 1
        if sequence.finished:
            continue
        if sequence.row is not None:
            scheduler.blocks.file(
                sequence.blocks, sequence.hashes, sequence.token_ids, part.start + part.count
            )
        if part.samples:
            sequence.token_ids.append(rng.randrange(5))
            if sequence.known - sequence.prompt_len >= sequence.limit:
                scheduler.finish(sequence, "length")


def check(scheduler: Scheduler, step: Step, budget: int) -> None:
    """What holds for every step."""
    counts = [part.count for part in step.parts]
    assert sum(counts) <= budget
    assert counts == sorted(counts, key=lambda count: count > 1), "single tokens come first"
    sequences = [part.sequence for part in step.parts]
    assert len(set(sequences)) == len(sequences)
    rows = [sequence.row for sequence in scheduler.running]
    assert len(set(rows)) == len(rows) <= scheduler.max_num_seqs
    size = scheduler.blocks.block_size
    for part in step.parts:
        blocks = part.sequence.blocks
        assert NULL_BLOCK not in blocks
        assert len(blocks) * size >= part.start + part.count
        assert part.start + part.count == part.sequence.computed
    held: dict[int, int] = {}
    for sequence in scheduler.running:
        for block in sequence.blocks:
            held[block] = held.get(block, 0) + 1
    assert len(held) == scheduler.blocks.used
    # A block that is written now belongs to one sequence alone.
    for part in step.parts:
        for place in range(part.start // size, (part.start + part.count - 1) // size + 1):
            assert held[part.sequence.blocks[place]] == 1


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_random_loads_finish_in_a_cache_that_is_too_small(
    seed: int, prefix_caching: bool, overlap: bool
) -> None:
    rng = random.Random(seed)
    blocks = BlockManager(12, 4, prefix_caching=prefix_caching)
    scheduler = Scheduler(blocks, max_num_seqs=5, max_num_batched_tokens=7)
    requests = [
        request_of(str(i), rng.randrange(1, 30), rng.randrange(1, 14), rng) for i in range(25)
    ]
    waiting, under_way, steps = list(requests), [], 0
    while waiting or not scheduler.idle or under_way:
        if waiting and rng.random() < 0.5:
            scheduler.add(waiting.pop(0))
        step = scheduler.schedule()
        check(scheduler, step, 7)
        under_way.append(step)
        while len(under_way) > int(overlap):
            finish_step(scheduler, under_way.pop(0), rng)
        if rng.random() < 0.02 and scheduler.running:
            scheduler.finish(rng.choice(scheduler.running), "abort")
        if scheduler.idle:
            while under_way:
                finish_step(scheduler, under_way.pop(0), rng)
        steps += 1
        assert steps < 5000, "no progress"
    assert scheduler.counters.preemptions > 0
    assert (blocks.used, scheduler.rows_used) == (0, 0)
    assert not any(blocks._references)
    for request in requests:
        (sequence,) = request.sequences
        done = sequence.known - sequence.prompt_len
        assert sequence.finish_reason == "abort" or done == sequence.limit
        assert sequence.pending == 0


def test_generating_sequences_are_in_every_step_beside_a_long_prompt() -> None:
    rng = random.Random(0)
    blocks = BlockManager(200, 4, prefix_caching=False)
    scheduler = Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=8)
    for name in "ab":
        scheduler.add(request_of(name, 2, 30, rng))
    finish_step(scheduler, scheduler.schedule(), rng)
    scheduler.add(request_of("long", 60, 3, rng))
    for _ in range(10):
        step = scheduler.schedule()
        assert [part.count for part in step.parts] == [1, 1, 6]
        finish_step(scheduler, step, rng)


def test_the_first_to_come_is_the_last_to_be_preempted() -> None:
    rng = random.Random(0)
    scheduler = Scheduler(
        BlockManager(9, 2, prefix_caching=False), max_num_seqs=4, max_num_batched_tokens=16
    )
    first, second = request_of("first", 5, 11, rng), request_of("second", 5, 11, rng)
    scheduler.add(first)
    scheduler.add(second)
    while not first.finished:
        assert first.sequences[0].row is not None or not first.sequences[0].computed
        finish_step(scheduler, scheduler.schedule(), rng)
    assert first.metrics.num_preemptions == 0
    assert second.metrics.num_preemptions > 0
    while not second.finished:
        finish_step(scheduler, scheduler.schedule(), rng)


def test_filed_blocks_are_found_shared_and_evicted_in_order() -> None:
    blocks = BlockManager(6, 2, prefix_caching=True)
    held: list[int] = []
    assert blocks.grow(held, 6)
    blocks.file(held, [], [1, 2, 3, 4, 5, 6], 5)  # the third block is not full
    first = list(held)
    found, hashes = blocks.find([1, 2, 3, 4, 9], 4)
    assert found == first[:2]
    assert len(hashes) == 2
    assert blocks.used == 3
    blocks.release(held)
    assert blocks.used == 2  # still held by the one who found them
    blocks.release(found)
    assert (blocks.used, blocks.available) == (0, 5)
    assert blocks.find([1, 2, 9, 9], 4)[0] == first[:1]
    other: list[int] = []
    assert blocks.grow(other, 8)  # all that is free, and then the filed block that nobody holds
    assert first[0] not in other
    assert first[1] in other
    assert not blocks.grow(other, 10)
    assert len(other) == 4


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("qwen3_moe", 3)


def test_a_shared_beginning_is_computed_once(model: Any) -> None:
    (base,) = random_prompts(model, (40,), seed=2)
    prompts = [[*base, 7, 8, 9], [*base, 9, 8, 7]]
    engine = make_engine(model, block_size=8)
    first = run_staggered(engine, [prompts[0]], [greedy()])["0"]
    second = run_staggered(engine, [prompts[1]], [greedy()])["0"]
    assert (first.metrics.num_cached_tokens, second.metrics.num_cached_tokens) == (0, 40)
    stats = engine.core.stats()
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens) == (40, 86)
    assert stats.prompt_tokens == 43 + 3
    wanted = [own_tokens("qwen3_moe", model, prompt) for prompt in prompts]
    assert [one.outputs[0].token_ids for one in (first, second)] == wanted
    assert_empty(engine)


def test_generated_tokens_are_found_again_in_the_next_turn(model: Any) -> None:
    (base,) = random_prompts(model, (10,), seed=2)
    engine = make_engine(model, block_size=4)
    first = run_staggered(engine, [base], [greedy(14)])["0"]
    longer = [*base, *first.outputs[0].token_ids, 5, 6]
    second = run_staggered(engine, [longer], [greedy()])["0"]
    assert second.metrics.num_cached_tokens == 20
    assert second.outputs[0].token_ids == own_tokens("qwen3_moe", model, longer)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "deepseek_v32"])
def test_requests_aborted_at_random_leave_nothing_behind(name: str, seed: int) -> None:
    rng = random.Random(seed)
    model = make_model(name, 3)
    engine = make_engine(
        model, max_num_seqs=4, max_num_batched_tokens=6, block_size=4, kv_cache_blocks=16,
        max_model_len=60,
    )  # fmt: skip
    engine.core._overlap = rng.random() < 0.5
    prompts = random_prompts(model, [rng.randrange(1, 40) for _ in range(14)], seed)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=rng.randrange(1, 15), n=rng.choice([1, 1, 2]), frequency_penalty=0.1,
            ignore_eos=True,
        )  # fmt: skip
        engine.core.add(engine.intake.request(prompt, params, str(index)))
    ended: dict[str, str | None] = {}
    while not engine.core.idle:
        for request in engine.core.step():
            if request.finished:
                ended[request.request_id] = engine.core.output(request).outputs[-1].finish_reason
        if rng.random() < 0.2 and engine.core.requests:
            gone = engine.core.abort(rng.choice(list(engine.core.requests)))
            assert gone is not None
            ended[gone.request_id] = "abort"
            assert all(s.row is None and not s.blocks for s in gone.sequences)
    assert len(ended) == len(prompts)
    assert set(ended.values()) <= {"length", "abort"}
    assert_empty(engine)
    # what ran before does not show in what runs now
    check = random_prompts(model, (17,), seed=1)
    got = run_staggered(engine, check, [greedy()])["0"].outputs[0].token_ids
    assert got == own_tokens(name, model, check[0])
