"""Metrics, logs, tokens, settings, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moetor import AsyncEngine
from moetor.engine import EngineConfig, EngineStoppedError
from moetor.errors import ConfigError, ParallelError
from moetor.server import ServerConfig, create_app
from moetor.server.experts import balancedness, expert_load
from moetor.server.run import listen, serve
from server.server_process import KEY, ServerProcess

TEXT = "/v1/completions"


def figures(http: httpx.Client) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }


def test_metrics_count_what_was_asked(http: httpx.Client) -> None:
    before = figures(http)
    body = {"prompt": ["ROMEO:", "To be"], "max_tokens": 5, "n": 2, "ignore_eos": True}
    usage = http.post(TEXT, json=body).json()["usage"]
    after = figures(http)

    def grew(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew("vllm:generation_tokens_total", "demo") == usage["completion_tokens"] == 20
    assert grew("vllm:request_success_total", "length", "demo") == 4
    assert grew("vllm:time_to_first_token_seconds_count", "demo") == 2
    assert grew("vllm:e2e_request_latency_seconds_count", "demo") == 2
    assert grew("vllm:inter_token_latency_seconds_count", "demo") == 16
    assert grew("vllm:request_generation_tokens_sum", "demo") == 20
    assert after["vllm:num_requests_running", "demo"] == 0
    assert after["vllm:kv_cache_usage_perc", "demo"] == 0
    layers = [name for name in after if name[0] == "moe_balancedness"]
    assert len(layers) == 4
    assert all(1 / 16 <= after[name] <= 1 for name in layers)
    assert [name for name in after if name[0] == "moe_kernel_info"]
    assert not [name for name in after if name[0] == "moe_expert_tokens_total"]


@pytest.mark.parametrize("error", [EngineStoppedError, ParallelError, TimeoutError])
def test_other_figures_do_not_wait_for_ranks_that_are_gone(error: type[Exception]) -> None:
    """A scrape that asks for the experts' load may be the first to notice."""

    async def gone() -> dict[str, list[int]]:
        raise error("another rank did not answer")

    engine: Any = SimpleNamespace(config=EngineConfig(record_expert_load=True), expert_load=gone)
    assert asyncio.run(expert_load(engine)) is None


def test_experts_are_counted(http: httpx.Client) -> None:
    before = http.get("/v1/experts/stats").json()
    http.post(TEXT, json={"prompt": "ROMEO:", "max_tokens": 6, "ignore_eos": True})
    after = http.get("/v1/experts/stats").json()
    assert len(after["layers"]) == len(after["fusion"]) == 4
    assert after["fusion"][0]["level"] == "block"
    for old, new in zip(before["layers"], after["layers"], strict=True):
        grown = [b - a for a, b in zip(old["tokens"], new["tokens"], strict=True)]
        # each token goes to four experts; the last generated one is not computed
        assert sum(grown) % 4 == 0
        assert 5 * 4 <= sum(grown) <= 7 * 4
        assert new["balancedness"] == balancedness(new["tokens"])


def test_balancedness() -> None:
    assert balancedness([0, 0]) is None
    assert balancedness([3, 3, 3]) == 1
    assert balancedness([8, 0, 0, 0]) == 0.25


def test_tokens_and_back(http: httpx.Client) -> None:
    text = "To be, or not to be — that is the question."
    made = http.post("/tokenize", json={"prompt": text}).json()
    assert made["count"] == len(made["tokens"]) > 5
    assert made["max_model_len"] == 1024
    back = http.post("/detokenize", json={"tokens": made["tokens"]}).json()
    assert back["prompt"] == text
    messages = [{"role": "user", "content": "Hello"}]
    chat = http.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    assert len(chat["token_strs"]) == chat["count"] > 2
    info = http.get("/tokenizer_info").json()
    assert info["vocab_size"] == 1024
    assert "raise_exception" in info["chat_template"]


def test_the_log_has_no_key_and_no_prompt(http: httpx.Client, server: ServerProcess) -> None:
    http.post(TEXT, json={"prompt": "my secret words", "max_tokens": 2})
    http.post(TEXT, json={"prompt": "my secret words", "max_tokens": -2})
    deadline = time.monotonic() + 30
    while not any("prompts=1" in line for line in server.log) and time.monotonic() < deadline:
        time.sleep(0.05)
    log = "".join(server.log)
    assert "prompts=1 prompt_tokens=" in log
    assert KEY not in log
    assert "secret" not in log


def test_sigterm_drains_then_ends_what_is_left() -> None:
    server = ServerProcess("--drain-timeout", "0.2", "--log-interval", "0.2")
    body = {"prompt": "ROMEO:", "max_tokens": 1000, "ignore_eos": True, "n": 16}
    answers: dict[bool, Any] = {}
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def ask(stream: bool) -> None:
            answers[stream] = client.post(TEXT, json={**body, "stream": stream})

        threads = [threading.Thread(target=ask, args=[stream]) for stream in (True, False)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while client.get("/health").json()["running"] < 32:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.5)
        assert server.stop() == 0
        for thread in threads:
            thread.join()
    assert '"code":"service_unavailable"' in answers[True].text
    assert answers[True].text.endswith("data: [DONE]\n\n")
    assert answers[False].status_code == 503
    assert any("Avg generation throughput:" in line for line in server.log)


