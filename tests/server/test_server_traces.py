"""Traces: a span for each prompt, below the caller's own, without what was said."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra moetor[otel] is not installed")
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moetor import AsyncEngine
from moetor.engine import EngineConfig
from moetor.errors import ConfigError
from moetor.server import ServerConfig, create_app
from moetor.server.traces import Traces, require_otel

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_spans_of_requests() -> None:
    engine = AsyncEngine.from_model("demo", config=EngineConfig(max_num_seqs=4, kv_cache_blocks=64))
    app = create_app(engine, ServerConfig(), "demo")
    kept = InMemorySpanExporter()
    traces = app.state.service.traces = Traces("http://nowhere", "demo", kept)

    async def work() -> None:
        transport = httpx.ASGITransport(app=app)
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            body: dict[str, Any] = {"prompt": ["my secret", "To be"], "max_tokens": 5, "n": 2}
            body |= {"temperature": 0.5, "ignore_eos": True}
            answer = await http.post("/v1/completions", json=body, headers=headers)
            chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            await http.post("/v1/chat/completions", json={**chat, "stream": True})
            await http.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
        await engine.shutdown()
        traces.close()
        first, second, third = kept.get_finished_spans()
        for span in (first, second):
            assert span.name == "llm_request"
            assert span.parent is not None
            assert f"{span.parent.span_id:016x}" == PARENT
            assert f"{span.context.trace_id:032x}" == TRACE
            found = dict(span.attributes or {})
            assert found["gen_ai.request.id"] == answer.json()["id"]
            assert found["gen_ai.operation.name"] == "text_completion"
            assert found["gen_ai.usage.output_tokens"] == 10
            assert found["gen_ai.request.temperature"] == 0.5
            assert found["gen_ai.request.max_tokens"] == 5
            assert found["gen_ai.response.finish_reasons"] == ("length", "length")
            first_token = found["gen_ai.latency.time_to_first_token"]
            assert 0 <= found["gen_ai.latency.time_in_queue"] <= first_token
            assert first_token <= found["gen_ai.latency.e2e"]
            assert span.end_time > span.start_time > 1.6e18
            assert "secret" not in span.to_json()
        usage = answer.json()["usage"]
        told = [dict(one.attributes or {})["gen_ai.usage.input_tokens"] for one in (first, second)]
        assert sum(told) == usage["prompt_tokens"]
        assert third.parent is None
        assert dict(third.attributes or {})["gen_ai.operation.name"] == "chat"

    asyncio.run(asyncio.wait_for(work(), 60))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"moetor\[otel\]"):
        require_otel()
