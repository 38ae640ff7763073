"""The engine on two ranks: the same tokens as on one, for requests that come and go together."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moetor
from moetor import LLM, AsyncEngine, ParallelConfig, SamplingParams, StructuredOutputsParams
from moetor.engine import EngineConfig, EngineStoppedError, ModelSource, build_engine, graphs
from moetor.engine.launched import Launched
from moetor.engine.ranks import RankedCore
from moetor.engine.sequence import Step
from moetor.errors import ParallelError
from moetor.layer.context import forward_context, get_forward_context
from moetor.parallel.config import EplbConfig
from moetor.tools.tiny import tiny_model
from parallel.pool import Pool, RankError, patient

PROMPTS = ["ROMEO:", "To be, or not to be", "KING HENRY:\nOnce more", "a"]
EP = {"enable_expert_parallel": True}
CONFIGS = {
    "tp": patient(tensor_parallel_size=2),
    "tp_ep": patient(tensor_parallel_size=2, **EP),
    "sp": patient(tensor_parallel_size=2, sequence_parallel=True, **EP),
    "dp": patient(data_parallel_size=2),
    "dp_ep": patient(data_parallel_size=2, **EP),
    "dp_ep_alltoall": patient(data_parallel_size=2, dispatcher="alltoall", **EP),
    "eplb": patient(
        data_parallel_size=2,
        eplb=EplbConfig(window=8, interval=4, min_gain=1.0),
        num_redundant_experts=2,
        **EP,
    ),
}
# Greedy and sampled, of different lengths, with a stop string and log-probabilities; fewer rows
# than requests, so that some wait.
PARAMS = [
    SamplingParams(max_tokens=9, temperature=0.0, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=4, temperature=0.8, n=2),
    SamplingParams(max_tokens=40, temperature=0.0, stop=["e"], min_tokens=3),
    SamplingParams(max_tokens=7, temperature=1.0),
]


def answers_of(parallel: ParallelConfig | None, many: int) -> list[Any]:
    """Everything that the requests give, but times."""
    llm = LLM("demo", dtype="float32", device="cpu", parallel=parallel, max_num_seqs=3)
    outputs = llm.generate(PROMPTS * many, PARAMS * many)
    stats = llm.stats()
    assert stats.requests_finished == len(PROMPTS) * many
    assert stats.running == stats.waiting == stats.blocks_used == 0
    if parallel is not None and parallel.eplb is not None:
        moved = llm.engine.core.runner.balancer
        assert moved is not None
        assert moved.stats.experts_moved > 0
    return [
        (
            output.error,
            [
                (one.text, one.token_ids, one.finish_reason, one.stop_reason)
                for one in output.outputs
            ],
            [[sorted(entry) for entry in one.logprobs or []] for one in output.outputs],
            [entry and sorted(entry) for entry in output.prompt_logprobs or []],
        )
        for output in outputs
    ]


def compare(rank: int, parallel: ParallelConfig, many: int) -> tuple[Any, Any]:
    """In a worker: spread and whole."""
    return answers_of(parallel, many), answers_of(None, many)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_answers(name: str, two: Pool) -> None:
    for ours, whole in two.run(compare, CONFIGS[name], 2):
        assert ours == whole


@pytest.mark.parametrize(
    "fields", [{}, EP, {"sequence_parallel": True, **EP}], ids=["tp_dp", "tp_dp_ep", "tp_dp_sp"]
)
def test_the_same_answers_of_four(fields: dict[str, Any], four: Pool) -> None:
    parallel = patient(tensor_parallel_size=2, data_parallel_size=2, **fields)
    for ours, whole in four.run(compare, parallel, 1):
        assert ours == whole


def unequal(rank: int, parallel: ParallelConfig) -> tuple[list[int], list[int], list[int]]:
    """In a worker: one prompt after the other, so that one group has nothing to do; what is at home
    here, and the tokens of both kinds of engine."""
    homes = []
    llm = LLM("demo", dtype="float32", device="cpu", parallel=parallel)
    core = llm.engine.core
    assert isinstance(core, RankedCore)
    for index in range(3):
        params = SamplingParams(max_tokens=3 + index, temperature=0)
        core.add(llm.engine.intake.request(PROMPTS[index], params, f"r{index}"))
        homes.append(core._homes[f"r{index}"])
    while not core.idle:
        core.step()
    alone = llm.generate(PROMPTS[1], SamplingParams(max_tokens=6, temperature=0))
    whole = LLM("demo", dtype="float32", device="cpu")
    expected = whole.generate(PROMPTS[1], SamplingParams(max_tokens=6, temperature=0))
    return homes, alone[0].outputs[0].token_ids, expected[0].outputs[0].token_ids


@pytest.mark.parametrize("name", ["dp", "dp_ep", "dp_ep_alltoall"])
def test_a_group_without_work_steps_along(name: str, two: Pool) -> None:
    for homes, alone, whole in two.run(unequal, CONFIGS[name]):
        assert homes == [0, 1, 0], "each goes where the fewest are"
        assert alone == whole


def served(rank: int, parallel: ParallelConfig) -> Any:
    """In a worker: rank 0 is driven as by a server, the other follows."""
    config = EngineConfig(max_num_seqs=4, kv_cache_blocks=64, record_expert_load=True)
    source = ModelSource(model="demo", dtype="float32", device="cpu", parallel=parallel)
    made = build_engine(source, config)
    if rank:
        assert isinstance(made.core, RankedCore)
        made.core.follow()
        return made.core.stats().blocks_used
    engine = AsyncEngine(made)

    async def one(prompt: str, length: int) -> list[int]:
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
        stream = await engine.add_request(prompt, params)
        news = [output.outputs[0].new_token_ids async for output in stream]
        return [token for piece in news for token in piece]

    async def work() -> list[list[int]]:
        gone = await engine.add_request(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True))
        first = asyncio.gather(*(one(prompt, 12) for prompt in PROMPTS))
        await anext(gone)
        await gone.aclose()
        tokens = await first
        await asyncio.sleep(1.5)  # rank 0 rests, and is heard all the same
        tokens.append(await one(PROMPTS[0], 5))
        assert engine.healthy
        assert engine.stats().requests_aborted == 1
        form = StructuredOutputsParams(choice=["thou art", "a rose"])
        params = SamplingParams(max_tokens=30, temperature=1, structured_outputs=form)
        *_, last = [output async for output in await engine.add_request(PROMPTS[0], params)]
        assert last.error is None
        assert last.outputs[0].text in form.choice
        counts = list((await engine.expert_load()).values())
        assert {sum(layer) for layer in counts} == {sum(counts[0])}
        assert len(counts[0]) == engine.model_config.num_experts
        await engine.shutdown()
        with pytest.raises(EngineStoppedError, match="stopped"):
            await engine.expert_load()
        return tokens

    return asyncio.run(work())


def rerun(step: Any, device: torch.device, pool: Any) -> Any:
    """Like a graph: what was told the recorder at the capture is told it at each replay."""
    context = get_forward_context()

    def again() -> Any:
        with forward_context(context):
            return step()

    filled = tuple(tensor.clone() for tensor in again())

    def replay() -> None:
        for old, new in zip(filled, again(), strict=True):
            old.copy_(new)

    return replay, filled


def load(rank: int, parallel: ParallelConfig | None, captured: bool = False) -> Any:
    """In a worker: what `PROMPTS` did to the experts, of all ranks, as the engine tells it and,
    under EPLB, as the balancer sees it."""
    config = EngineConfig(max_num_seqs=4, kv_cache_blocks=64, record_expert_load=True)
    source = ModelSource(model="demo", dtype="float32", device="cpu", parallel=parallel)
    engine = build_engine(source, config)
    runner = engine.core.runner
    if captured:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "record", rerun)
            runner.graphs.capture()
    for index, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=5 + index, temperature=0, ignore_eos=True)
        engine.core.add(engine.intake.request(prompt, params, f"r{index}"))
    while not engine.core.idle:
        engine.core.step()
    assert (runner.graphs.replayed > 0) is captured
    told, stats = engine.core.expert_load(), engine.core.stats()
    # Nobody computes the token that was sampled last.
    tokens = stats.prompt_tokens + stats.generated_tokens - len(PROMPTS)
    top_k = engine.served.config.num_experts_per_tok
    assert [sum(counts) for counts in told.values()] == [tokens * top_k] * 4
    if runner.balancer is None:
        return told, None
    seen = torch.stack([layer.load.read() for layer in runner.balancer.layers])
    dist.all_reduce(seen)
    return told, seen.tolist()


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ["tp", "tp_ep", "sp", "dp", "dp_ep", "dp_ep_alltoall"])
def test_the_load_is_that_of_all_ranks_tokens(name: str, captured: bool, two: Pool) -> None:
    """Each token counts once, wherever it was computed; rows that fill up a part or a graph, and
    those of a rank without work, never."""
    expected, _ = load(0, None)
    parallel = CONFIGS[name]
    if parallel.enable_expert_parallel:
        parallel = replace(parallel, eplb=EplbConfig(window=10**4, interval=10**6, decay=1.0))
    for told, seen in two.run(load, parallel, captured):
        assert told == expected
        assert seen is None or seen == list(expected.values())


@pytest.mark.parametrize("name", ["tp", "tp_ep", "dp_ep"])
def test_rank_0_leads(name: str, two: Pool) -> None:
    fields = {
        "timeout": 5.0,
        **{
            n: getattr(CONFIGS[name], n)
            for n in ("tensor_parallel_size", "data_parallel_size", "enable_expert_parallel")
        },
    }
    tokens, blocks = two.run(served, ParallelConfig(**fields))
    assert blocks == 0, "what rank 0 aborts ends everywhere"
    whole = LLM("demo", dtype="float32", device="cpu")
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    expected = [list(o.outputs[0].token_ids) for o in whole.generate(PROMPTS, params)]
    assert tokens == [*expected, expected[0][:5]]


def family(rank: int, name: str, parallel: ParallelConfig) -> tuple[Any, Any, str]:
    """In a worker: a family's tiny model, spread and whole, for prompts of different lengths."""
    rng = torch.Generator().manual_seed(8)
    prompts = [torch.randint(3, 40, (n,), generator=rng).tolist() for n in (5, 19, 1, 33, 2)]
    params = [
        SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (9, 3, 12, 1, 6)
    ]
    answers = []
    for config in (parallel, None):
        model = tiny_model(name)
        moetor.fuse(model, verify=False, parallel=config)
        llm = LLM(model, level="none", max_num_seqs=2, max_num_batched_tokens=8, kv_cache_blocks=32)
        outputs = llm.generate(prompts, params)
        assert not any(output.error for output in outputs)
        answers.append([output.outputs[0].token_ids for output in outputs])
    return *answers, llm.engine.strategy.name