def test_a_dead_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(max_num_seqs=4, kv_cache_blocks=64)
    engine = AsyncEngine.from_model("demo", config=config)
    app = create_app(engine, ServerConfig(max_requests_per_minute=5), "demo")

    def broken(*_: Any) -> Any:
        raise SystemExit

    async def work() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            body = {"prompt": "ROMEO:", "max_tokens": 2}
            assert (await http.post(TEXT, json=body)).status_code == 200
            assert (await http.get("/health")).status_code == 200
            monkeypatch.setattr(engine.engine.core.runner, "start", broken)
            answer = await http.post(TEXT, json=body)
            assert answer.status_code == 503
            assert "has stopped" in answer.json()["error"]["message"]
            assert (await http.get("/health")).status_code == 503
            assert (await http.post(TEXT, json=body)).status_code == 503
            assert (await http.post(TEXT, json=body)).status_code == 503
            assert (await http.post(TEXT, json=body)).status_code == 503
            limited = await http.post(TEXT, json=body)
            assert limited.status_code == 429
            assert 1 <= int(limited.headers["retry-after"]) <= 12

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_taken_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*--port"):
            listen("127.0.0.1", port)


def test_what_cannot_be_read_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    def load() -> Any:
        pytest.fail("a model is loaded")

    for wrong in ({"chat_template": tmp_path / "none"}, {"api_key_file": tmp_path / "none"}):
        with pytest.raises(ConfigError, match="cannot be read"):
            serve(load, ServerConfig(port=0, **wrong), "demo")


def test_keys_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerConfig(api_key_file=tmp_path / "none").api_keys()
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ConfigError, match="no key in it"):
        ServerConfig(api_key_file=tmp_path / "empty").api_keys()
    with pytest.raises(ConfigError, match="no variable MY_KEY"):
        ServerConfig(api_key_env="MY_KEY").api_keys()
    with pytest.raises(ConfigError, match="empty or has"):
        ServerConfig(api_key="").api_keys()
    monkeypatch.setenv("MY_KEY", "third")
    (tmp_path / "two").write_text("first\nsecond\n")
    made = ServerConfig(api_key_file=tmp_path / "two", api_key_env="MY_KEY").api_keys()
    assert made == ("first", "second", "third")


@pytest.mark.parametrize(
    "wrong", [{"port": 70000}, {"max_waiting": -1}, {"write_timeout": 0}, {"max_body_mib": -1}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerConfig(**wrong)


def test_events_of_several_tokens() -> None:
    engine = AsyncEngine.from_model("demo", config=EngineConfig(kv_cache_blocks=64))
    app = create_app(engine, ServerConfig(stream_interval=5), "demo")

    async def work() -> None:
        transport = httpx.ASGITransport(app=app)
        body = {"prompt": "ROMEO:", "max_tokens": 18, "ignore_eos": True, "temperature": 0}
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            whole = (await http.post(TEXT, json=body)).json()["choices"][0]["text"]
            told = await http.post(TEXT, json={**body, "stream": True, "logprobs": 0})
        await engine.shutdown()
        lines = told.text.split("\n\n")[:-2]
        events = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        counts = [len(event["logprobs"]["tokens"]) for event in events]
        assert counts[0] == 1
        assert all(count >= 5 for count in counts[1:-1])
        assert sum(counts) == 18
        assert "".join(event["text"] for event in events) == whole

    asyncio.run(asyncio.wait_for(work(), 60))


def test_what_a_chat_template_is_told(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ reasoning_effort }}"
        "{# it knows the developer #}"
    )
    engine = AsyncEngine.from_model("demo", config=EngineConfig(kv_cache_blocks=64))
    app = create_app(engine, ServerConfig(chat_template=template), "demo")
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    body: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}

    async def work() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:

            async def ask(**fields: Any) -> Any:
                asked = {**body, "messages": said, **fields}
                return (await http.post("/v1/chat/completions", json=asked)).json()

            for effort in ("low", "high"):
                prompt = f"developer:Be brief.;user:Hi;{effort}"
                text = {**body, "prompt": prompt, "add_special_tokens": False}
                own = (await http.post(TEXT, json=text)).json()
                told = await ask(reasoning_effort=effort)
                assert told["usage"]["prompt_tokens"] == own["usage"]["prompt_tokens"]
                assert told["choices"][0]["message"]["content"] == own["choices"][0]["text"]
            same = {"reasoning_effort": "low"}
            assert "choices" in await ask(**same, chat_template_kwargs=same)
            other = await ask(reasoning_effort="high", chat_template_kwargs=same)
            assert other["error"]["param"] == "reasoning_effort"
        await engine.shutdown()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_sigterm_before_the_engine_is_ready() -> None:
    command = [sys.executable, "-m", "moetor", "serve", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "loading" in process.stderr.readline()
    process.terminate()
    assert "interrupted" in process.stderr.read()  # to its end: the engine's process is gone too
    assert process.wait(30) == 130
