"""The OpenAPI document: what it says is so, and nothing that follows it breaks the server."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from moetor.server import responses
from server.server_process import KEY, ServerProcess

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Who is there?"}]
TIMEOUT_S = 300


def test_the_document_tells_of_keys_names_and_errors(http: httpx.Client) -> None:
    told = http.get("/openapi.json").json()
    chat = told["paths"][CHAT]["post"]
    assert chat["security"] == [{"key": []}]
    assert "security" not in told["paths"]["/health"]["get"]
    assert set(chat["responses"]) == {"200", "4XX", "5XX"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "HTTPValidationError" not in told["components"]["schemas"]
    model = told["components"]["schemas"]["ChatBody"]["properties"]["model"]
    assert ["demo"] in [kind.get("enum") for kind in model["anyOf"]]


ANSWERS: list[tuple[str, dict[str, Any] | None, Any]] = [
    (CHAT, {"messages": HELLO, "max_tokens": 3}, responses.ChatCompletion),
    (
        CHAT,
        {"messages": HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "n": 2},
        responses.ChatCompletion,
    ),
    (TEXT, {"prompt": "x"}, responses.Completion),
    (TEXT, {"prompt": ["x", "y"], "logprobs": 2, "echo": True}, responses.Completion),
    (TEXT, {"prompt": "x", "temperature": -1}, responses.ErrorBody),
    (TEXT, {"prompt": "x", "model": "y"}, responses.ErrorBody),
    ("/tokenize", {"prompt": "x"}, responses.Tokens),
    ("/tokenize", {"messages": HELLO, "return_token_strs": True}, responses.Tokens),
    ("/detokenize", {"tokens": [5]}, responses.Prompt),
    ("/tokenizer_info", None, responses.TokenizerInfo),
    ("/v1/models", None, responses.ModelList),
    ("/v1/models/demo", None, responses.ModelCard),
    ("/v1/experts/stats", None, responses.ExpertsStats),
    ("/health", None, responses.Health),
    ("/version", None, responses.Version),
    ("/nothing", None, responses.ErrorBody),
]


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_answers_are_as_the_document_says(http: httpx.Client, number: int) -> None:
    path, body, model = ANSWERS[number]
    answer = http.get(path) if body is None else http.post(path, json=body)
    model.model_validate_json(answer.content, strict=True)


def random_body(draw: random.Random, path: str) -> dict[str, Any]:
    """A request that is mostly right, and asks for many things at once."""
    fields: dict[str, Any] = {
        "n": draw.choice([1, 2, 3]),
        "stream": draw.choice([True, False]),
        "stop": draw.choice(["e", ["x", "\n"], []]),
        "seed": draw.randrange(-(2**63), 2**64),
        "min_tokens": draw.choice([0, 2]),
        "temperature": draw.choice([0, 5e-324, 0.01, 1, 1.9, 1e300]),
        "top_p": draw.choice([1e-9, 0.5, 1]),
        "top_k": draw.choice([-1, 0, 1, 7, 5000]),
        "min_p": draw.choice([0, 0.2, 1]),
        "presence_penalty": draw.choice([-2, 0.5, 2]),
        "frequency_penalty": draw.choice([-2, 0.5, 2]),
        "repetition_penalty": draw.choice([5e-324, 1e-6, 1, 1.5, 1e6]),
        "logit_bias": {str(draw.randrange(1024)): draw.choice([-100, 0, 100])},
        "stop_token_ids": [draw.randrange(1024)],
        "ignore_eos": draw.choice([True, False]),
        "include_stop_str_in_output": draw.choice([True, False]),
        "skip_special_tokens": draw.choice([True, False]),
        "response_format": draw.choice([{"type": "text"}, {"type": "json_object"}]),
    }
    if path == TEXT:
        fields |= {"logprobs": draw.choice([0, 3, 100]), "echo": True}
        needed: dict[str, Any] = {"prompt": draw.choice(["x", [5, 6], ["a", "b"], [[1], [2, 3]]])}
    else:
        fields |= {"logprobs": True, "stream_options": {"include_usage": True}}
        needed = {"messages": HELLO}
    chosen = draw.sample(sorted(fields), draw.randint(0, 8))
    return {**needed, "max_tokens": draw.choice([2, 5]), **{name: fields[name] for name in chosen}}


def test_requests_that_ask_for_much_are_answered_as_the_document_says(
    http: httpx.Client, seed: int
) -> None:
    draw = random.Random(seed)
    right = 0
    for _ in range(120):
        path = draw.choice([CHAT, TEXT])
        body = random_body(draw, path)
        answer = http.post(path, json=body)
        assert answer.status_code in (200, 400), (body, answer.text)
        if answer.status_code == 400:
            responses.ErrorBody.model_validate_json(answer.content, strict=True)
            continue
        right += 1
        if not body.get("stream"):
            model = responses.ChatCompletion if path == CHAT else responses.Completion
            model.model_validate_json(answer.content, strict=True)
            continue
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], (body, answer.text)
        for event in events[:-2]:
            assert "error" not in json.loads(event.removeprefix("data: ")), (body, event)
    assert right > 40


def test_schemathesis_finds_nothing(server: ServerProcess, tmp_path: Path) -> None:
    """Cases that follow the document, and that just do not; none is answered with 500, or against
    what the document says. That some which follow it are refused cannot be told in a schema.
    """
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert command is not None
    key = ["--header", f"Authorization: Bearer {KEY}"]
    line = [command, "run", f"{server.url}/openapi.json", *key, "--max-examples", "12"]
    line += ["--phases", "coverage,fuzzing", "--exclude-checks", "positive_data_acceptance"]
    line += ["--suppress-health-check", "all", "--continue-on-failure", "--warnings", "off"]
    ran = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.idle()
