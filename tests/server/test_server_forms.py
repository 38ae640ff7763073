"""Texts that must have a form, and calls of tools that must be made, as clients ask for them."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel, Field
from tokenizers import AddedToken

from moetor import AsyncEngine
from moetor.engine import EngineConfig
from moetor.engine.grammar import GrammarCompiler
from moetor.server import ServerConfig, create_app
from moetor.server.forms import chat_form
from moetor.server.protocol import ChatBody
from moetor.server.tools import offered_tools
from server.server_process import KEY, ServerProcess
from server.test_server_tools import TEMPLATE

MESSAGES: list[Any] = [{"role": "user", "content": "Who is there?"}]
HOUSE: Any = {
    "type": "object",
    "properties": {"house": {"$ref": "#/$defs/house"}, "kin": {"type": "integer", "maximum": 99}},
    "required": ["house", "kin"],
    "additionalProperties": False,
    "$defs": {"house": {"enum": ["Montague", "Capulet"]}},
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "h", "strict": True, "schema": HOUSE}}


class Person(BaseModel):
    house: Literal["Montague", "Capulet"]
    age: int = Field(ge=0, le=99)
    alive: bool


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def is_house(text: str) -> bool:
    read = json.loads(text)
    return read["house"] in ("Montague", "Capulet") and type(read["kin"]) is int


def test_a_chat_answers_in_json(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format=FORMAT, n=3, seed=1, max_tokens=300
    )
    assert all(is_house(choice.message.content or "") for choice in made.choices)
    assert {choice.finish_reason for choice in made.choices} == {"stop"}


def test_a_streamed_chat_answers_in_json(client: openai.OpenAI) -> None:
    text, reasons = "", []
    for chunk in client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format=FORMAT, stream=True, logprobs=True, seed=2
    ):
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert is_house(text)
    assert reasons[-1] == "stop"


def test_a_model_of_pydantic_is_parsed(client: openai.OpenAI) -> None:
    made = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Person, seed=4, max_tokens=300
    )
    person = made.choices[0].message.parsed
    assert isinstance(person, Person)


def test_a_json_object(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        logit_bias={"94": 6},  # the closing bracket, so that it comes to an end
        max_tokens=400,
        seed=3,
    )
    text = made.choices[0].message.content or ""
    assert text.startswith("{")
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


FORMS: dict[str, tuple[Any, str]] = {
    "regex": ({"regex": "[0-9]{2}-[ab]"}, r"[0-9]{2}-[ab]"),
    "choice": ({"choice": ["aye", "nay"]}, "aye|nay"),
    "grammar": ({"grammar": 'start: "<" /[0-9]/ ">"'}, "<[0-9]>"),
    "json": ({"json": {"const": 5}, "disable_any_whitespace": True}, "5"),
}


@pytest.mark.parametrize("name", FORMS)
def test_completions_have_the_form(client: openai.OpenAI, name: str) -> None:
    form, pattern = FORMS[name]
    made = client.completions.create(
        model="demo",
        prompt=["ROMEO:", "JULIET:\nO"],
        n=2,
        echo=True,
        extra_body={"structured_outputs": form},
    )
    assert len(made.choices) == 4
    for number, choice in enumerate(made.choices):
        text = choice.text.removeprefix(("ROMEO:", "JULIET:\nO")[number // 2])
        assert re.fullmatch(pattern, text), choice.text
        assert choice.finish_reason == "stop"


def test_completions_answer_in_json(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="demo", prompt="ROMEO:", max_tokens=300, extra_body={"response_format": FORMAT}
    )
    assert is_house(made.choices[0].text)


TAGS: Any = {
    "structures": [{"begin": "e<", "schema": {"type": "integer", "maximum": 9}, "end": ">"}],
    "triggers": ["e"],
}


@pytest.mark.parametrize("field", ["response_format", "structured_outputs"])
def test_tags_in_a_free_text(client: openai.OpenAI, field: str) -> None:
    form: Any = {"type": "structural_tag", **TAGS}
    if field == "structured_outputs":
        form = {"structural_tag": json.dumps(form)}
    made = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=80, seed=5, extra_body={field: form}
    )
    text = made.choices[0].message.content or ""
    assert re.fullmatch(r"([^e]|e<-?\d+>)*(e(<(-?\d*)?)?)?", text), text
    assert "e<" in text


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"type": "structural_tag"}, "structures"),
        ({"type": "structural_tag", "format": {"type": "any_text"}}, "format"),
        ({"type": "structural_tag", **TAGS, "triggers": ["a"]}, "none of the triggers"),
        ({"type": "json_object", **TAGS}, "structural_tag"),
    ],
)
def test_tags_that_are_refused(client: openai.OpenAI, form: Any, told: str) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as refused:
        client.chat.completions.create(
            model="demo", messages=MESSAGES, extra_body={"response_format": form}
        )
    assert refused.value.param == "response_format"


def function(name: str, strict: bool | None = None, **properties: Any) -> Any:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    made: dict[str, Any] = {"name": name, "parameters": parameters}
    if strict is not None:
        made["strict"] = strict
    return {"type": "function", "function": made}


LOOK = function("look", city={"enum": ["Elsinore", "Verona"]})
WAIT = function("wait", hours={"type": "integer", "minimum": 1, "maximum": 9})
REST: Any = {"type": "function", "function": {"name": "rest"}}


def with_tools(
    folder: Path, work: Callable[[openai.AsyncOpenAI, AsyncEngine], Awaitable[None]]
) -> None:
    """Runs `work` with a client of a server whose chat template knows tools."""
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    engine = AsyncEngine.from_model("demo", config=EngineConfig(kv_cache_blocks=64, max_num_seqs=4))
    app = create_app(engine, ServerConfig(chat_template=template), "demo")
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
    client = openai.AsyncOpenAI(
        base_url="http://here/v1", api_key="x", http_client=http, max_retries=0
    )

    async def run() -> None:
        try:
            await asyncio.wait_for(work(client, engine), 120)
        finally:
            await engine.shutdown()

    asyncio.run(run())


def arguments_of(calls: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls or []]


def test_calls_that_must_be_made(tmp_path: Path) -> None:
    async def work(client: openai.AsyncOpenAI, _: AsyncEngine) -> None:
        asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 400}
        named = {"type": "function", "function": {"name": "wait"}}
        made = await client.chat.completions.create(
            **asked, tools=[LOOK, WAIT], tool_choice=named, seed=1
        )
        (choice,) = made.choices
        ((name, arguments),) = arguments_of(choice.message.tool_calls)
        assert name == "wait"
        assert list(arguments) == ["hours"]
        assert 1 <= arguments["hours"] <= 9
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None

        made = await client.chat.completions.create(
            **asked,
            tools=[LOOK, WAIT, REST],
            tool_choice="required",
            parallel_tool_calls=False,
            n=3,
            seed=2,
        )
        for choice in made.choices:
            ((name, arguments),) = arguments_of(choice.message.tool_calls)
            assert {"look": ["city"], "wait": ["hours"], "rest": []}[name] == list(arguments)

        stream = await client.chat.completions.create(
            **asked,
            tools=[LOOK],
            tool_choice="required",
            parallel_tool_calls=False,
            stream=True,
            temperature=0,
        )
        chunks = [chunk.choices[0] async for chunk in stream]
        calls = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
        assert calls
        for _, arguments in arguments_of(calls):
            assert arguments["city"] in ("Elsinore", "Verona")
        assert not "".join(chunk.delta.content or "" for chunk in chunks)

        made = await client.chat.completions.create(
            **asked, tools=[LOOK], response_format=FORMAT, seed=5
        )
        (choice,) = made.choices
        assert choice.message.tool_calls or is_house(choice.message.content or "")

    with_tools(tmp_path, work)


def test_what_cannot_be_asked_of_tools(tmp_path: Path) -> None:
    bad = {"type": "function", "function": {"name": "x", "parameters": {"type": "nothing"}}}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"tools": [bad], "tool_choice": "required"}, "tools", "nothing"),
        (
            {"tools": [LOOK], "tool_choice": "required", "response_format": FORMAT},
            "tool_choice",
            "response_format",
        ),
        (
            {"tools": [LOOK], "extra_body": {"structured_outputs": {"regex": "a"}}},
            "structured_outputs",
            "json",
        ),
    ]

    async def work(client: openai.AsyncOpenAI, _: AsyncEngine) -> None:
        for fields, param, told in cases:
            with pytest.raises(openai.BadRequestError, match=told) as refused:
                await client.chat.completions.create(model="demo", messages=MESSAGES, **fields)
            assert refused.value.param == param

    with_tools(tmp_path, work)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"response_format": FORMAT}, "response_format"),
        ({"tools": [LOOK], "tool_choice": "required"}, "tools"),
    ]

    async def work(client: openai.AsyncOpenAI, _: AsyncEngine) -> None:
        for fields, param in cases:
            with pytest.raises(openai.BadRequestError, match=r"moetor\[structured\]") as refused:
                await client.chat.completions.create(model="demo", messages=MESSAGES, **fields)
            assert refused.value.param == param

    with_tools(tmp_path, work)


CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Verona"}}\n</tool_call>'
WRONG_CALL = CALL.replace("Verona", "Rome")
STRICT = function("look", strict=True, city={"enum": ["Elsinore", "Verona"]})


@pytest.mark.parametrize("marks", [None, False, True])
def test_strict_tools_in_a_free_text(own: Any, marks: bool | None) -> None:
    """Whether the marks are text or tokens of their own."""
    import copy

    tokenizer = copy.deepcopy(own.tokenizer)
    if marks is not None:
        for mark in ("<tool_call>", "</tool_call>"):
            tokenizer.add_tokens([AddedToken(mark, special=marks, normalized=False)])
    grammars = GrammarCompiler(tokenizer, len(tokenizer), frozenset({0}))
    body = ChatBody(messages=[{"role": "user", "content": "x"}], tools=[STRICT, WAIT])
    offer = offered_tools(body, "tools <tool_call>")
    form = chat_form(body, offer, grammars)
    assert form is not None
    form.check(grammars)
    for text, right in (
        ("Nobody.", True),
        (CALL, True),
        ("I look.\n" + CALL + "\n" + CALL, True),
        (WRONG_CALL, False),
        ("I look.\n" + CALL.replace("look", "jump"), False),
    ):
        matcher = grammars.start(form.asked).matcher
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        fits = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        assert fits is right, text
