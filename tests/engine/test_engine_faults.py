"""Bad requests, bad settings, and models that fail."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.engine_cases import (
    assert_empty,
    greedy,
    make_engine,
    make_model,
    own_tokens,
    random_prompts,
    run_staggered,
)
from moetor import LLM, SamplingParams
from moetor.engine import EngineConfig, memory
from moetor.errors import ConfigError, InputError, UnsupportedError

BAD_TOKEN = 120


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("qwen3_moe", 3)


@pytest.fixture
def llm(model: Any) -> LLM:
    return LLM(model, level="none", max_num_seqs=4, max_model_len=40, kv_cache_blocks=16)


def test_a_bad_prompt_is_refused_and_the_others_go_on(llm: LLM, model: Any) -> None:
    (good,) = random_prompts(model, (9,), seed=1)
    prompts: list[Any] = [
        [],
        [1] * 40,
        [5, 131],
        [5, -1],
        "text",
        good,
        {"tokens": [1]},
        [1.5],
        ["1"],
    ]
    outputs = llm.generate(prompts, greedy(4), progress=False)
    reasons = ["no tokens", "max_model_len is 40", "131", "-1", "no tokenizer", None, "mapping"]
    reasons += ["a list of token ids"] * 2
    for output, reason in zip(outputs, reasons, strict=True):
        if reason is None:
            assert output.error is None
            assert output.outputs[0].token_ids == own_tokens("qwen3_moe", model, good, 4)
        else:
            assert output.error is not None
            assert reason in output.error
            assert output.outputs[0].finish_reason == "error"
        assert output.finished
    assert_empty(llm.engine)


def test_parameters_that_do_not_fit_the_model_are_refused(llm: LLM) -> None:
    wrong = [
        SamplingParams(logit_bias={131: 1.0}),
        SamplingParams(stop_token_ids=[500]),
        SamplingParams(stop="x"),
        SamplingParams(min_tokens=39, max_tokens=39),
        SamplingParams(logit_bias=dict.fromkeys(range(131), -math.inf)),
        SamplingParams(
            logit_bias=dict.fromkeys(range(130), -math.inf), stop_token_ids=[130], min_tokens=2
        ),
    ]
    outputs = llm.generate([[3, 4]] * 6, wrong, progress=False)
    reasons = ("logit_bias", "stop_token_ids", "tokenizer", "min_tokens", "every", "min_tokens 2")
    for output, named in zip(outputs, reasons, strict=True):
        assert output.error is not None
        assert named in output.error
    with pytest.raises(InputError, match="2 prompts"):
        llm.generate([[3], [4]], [SamplingParams()], progress=False)


@pytest.mark.parametrize("wrong", [{"n": 1}, 5, [None], "hot"])
def test_parameters_that_are_none_are_refused(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match="sampling_params are SamplingParams"):
        llm.generate([[3, 4]], wrong, progress=False)
    assert_empty(llm.engine)


@pytest.mark.parametrize("wrong", ["hello", ["hello"], [5], [[{"role": "user"}, "hello"]]])
def test_conversations_that_are_none_are_refused(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match="a conversation is a list of messages"):
        llm.chat(wrong)


def test_texts_end_at_the_model_s_length(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate([3] * 30, params)
    assert len(output.outputs[0].token_ids) == 10
    assert output.outputs[0].finish_reason == "length"


def failing_on(model: Any, token: int) -> Any:
    """A hook that raises when a token passes the embedding."""

    def check(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == token).any():
            raise ValueError(f"token {token} breaks this model")

    return model.get_input_embeddings().register_forward_pre_hook(check)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "deepseek_v32"])
def test_a_request_that_raises_inside_the_model_fails_alone(name: str) -> None:
    model = make_model(name, 3)
    prompts = random_prompts(model, (9, 12, 7), seed=1)
    prompts[1][5] = BAD_TOKEN
    wanted = [own_tokens(name, model, prompts[index]) for index in (0, 2)]
    engine = make_engine(model)
    hook = failing_on(model, BAD_TOKEN)
    try:
        done = run_staggered(engine, prompts, [greedy()] * 3, every=1)
    finally:
        hook.remove()
    assert done["1"].error is not None
    assert "breaks this model" in done["1"].error
    assert done["1"].outputs[0].finish_reason == "error"
    assert [done[i].outputs[0].token_ids for i in "02"] == wanted
    stats = engine.core.stats()
    assert (stats.requests_failed, stats.requests_finished) == (1, 2)
    assert_empty(engine)


def test_a_lost_step_ends_its_requests_and_the_engine_lives_on(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, max_num_seqs=2)
    prompts = random_prompts(model, (9, 12, 7), seed=1)
    for index, prompt in enumerate(prompts):
        engine.core.add(engine.intake.request(prompt, greedy(), str(index)))
    engine.core.step()

    def broken(*_: Any) -> Any:
        raise RuntimeError("the sampler is broken")

    with monkeypatch.context() as patch:
        patch.setattr(engine.core.runner.sampler, "sample", broken)
        failed = engine.core.step()
    assert {request.request_id for request in failed} == {"0", "1"}
    assert all("sampler is broken" in (request.error or "") for request in failed)
    done = []
    while not engine.core.idle:
        done += [request for request in engine.core.step() if request.finished]
    (last,) = done
    assert last.sequences[0].output_ids == own_tokens("qwen3_moe", model, prompts[2])
    assert_empty(engine)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"block_size": 12}, "power of two"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "below max_num_seqs"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"seed": -1}, "seed"),
        ({"kv_cache_blocks": 0}, "kv_cache_blocks"),
        ({"load_format": "other"}, "load_format"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EngineConfig(**settings)


def test_settings_that_do_not_fit_the_model_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="no setting of the engine"):
        LLM(model, max_seqs=3)
    with pytest.raises(ConfigError, match="above the 256 tokens"):
        LLM(model, level="none", max_model_len=1000)
    with pytest.raises(ConfigError, match=r"needs 7 blocks .* lower max_model_len"):
        LLM(model, level="none", max_model_len=100, kv_cache_blocks=6)
    with pytest.raises(ConfigError, match="dtype cannot be chosen"):
        LLM(model, dtype="bfloat16")
    with pytest.raises(ConfigError, match="load_format cannot be chosen"):
        LLM(model, load_format="dummy")
    with pytest.raises(ConfigError, match="level 'none'"):
        LLM(model, level="none", kernel="native")
    assert LLM(model, level="none", kv_cache_blocks=6).max_model_len == 96


def test_a_cache_larger_than_the_machine_is_refused_with_advice(model: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"a cache of 10000000001 blocks .* lower kv_cache_blocks"
    ):
        LLM(model, level="none", kv_cache_blocks=10**10)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    lack = memory.memory_errors(torch.device("cpu"), "x", "y")
    with pytest.raises(RuntimeError, match="something else"), lack:
        raise RuntimeError("something else")


def test_states_of_all_sequences_are_taken_off_what_the_cache_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(make_model("qwen3_next", 3))
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 2**15)
    free = [
        memory.free_memory(engine.served, engine.strategy, EngineConfig(max_num_seqs=count), None)
        for count in (1, 101)
    ]
    states = engine.core.runner.states
    assert states is not None
    each = sum(pool[0].nbytes for pool in states.pools.values())
    assert each > 0
    assert free[0] - free[1] == 100 * each


def test_a_model_without_generate_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="token by token"):
        LLM(make_model("openai_privacy_filter", 0), level="none")


def test_attention_outside_of_the_engine_says_so(model: Any) -> None:
    LLM(model, level="none", max_model_len=32)
    before = model.config._attn_implementation
    assert before != "moetor_paged"
    model.config._attn_implementation = "moetor_paged"
    try:
        with pytest.raises(UnsupportedError, match="inside moetor's engine"):
            model(torch.tensor([[3, 4]]))
    finally:
        model.config._attn_implementation = before


def test_a_rank_that_waited_in_vain_does_not_wait_for_an_answer_too(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, asked = llm.engine.core.runner, []

    def gather(*question: Any) -> list[str]:
        asked.append(question)
        return ["all failed alike"]

    monkeypatch.setattr("moetor.engine.runner.gather", gather)
    monkeypatch.setattr(runner, "_ranks", SimpleNamespace(aside=None))
    waited = RuntimeError("Timed out waiting 15000ms for recv operation to complete")
    with pytest.raises(RuntimeError) as raised:
        runner._check_that_all_failed(waited)
    assert raised.value is waited
    assert not asked
    runner._check_that_all_failed(ValueError("of one request"))  # which ends, and others go on
    assert len(asked) == 1
