"""Bad input of every kind: an answer in OpenAI's form, and the server goes on."""

from __future__ import annotations

import json
import random
import socket
import string
from typing import Any

import httpx2 as httpx
import pytest

from server.server_process import KEY, ServerProcess

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
OTHER = {"type": "function", "function": {"name": "other"}}
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
UNNAMED = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
AN_OBJECT = {"type": "json_object"}
NO_TEXT = {"prompt": "x", "max_tokens": 0, "echo": True, "response_format": AN_OBJECT}
BOTH_FORMS = {"prompt": "x", "response_format": AN_OBJECT, "structured_outputs": {"regex": "a"}}
PADDED = {"padding": "max_length", "max_length": 10**6}

# path, fields, the one that is named, a word of the message
WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {}, "messages", "missing"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": "Hello"}, "messages", "list"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages", "role"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "roles of this model"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "text alone"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "text"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages", "content is missing"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": []}]}, "messages", "content"),
    (CHAT, {"messages": [CALLED, *HELLO]}, "messages", "no tool_calls"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature", "number"),
    (CHAT, {"messages": HELLO, "temperature": -0.1}, "temperature", "must be"),
    (CHAT, {"messages": HELLO, "temperature": 0, "n": 2}, "n", "same text"),
    (CHAT, {"messages": HELLO, "n": 1000}, "n", "128"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens", "at least 1"),
    (CHAT, {"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "both"),
    (CHAT, {"messages": HELLO, "max_tokens": 2000}, "messages", "maximum context length"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    (CHAT, {"messages": HELLO, "logprobs": 1}, "logprobs", "bool"),
    (CHAT, {"messages": HELLO, "tools": [TOOL]}, "tools", "has no tools"),
    (CHAT, {"messages": HELLO, "tools": [{}]}, "tools", "tools.0"),
    (CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": "must"}, "tool_choice", "required"),
    (CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": {}}, "tool_choice", "required"),
    (CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": OTHER}, "tool_choice", "not in"),
    (CHAT, {"messages": HELLO, "tool_choice": "auto"}, "tool_choice", "needs tools"),
    (CHAT, {"messages": HELLO, "parallel_tool_calls": True}, "parallel_tool_calls", "tools"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format", "json"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, None, "needs it"),
    (CHAT, {"messages": HELLO, "response_format": BAD_SCHEMA}, "response_format", "nothing"),
    (CHAT, {"messages": HELLO, "response_format": UNNAMED}, "response_format", "name"),
    (TEXT, {"prompt": "x", "response_format": BAD_SCHEMA}, "response_format", "nothing"),
    (TEXT, {"prompt": "x", "structured_outputs": {}}, "structured_outputs", "exactly one"),
    (TEXT, {"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs", "compile"),
    (TEXT, {"prompt": "x", "structured_outputs": {"choice": "a"}}, "structured_outputs", "list"),
    (TEXT, {"prompt": "x", "guided_json": {}}, "guided_json", "structured_outputs"),
    (TEXT, BOTH_FORMS, "structured_outputs", "both"),
    (TEXT, NO_TEXT, "response_format", "max_tokens"),
    (CHAT, {"messages": HELLO, "functions": []}, "functions", "not a field"),
    (CHAT, {"messages": HELLO, "stream_options": {}}, "stream_options", "stream"),
    (CHAT, {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens", "template"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": 0}}, None, "tokenize"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": PADDED}, None, "max_length, padding"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, None, "messages"),
    (CHAT, {"messages": HELLO, "continue_final_message": True}, None, "add_generation_prompt"),
    (CHAT, {"messages": HELLO, "modalities": ["text", "audio"]}, "modalities", "text"),
    (CHAT, {"messages": HELLO, "modalities": []}, "modalities", "at least 1"),
    (CHAT, {"messages": HELLO, "audio": {"voice": "x"}}, "audio", "not a field"),
    (CHAT, {"messages": HELLO, "prediction": {"content": "x"}}, "prediction", "not a field"),
    (CHAT, {"messages": HELLO, "service_tier": "flex"}, "service_tier", "default"),
    (CHAT, {"messages": HELLO, "store": True}, "store", "False"),
    (CHAT, {"messages": HELLO, "metadata": {"a": "b"}}, "metadata", "not a field"),
    (CHAT, {"messages": HELLO, "reasoning_effort": "low"}, "reasoning_effort", "template"),
    (CHAT, {"messages": HELLO, "reasoning_effort": "much"}, "reasoning_effort", "high"),
    (TEXT, {}, "prompt", "missing"),
    (TEXT, {"prompt": ""}, "prompt", "no tokens"),
    (TEXT, {"prompt": []}, "prompt", ""),
    (TEXT, {"prompt": [[]]}, "prompt", "no tokens"),
    (TEXT, {"prompt": [1, "two"]}, "prompt", ""),
    (TEXT, {"prompt": [1024]}, "prompt", "vocabulary"),
    (TEXT, {"prompt": [-1]}, "prompt", ""),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens", "echo"),
    (TEXT, {"prompt": "x", "max_tokens": 1024}, "prompt", "maximum context length"),
    (TEXT, {"prompt": "x", "min_tokens": 20}, "min_tokens", "max_tokens"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
    (TEXT, {"prompt": "x", "best_of": 3}, "best_of", "n (1)"),
    (TEXT, {"prompt": "x", "logprobs": 101}, "logprobs", "100"),
    (TEXT, {"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias", "token id"),
    (TEXT, {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias", "100"),
    (TEXT, {"prompt": "x", "logit_bias": {"1024": 1}}, "prompt", "vocabulary"),
    (TEXT, {"prompt": "x", "stop": ["a"] * 65}, "stop", "64"),
    (TEXT, {"prompt": "x", "stop": [""]}, "stop", "at least one"),
    (TEXT, {"prompt": "x", "seed": 2**64}, "seed", "64 bits"),
    (TEXT, {"prompt": "x", "echo": "yes"}, "echo", "bool"),
    ("/tokenize", {}, "prompt", "either"),
    ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt", "either"),
    ("/detokenize", {"tokens": [4000]}, "tokens", "vocabulary"),
    ("/detokenize", {"tokens": "x"}, "tokens", "list"),
]


@pytest.mark.parametrize(("path", "fields", "param", "told"), WRONG)
def test_a_wrong_field_is_named(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str | None, told: str
) -> None:
    answer = http.post(path, json=fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert told in error["message"] or told == "both"
    if param is not None:
        assert error["param"] == param


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "cut": b'{"prompt": "x"',
    "not_utf8": b'{"prompt": "\xff\xfe"}',
    "surrogate": b'{"prompt": "\\ud800"}',
    "nested": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested_field": b'{"prompt": "x", "extra": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "nan": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": 1e999}',
    "long_number": b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    "array": b"[]",
    "string": b'"prompt"',
    "nul": b'{"prompt": "\\u0000", "max_tokens": -1}',
    "huge_n": b'{"prompt": "x", "n": 999999999999}',
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
def test_a_malformed_body(http: httpx.Client, path: str, name: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = http.post(path, content=BODIES[name], headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "multipart/form-data", ""])
def test_another_content_type(http: httpx.Client, kind: str) -> None:
    answer = http.post(TEXT, content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


def test_random_bodies_never_break_the_server(http: httpx.Client, seed: int) -> None:
    draw = random.Random(seed)
    names = ["prompt", "n", "stop", "logprobs", "temperature", "messages", "top_p", "echo", "x"]
    values: list[Any] = [None, True, -1, 0, 3, 2**63, 1.5, "", "a", [], [1], ["a"], {}, {"1": 2}]
    values += [[[]], [[1, 2], [3]], {"type": "text"}, [{"role": "user", "content": "a"}]]
    for _ in range(150):
        body = {name: draw.choice(values) for name in draw.sample(names, draw.randint(0, 5))}
        body |= {"max_tokens": 1, "logprobs": body.get("logprobs")}
        answer = http.post(draw.choice([CHAT, TEXT]), json=body)
        assert answer.status_code in (200, 400, 429), (body, answer.text)
        text = json.dumps(body).encode()
        place = draw.randrange(len(text))
        noise = text[:place] + draw.choice(string.printable).encode() + text[place + 1 :]
        answer = http.post(TEXT, content=noise, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 429), (noise, answer.text)


def test_a_large_body_is_refused_before_and_while_it_is_read(http: httpx.Client) -> None:
    answer = http.post(TEXT, content=b" " * (17 * 2**20))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    pieces = (b" " * 2**20 for _ in range(20))  # its length is not told
    headers = {"Content-Type": "application/json"}
    assert http.post(TEXT, content=pieces, headers=headers).status_code == 413
    assert http.get("/health").status_code == 200


def test_a_flood_of_headers_ends_its_connection(server: ServerProcess) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    for flood in (b"X-A: " + b"a" * 2**20, b"X-A: a\r\n" * 2**17):
        with socket.create_connection((host, int(port)), timeout=30) as line:
            try:
                line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + flood)
                answer = line.recv(2**16)
            except ConnectionError:
                answer = b""
        assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_more_than_the_queue_takes(http: httpx.Client) -> None:
    answer = http.post(TEXT, json={"prompt": ["x"] * 65})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("sent", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x"])
def test_without_the_key(server: ServerProcess, sent: str | None) -> None:
    headers = {} if sent is None else {"Authorization": sent}
    with httpx.Client(base_url=server.url, headers=headers) as stranger:
        for path in ("/v1/models", "/v1/experts/stats", "/tokenizer_info", "/openapi.json", "/no"):
            answer = stranger.get(path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert stranger.post(TEXT, json={"prompt": "x"}).status_code == 401
        for path in ("/health", "/metrics", "/version"):
            assert stranger.get(path).status_code == 200


def test_paths_and_methods(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert http.get(TEXT).status_code == 405
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
