"""Every field of `SamplingParams`, against plain arithmetic row by row."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine_cases import (
    assert_empty,
    greedy,
    make_engine,
    make_model,
    random_prompts,
    run_staggered,
)
from moetor import LLM, SamplingParams
from moetor.engine.outputs import RequestMetrics
from moetor.engine.sampler import Sampler, uniform
from moetor.engine.sequence import Request, Scheduled, Sequence
from moetor.errors import InputError

VOCABULARY = 37


def part_of(
    params: SamplingParams,
    row: int,
    prompt: list[int],
    output: list[int],
    ends: frozenset[int] = frozenset(),
    seed: int = 0,
) -> Scheduled:
    request = Request(str(row), None, prompt, params, RequestMetrics(0.0))
    sequence = Sequence(request, 0, seed, ends, 99, prompt + output, len(prompt), row=row)
    return Scheduled(sequence, len(prompt + output) - 1, 1, True, False, len(output))


def allowed(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> dict[int, float]:
    """Token to its probability, for those that may be drawn."""
    shaped = list(logits)
    for token, bias in (params.logit_bias or {}).items():
        shaped[token] += bias
    for token in range(len(shaped)):
        times = output.count(token)
        if times or token in prompt:
            positive = shaped[token] > 0
            factor = params.repetition_penalty
            shaped[token] = shaped[token] / factor if positive else shaped[token] * factor
        shaped[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    if params.greedy:
        return {max(range(len(shaped)), key=shaped.__getitem__): 1.0}
    order = sorted(range(len(shaped)), key=lambda token: -shaped[token])
    if params.top_k > 0:
        order = order[: params.top_k]
    top = shaped[order[0]]
    weights = [math.exp((shaped[token] - top) / params.temperature) for token in order]
    total = sum(weights)
    kept: list[int] = []
    mass = 0.0
    for token, weight in zip(order, weights, strict=True):
        if kept and (mass >= params.top_p or weight < params.min_p * weights[0]):
            break
        kept.append(token)
        mass += weight / total
    chosen = {token: weights[order.index(token)] for token in kept}
    return {token: weight / sum(chosen.values()) for token, weight in chosen.items()}


CASES = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=4),
    SamplingParams(top_k=1, temperature=3.0),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.2),
    SamplingParams(top_k=12, top_p=0.8, min_p=0.05, temperature=1.7),
    SamplingParams(repetition_penalty=1.8, temperature=0),
    SamplingParams(frequency_penalty=1.5, temperature=0),
    SamplingParams(presence_penalty=-2.0, temperature=0),
    SamplingParams(repetition_penalty=0.7, presence_penalty=1.1, frequency_penalty=-0.4, top_k=5),
    SamplingParams(logit_bias={3: 4.0, 5: -math.inf}, temperature=0),
    SamplingParams(logit_bias={30: 9.0}, top_p=0.9),
]


@pytest.mark.parametrize(("vocabulary", "spread"), [(37, 2.0), (700, 4.0), (700, 0.05)])
def test_draws_of_a_mixed_batch_follow_each_row_s_own_distribution(
    vocabulary: int, spread: float, seed: int
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    logits_RV = torch.randn(len(CASES), vocabulary) * spread
    texts = [
        (
            [rng.randrange(vocabulary) for _ in range(9)],
            [rng.randrange(vocabulary) for _ in "12345"],
        )
        for _ in CASES
    ]
    sampler = Sampler(len(CASES), torch.device("cpu"))
    rounds = 400
    counts = [[0] * vocabulary for _ in CASES]
    for draw in range(rounds):
        parts = [
            part_of(params, row, *texts[row], seed=1000 * seed + draw)
            for row, params in enumerate(CASES)
        ]
        for part in parts:  # as if the row had been given to a new sequence
            sampler.forget(part.sequence)
        tokens = sampler.sample(logits_RV, parts).tokens_R.tolist()
        for row, token in enumerate(tokens):
            counts[row][token] += 1
    for row, params in enumerate(CASES):
        wanted = allowed(logits_RV[row].tolist(), params, *texts[row])
        drawn = {token for token, count in enumerate(counts[row]) if count}
        assert drawn <= set(wanted), params
        for token, probability in wanted.items():
            error = math.sqrt(probability * (1 - probability) / rounds)
            assert abs(counts[row][token] / rounds - probability) <= 5 * error + 6 / rounds, params


def test_a_draw_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    logits_RV = torch.randn(6, VOCABULARY)
    params = SamplingParams(top_k=20, temperature=0.9)
    alone = Sampler(6, torch.device("cpu")).sample(
        logits_RV[2:3], [part_of(params, 0, [1], [2], seed=77)]
    )
    parts = [
        part_of(params if row == 2 else CASES[row], row, [1], [2], seed=77 if row == 2 else row)
        for row in range(6)
    ]
    together = Sampler(6, torch.device("cpu")).sample(logits_RV, parts)
    assert alone.tokens_R.item() == together.tokens_R[2].item()


def test_uniform_numbers_fill_the_interval() -> None:
    numbers = [uniform(seed, position) for seed in range(50) for position in range(40)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02
    quarters = [sum(q / 4 <= n < (q + 1) / 4 for n in numbers) for q in range(4)]
    assert min(quarters) > 430


def test_end_tokens_are_kept_out_until_min_tokens() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 7] = 5.0
    logits[0, 9] = 4.0
    sampler = Sampler(1, torch.device("cpu"))
    params = SamplingParams(temperature=0, min_tokens=3)
    found = []
    for output in ([], [1], [1, 1], [1, 1, 1]):
        part = part_of(params, 0, [1], output, ends=frozenset({7}))
        found.append(sampler.sample(logits, [part]).tokens_R.item())
    assert found == [9, 9, 9, 7]


@pytest.mark.parametrize("temperature", [1e-6, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[1.0, 1.001, -200.0]])
    sampler = Sampler(1, torch.device("cpu"))
    for seed in range(20):
        part = part_of(SamplingParams(temperature=temperature), 0, [1], [], seed=seed)
        assert sampler.sample(logits, [part]).tokens_R.item() == 1


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("qwen3_moe", 2)


def logits_of(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def test_logprobs_are_those_of_the_model(model: Any) -> None:
    (prompt,) = random_prompts(model, (13,), seed=1)
    params = SamplingParams(
        seed=5, max_tokens=6, logprobs=3, prompt_logprobs=2, temperature=0.7, ignore_eos=True
    )
    for budget in (64, 4):
        engine = make_engine(model, max_num_batched_tokens=budget, max_num_seqs=2)
        output = run_staggered(engine, [prompt], [params])["0"]
        made = output.outputs[0]
        ids = prompt + made.token_ids
        wanted = logits_of(model, ids).log_softmax(-1)
        entries = [*(output.prompt_logprobs or []), *(made.logprobs or [])]
        assert entries[0] is None
        assert len(entries) == len(ids)
        for position, entry in enumerate(entries[1:], 1):
            most = 2 if position < len(prompt) else 3
            row = wanted[position - 1]
            top = row.topk(most)
            assert entry is not None
            assert set(top.indices.tolist()) | {ids[position]} == set(entry)
            for token, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[token].item(), abs=1e-4)
                assert logprob.rank == (row > row[token]).sum().item() + 1
        taken = [
            entry[token].logprob
            for entry, token in zip(made.logprobs or [], made.token_ids, strict=True)
        ]
        assert made.cumulative_logprob == pytest.approx(sum(taken))


def test_seeds_repeat_whatever_else_runs(model: Any) -> None:
    prompts = random_prompts(model, (13, 5, 20, 7), seed=1)
    seeded = SamplingParams(seed=11, max_tokens=9, ignore_eos=True, top_p=0.95)
    others = [
        SamplingParams(max_tokens=7, ignore_eos=True),
        greedy(),
        SamplingParams(max_tokens=12, presence_penalty=1, ignore_eos=True),
    ]
    alone = run_staggered(make_engine(model), [prompts[0]], [seeded])["0"]
    engine = make_engine(
        model,
        max_num_seqs=3,
        max_num_batched_tokens=6,
        block_size=4,
        kv_cache_blocks=16,
        max_model_len=40,
    )
    order = [prompts[1], prompts[2], prompts[0], prompts[3]]
    mixed = run_staggered(engine, order, [others[0], others[1], seeded, others[2]], every=1)["2"]
    assert alone.outputs[0].token_ids == mixed.outputs[0].token_ids
    again = run_staggered(make_engine(model, seed=9), [prompts[0]], [seeded])["0"]
    assert alone.outputs[0].token_ids == again.outputs[0].token_ids


def test_without_a_seed_the_engine_s_own_decides(model: Any) -> None:
    (prompt,) = random_prompts(model, (13,), seed=1)
    params = SamplingParams(max_tokens=12, ignore_eos=True, n=3)
    runs = []
    for seed in (1, 1, 2):
        engine = make_engine(model, seed=seed)
        output = run_staggered(engine, [prompt], [params])["0"]
        runs.append([one.token_ids for one in output.outputs])
        assert_empty(engine)
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(ids) for ids in runs[0]}) == 3


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo", max_num_seqs=4, max_model_len=256, kv_cache_blocks=64)


def text_of(llm: LLM, **params: Any) -> Any:
    (output,) = llm.generate("ROMEO:", SamplingParams(temperature=0, max_tokens=40, **params))
    assert output.error is None
    return output.outputs[0]


def test_stop_strings_end_the_text(demo: LLM) -> None:
    whole = text_of(demo)
    assert whole.finish_reason == "length"
    stop = whole.text[11:15]
    cut = text_of(demo, stop=[stop, "never there"])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    kept = text_of(demo, stop=stop, include_stop_str_in_output=True)
    assert kept.text == cut.text + stop
    later = text_of(demo, stop=stop, min_tokens=len(cut.token_ids) + 5)
    assert later.text.startswith(cut.text + stop)


def test_stop_tokens_end_the_text_and_are_no_part_of_it(demo: LLM) -> None:
    whole = text_of(demo)
    token = whole.token_ids[6]
    at = whole.token_ids.index(token)
    cut = text_of(demo, stop_token_ids=[token])
    assert cut.token_ids == whole.token_ids[: at + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", token)
    assert whole.text.startswith(cut.text)
    assert len(cut.text) < len(whole.text)


def test_the_text_is_that_of_the_tokens(demo: LLM) -> None:
    prompt = "ROMEO:"
    made = text_of(demo)
    ids = demo.tokenizer(prompt)["input_ids"] + made.token_ids
    assert prompt + made.text == demo.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"n": 0}, "n 0"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [-3]}, "stop_token_ids"),
        ({"seed": -1}, "seed"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 1000}, "prompt_logprobs"),
        ({"temperature": 0.0, "n": 2}, "temperature 0"),
        ({"n": 2.5}, "n 2.5 must be a whole number"),
        ({"max_tokens": "3"}, "max_tokens '3'"),
        ({"min_tokens": None}, "min_tokens None"),
        ({"top_k": True}, "top_k True"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"temperature": "hot"}, "temperature 'hot' must be a number"),
        ({"stop": 5}, "stop 5"),
        ({"stop_token_ids": 5}, "stop_token_ids 5"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"logit_bias": [1]}, "must map token ids"),
        ({"logit_bias": {1: "a"}}, "'a' for token 1"),
    ],
)
def test_contradictions_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        SamplingParams(**wrong)


def test_parameters_of_a_draw_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's launch is given, beside the same draw in torch operations."""
    params = [
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1),
        SamplingParams(temperature=1e300),  # beyond float32
        SamplingParams(temperature=1.3, top_k=10**9),
        SamplingParams(temperature=1e-300, top_p=0.5),
        SamplingParams(min_p=0.25),
    ]
    parts = [part_of(one, row, [row], [], seed=row) for row, one in enumerate(params)]
    logits_RV = torch.randn(len(params), VOCABULARY)
    sampler = Sampler(len(params), torch.device("cpu"))
    wanted = sampler.sample(logits_RV, parts).tokens_R
    given: list[tuple[Tensor, ...]] = []

    def draw(*columns: Tensor) -> Tensor:
        given.append(columns)
        return wanted

    monkeypatch.setattr("moetor.engine.sampler.draw", draw)
    sampler._in_one_launch = True
    assert torch.equal(sampler.sample(logits_RV, parts).tokens_R, wanted)
    ((scaled_RV, top_k, top_p, min_p, places),) = given
    assert torch.equal(scaled_RV.amax(-1), torch.zeros(len(params)))
    assert scaled_RV.isfinite().all()
    assert (top_k.dtype, top_k.tolist()) == (torch.int32, [5, 37, 37, 37, 37])
    assert top_p.tolist() == pytest.approx([0.9, 1, 1, 0.5, 1])
    assert min_p.tolist() == pytest.approx([0.1, 0, 0, 0, 0.25])
    assert places.tolist() == [uniform(row, 0) for row in range(len(params))]
    # The kernel is compiled for columns at such addresses, whatever the number of rows.
    assert all(column.data_ptr() % 16 == 0 for column in (top_k, top_p, min_p, places))
