"""The `openai` client against a real server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest

from moetor import SamplingParams
from server.server_process import KEY, ServerProcess

PROMPTS = ("ROMEO:", "To be, or not to be", "First Citizen:\nBefore we proceed")
MESSAGES: list[Any] = [{"role": "user", "content": "Who is there?"}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def greedy_text(own: Any, prompt: Any, tokens: int) -> str:
    params = SamplingParams(temperature=0, max_tokens=tokens)
    return str(own.generate(prompt, params, progress=False)[0].outputs[0].text)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("other")
    assert refused.value.code == "model_not_found"


def test_completions_are_the_engines_own(client: openai.OpenAI, own: Any) -> None:
    made = client.completions.create(
        model="demo", prompt=list(PROMPTS), max_tokens=12, temperature=0
    )
    assert [one.index for one in made.choices] == [0, 1, 2]
    for prompt, choice in zip(PROMPTS, made.choices, strict=True):
        assert choice.text == greedy_text(own, prompt, 12)
        assert choice.finish_reason == "length"
    assert made.usage is not None
    assert made.usage.completion_tokens == 36
    assert made.usage.prompt_tokens == sum(len(own.tokenizer(p)["input_ids"]) for p in PROMPTS)


def test_token_ids_as_prompts(client: openai.OpenAI, own: Any) -> None:
    ids = [own.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    one = client.completions.create(model="demo", prompt=ids[0], max_tokens=6, temperature=0)
    many = client.completions.create(model="demo", prompt=ids, max_tokens=6, temperature=0)
    texts = [greedy_text(own, prompt, 6) for prompt in PROMPTS]
    assert [choice.text for choice in many.choices] == texts
    assert one.choices[0].text == texts[0]


def test_a_streamed_completion_adds_up(client: openai.OpenAI, own: Any) -> None:
    texts = dict.fromkeys(range(len(PROMPTS)), "")
    reasons: dict[int, str | None] = {}
    usage, ids = None, set()
    for chunk in client.completions.create(
        model="demo",
        prompt=list(PROMPTS),
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        ids.add(chunk.id)
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
        assert (chunk.usage is not None) == (not chunk.choices)
        usage = chunk.usage
    assert len(ids) == 1
    assert reasons == dict.fromkeys(range(len(PROMPTS)), "length")
    assert usage is not None
    assert usage.completion_tokens == 27
    for index, prompt in enumerate(PROMPTS):
        assert texts[index] == greedy_text(own, prompt, 9)


def test_chat_streams_what_it_answers_at_once(client: openai.OpenAI, own: Any) -> None:
    whole = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_completion_tokens=20, temperature=0
    )
    asked = own.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=20), progress=False)
    assert whole.choices[0].message.content == asked[0].outputs[0].text
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=MESSAGES, max_tokens=20, temperature=0, stream=True
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [*[None] * (len(chunks) - 1), whole.choices[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1


def test_fields_that_change_nothing_here(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 8, "temperature": 0}
    plain = client.chat.completions.create(**asked, messages=MESSAGES).choices[0]
    made = client.chat.completions.create(
        **asked,
        messages=MESSAGES,
        modalities=["text"],
        service_tier="auto",
        store=False,
        user="somebody",
        safety_identifier="somebody",
        prompt_cache_key="somewhere",
        tool_choice="none",
        seed=-(2**63),
        stop=["never", "ever", "this", "or", "that one"],
    ).choices[0]
    assert made.message.content == plain.message.content


def test_the_bytes_of_parts_of_characters(client: openai.OpenAI) -> None:
    text = "\N{SLIGHTLY SMILING FACE}e\u0301\u65e5"
    told: list[int] = []
    said, likeliest = "", []
    for chunk in client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        stream=True,
        logprobs=True,
        top_logprobs=2,
        extra_body={"structured_outputs": {"choice": [text]}},
    ):
        choice = chunk.choices[0]
        said += choice.delta.content or ""
        for token in choice.logprobs.content or [] if choice.logprobs else []:
            told += token.bytes or []
            likeliest += [other.bytes for other in token.top_logprobs]
    assert said == text
    assert bytes(told).decode() == text
    assert likeliest
    assert all(likeliest)


def test_a_developer_speaks_as_the_system(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 8, "temperature": 0}
    first, second = (
        client.chat.completions.create(
            **asked, messages=[{"role": role, "content": "Speak briefly."}, *MESSAGES]
        )
        for role in ("system", "developer")
    )
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    assert first.choices[0].message.content == second.choices[0].message.content


def test_the_bytes_of_a_stream(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine-7"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "mine-7"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["choices"][0]["finish_reason"] is None
    assert "usage" not in first


def test_chat_logprobs(client: openai.OpenAI, own: Any) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "temperature": 0}
    made = client.chat.completions.create(**asked, max_tokens=6, logprobs=True, top_logprobs=3)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
    theirs = own.chat(MESSAGES, params, progress=False)[0].outputs[0]
    assert made.choices[0].logprobs is not None
    content = made.choices[0].logprobs.content or []
    assert len(content) == len(theirs.token_ids)
    for one, token, entry in zip(content, theirs.token_ids, theirs.logprobs, strict=True):
        assert one.token == entry[token].decoded_token
        assert math.isclose(one.logprob, entry[token].logprob, abs_tol=1e-4)
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob
        assert bytes(one.bytes or []).decode() == one.token
    pieces = client.chat.completions.create(
        **asked, max_tokens=6, logprobs=True, top_logprobs=3, stream=True
    )
    found = [
        one
        for chunk in pieces
        if chunk.choices[0].logprobs is not None
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert [one.token for one in found] == [one.token for one in content]


@pytest.mark.parametrize("tokens", [0, 4])
def test_echo_with_logprobs_of_the_prompt(client: openai.OpenAI, own: Any, tokens: int) -> None:
    prompt = PROMPTS[2]
    made = client.completions.create(
        model="demo", prompt=prompt, max_tokens=tokens, echo=True, logprobs=2, temperature=0
    )
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=2)
    theirs = own.generate(prompt, params, progress=False)[0]
    choice = made.choices[0]
    assert choice.text == prompt + (theirs.outputs[0].text if tokens else "")
    ids = [*theirs.prompt_token_ids, *theirs.outputs[0].token_ids[:tokens]]
    entries = [*theirs.prompt_logprobs, *theirs.outputs[0].logprobs[:tokens]]
    found = choice.logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.tokens is not None
    assert found.text_offset is not None
    assert "".join(found.tokens) == choice.text
    assert [choice.text[place:][:1] for place in found.text_offset] == [t[:1] for t in found.tokens]
    assert found.token_logprobs[0] is None
    for token, entry, value in zip(ids[1:], entries[1:], found.token_logprobs[1:], strict=True):
        assert math.isclose(value, entry[token].logprob, abs_tol=1e-4)
    assert made.usage is not None
    assert made.usage.completion_tokens == tokens


def test_n_gives_different_choices_and_a_seed_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 12, "n": 3}
    first = client.completions.create(**asked, seed=-5)
    again = client.completions.create(**asked, seed=-5, stream=True)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in again:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_stop_strings(client: openai.OpenAI, own: Any) -> None:
    text = greedy_text(own, "ROMEO:", 12)
    stop = text[len(text) // 2 :][:3]
    made = client.completions.create(
        model="demo", prompt="ROMEO:", max_tokens=12, temperature=0, stop=[stop]
    )
    assert made.choices[0].text == text[: text.index(stop)]
    assert made.choices[0].finish_reason == "stop"


def test_logit_bias_min_tokens_and_other_fields_reach_the_engine(
    client: openai.OpenAI, own: Any
) -> None:
    token = own.tokenizer("Z")["input_ids"][0]
    made = client.completions.create(
        model="demo",
        prompt="ROMEO:",
        max_tokens=3,
        temperature=0,
        logit_bias={str(token): 100},
        extra_body={"min_tokens": 2, "ignore_eos": True, "top_k": 1, "min_p": 0.1},
    )
    assert made.choices[0].text == "ZZZ"


def test_errors_have_their_classes(client: openai.OpenAI, server: ServerProcess) -> None:
    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(**{"model": "demo", "messages": MESSAGES, **fields})

    for field, value in {"temperature": -1, "top_p": 2, "n": 0, "top_logprobs": 3}.items():
        with pytest.raises(openai.BadRequestError) as bad:
            ask(**{field: value})
        assert bad.value.param == field
    with pytest.raises(openai.BadRequestError) as long:
        ask(max_tokens=5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        ask(model="gpt-4o")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as unknown:
            stranger.models.list()
        assert unknown.value.code == "invalid_api_key"


def test_many_asynchronous_streams_get_their_own_text(server: ServerProcess, own: Any) -> None:
    prompts = [f"{PROMPTS[number % 3]} {number}" for number in range(24)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=10, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def work() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    params = SamplingParams(temperature=0, max_tokens=10)
    theirs = [output.outputs[0].text for output in own.generate(prompts, params, progress=False)]
    assert asyncio.run(work()) == theirs


def test_a_closed_stream_and_a_timeout_free_their_requests(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    long: dict[str, Any] = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 1000, "n": 8}
    long["extra_body"] = {"ignore_eos": True}
    with client.completions.create(**long, stream=True) as stream:
        next(iter(stream))
    server.idle()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**long)
    server.idle()