# Latent attention, states beside the cache, sliding windows; one that goes sequence by sequence.
@pytest.mark.parametrize(
    ("name", "mode", "strategy"),
    [
        ("deepseek_v3", "dp_ep", "paged"),
        ("qwen3_next", "dp_ep", "paged and states"),
        ("qwen3_next", "tp_ep", "paged and states"),
        ("gpt_oss", "dp_ep_alltoall", "paged"),
        ("switch_transformers", "tp_ep", "own cache"),
    ],
)
def test_families(name: str, mode: str, strategy: str, two: Pool) -> None:
    for ours, whole, used in two.run(family, name, CONFIGS[mode]):
        assert ours == whole
        assert used == strategy


def failing(rank: int, ranks: tuple[int, ...]) -> list[tuple[str | None, list[int]]]:
    """In a worker: a model that fails on prompts with one token, on some of the ranks."""
    model = tiny_model("qwen3_moe")
    moetor.fuse(model, parallel=ParallelConfig(tensor_parallel_size=2, timeout=3.0))
    llm = LLM(model, level="none", max_num_seqs=4, kv_cache_blocks=32)

    def refuse(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if rank in ranks and (inputs["input_ids"] == 41).any():
            raise ValueError("no such picture")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    outputs = llm.generate([[3, 9, 7], [5, 41, 6], [8]], params)
    return [(output.error, output.outputs[0].token_ids) for output in outputs]


def test_a_request_on_which_all_ranks_fail_ends_alone(two: Pool) -> None:
    ours, theirs = two.run(failing, (0, 1))
    assert ours == theirs
    assert [error for error, _ in ours] == [None, "ValueError: no such picture", None]
    well, _ = two.run(failing, ())
    assert ours[::2] == well[::2]
    assert well[1][0] is None


def test_a_rank_that_fails_alone_ends_all() -> None:
    pool = Pool(2)  # whose connections are broken afterwards
    try:
        answers = pool.try_all(failing, (1,))
    finally:
        pool.close()
    for fine, answer in answers:
        assert not fine
        assert answer[0] is ParallelError


def split_apart(rank: int) -> None:
    """In a worker: one rank takes in a token that the other did not sample."""
    llm = LLM("demo", dtype="float32", device="cpu", parallel=CONFIGS["tp"])
    core = llm.engine.core
    assert isinstance(core, RankedCore)
    core._digest = rank
    llm.generate(PROMPTS, SamplingParams(max_tokens=70, temperature=0, ignore_eos=True))


def test_ranks_that_sample_differently_find_out(two: Pool) -> None:
    for fine, answer in two.try_all(split_apart):
        assert not fine
        assert answer[0] is ParallelError
        assert "disagree on the tokens that they have generated" in answer[1]


class Event:
    """One that comes after so many questions."""

    def __init__(self, questions: int) -> None:
        self.questions = questions

    def query(self) -> bool:
        self.questions -= 1
        return self.questions < 0


def test_a_step_is_not_waited_for_for_ever() -> None:
    def step(questions: int, patience: float) -> Launched:
        event = Event(questions)
        return Launched(Step([]), [], None, None, [], {}, 0.0, event=event, patience=patience)

    for questions in (0, 1, 20):
        assert step(questions, 60.0).result().tokens == {}
    with pytest.raises(ParallelError, match="another rank did not answer"):
        step(2**62, 0.05).result()


def own_caches(rank: int, parallel: ParallelConfig) -> None:
    """In a worker: a model that is not cached in blocks."""
    model = tiny_model("switch_transformers")
    moetor.fuse(model, parallel=parallel)
    build_engine(ModelSource(model=model, level="none"), EngineConfig())


def test_own_caches_are_refused_where_ranks_step_together(two: Pool) -> None:
    with pytest.raises(RankError, match=r"possible: tensor_parallel_size alone"):
        two.run(own_caches, CONFIGS["dp_ep"])
