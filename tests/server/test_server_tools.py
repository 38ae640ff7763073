"""Tools: what is parsed, and what the client gets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from moetor import AsyncEngine, SamplingParams
from moetor.engine import EngineConfig, OutputStream
from moetor.engine.news import RequestNews, SequenceNews, copy_of
from moetor.engine.text import RelayedText
from moetor.server import ServerConfig, create_app
from moetor.server.tools import ToolParser

CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Elsinore"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "wait", "arguments": {}}</tool_call>'
TEXTS = {
    "plain": ("All is well.\n", "All is well.\n", []),
    "call": (CALL, "", ["look"]),
    "said_first": ("I look.\n\n" + CALL, "I look.", ["look"]),
    "two": (CALL + "\n" + OTHER, "", ["look", "wait"]),
    "cut": (CALL.removesuffix("</tool_call>"), "", ["look"]),
    "broken": ("<tool_call>{oops</tool_call>", "<tool_call>{oops</tool_call>", []),
    "no_name": ('<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "half_a_mark": ("a < b, <tool_", "a < b, <tool_", []),
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} Call with <tool_call>.{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}\n{% endfor %}"
)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 5, 11, 1000])
def test_pieces_of_any_size_give_the_same(name: str, size: int) -> None:
    text, said, names = TEXTS[name]
    parser, found, calls = ToolParser(), "", []
    pieces = [text[place : place + size] for place in range(0, len(text), size)]
    for place, piece in enumerate(pieces):
        new, made = parser.feed(piece, final=place == len(pieces) - 1)
        found += new
        calls += made
    assert found == said
    assert [call["function"]["name"] for call in calls] == names
    assert [call["index"] for call in calls] == list(range(len(names)))


def test_one_call_where_one_is_asked_for() -> None:
    _, calls = ToolParser(single=True).feed(CALL + OTHER, final=True)
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Elsinore"}]


def scripted(engine: AsyncEngine, text: str, size: int) -> OutputStream:
    """The outputs of a model that writes `text`."""
    request = copy_of(engine.intake.request([1, 2], SamplingParams(), "r"), None)
    request.sequences[0].text = RelayedText()
    stream = OutputStream(request, lambda _: None, merge=False)
    pieces = [text[place : place + size] for place in range(0, len(text), size)]
    for number, piece in enumerate(pieces, 1):
        reason: Any = "stop" if number == len(pieces) else None
        stream.take(RequestNews("r", [SequenceNews(0, [5], piece, None, reason, None)]))
    return stream


def test_the_client_gets_calls_and_answers_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    engine = AsyncEngine.from_model("demo", config=EngineConfig(kv_cache_blocks=64, max_num_seqs=4))
    app = create_app(engine, ServerConfig(chat_template=template), "demo")
    prompts: list[str] = []

    async def add(prompt: Any, *_: Any, **__: Any) -> OutputStream:
        prompts.append(engine.tokenizer.decode(prompt))
        return scripted(engine, "I look.\n" + CALL, 7)

    async def work() -> None:
        monkeypatch.setattr(engine, "add_request", add)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
        client = openai.AsyncOpenAI(base_url="http://here/v1", api_key="x", http_client=http)
        messages: list[Any] = [{"role": "user", "content": "Look."}]
        asked: dict[str, Any] = {"model": "demo", "tools": [TOOL]}
        made = await client.chat.completions.create(messages=messages, **asked)
        choice = made.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"city": "Elsinore"}
        assert '"name": "look"' in prompts[-1]

        chunks = [
            chunk.choices[0]
            async for chunk in await client.chat.completions.create(
                messages=messages, stream=True, **asked
            )
        ]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == "I look."
        parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
        assert [(part.index, part.function and part.function.name) for part in parts] == [
            (0, "look")
        ]
        assert chunks[-1].finish_reason == "tool_calls"

        answered: list[Any] = [choice.message.model_dump()]
        answered.append({"role": "tool", "tool_call_id": call.id, "content": "Fog."})
        await client.chat.completions.create(
            messages=[*messages, *answered], **asked, tool_choice="none"
        )
        assert "Elsinore" in prompts[-1]
        assert "Fog." in prompts[-1]
        assert "Call with" not in prompts[-1]

    try:
        asyncio.run(asyncio.wait_for(work(), 60))
    finally:
        asyncio.run(engine.shutdown())
