"""Traces: a span for each prompt, below the caller's own, without what was said."""

from __future__ import annotations

import asyncio
import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra moetor[otel] is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moetor import AsyncEngine
from moetor.engine import EngineConfig
from moetor.errors import ConfigError
from moetor.server import ServerConfig, create_app
from moetor.server.traces import Traces, require_otel
from server.server_process import ServerProcess

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


class Collector(ThreadingHTTPServer):
    """Takes traces by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()

    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append(body)
        self.server.paths.add(self.path)
        assert self.headers["Content-Type"] == "application/x-protobuf"
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def plain(attributes: Any) -> dict[str, Any]:
    """The values of a protobuf's attributes."""
    found = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = (
            [each.string_value for each in value.values] if kind == "array_value" else value
        )
    return found


def test_a_collector_gets_the_spans(collector: Collector) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    server = ServerProcess("--dtype", "float32", "--otlp-traces-endpoint", endpoint)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        body: dict[str, Any] = {"prompt": "my secret", "max_tokens": 5, "ignore_eos": True}
        whole = http.post("/v1/completions", json=body, headers=headers).json()
        chat = {"messages": [{"role": "user", "content": "my secret"}], "stream": True}
        with http.stream("POST", "/v1/chat/completions", json={**chat, "max_tokens": 900}) as left:
            next(left.iter_lines())  # and it leaves
        server.idle()
    assert server.stop() == 0
    assert collector.paths == {"/v1/traces"}
    assert not any(b"secret" in body for body in collector.bodies)
    spans: list[Span] = []
    for request in collector.requests():
        for resource in request.resource_spans:
            assert plain(resource.resource.attributes)["service.name"] == "moetor"
            for scope in resource.scope_spans:
                assert scope.scope.name == "moetor"
                spans += scope.spans
    first, second = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert first.name == second.name == "llm_request"
    assert first.kind == second.kind == Span.SPAN_KIND_SERVER
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert second.parent_span_id == b""
    assert second.trace_id not in (b"", first.trace_id)
    assert len({first.span_id, second.span_id, bytes.fromhex(PARENT)}) == 3
    told, other = plain(first.attributes), plain(second.attributes)
    assert told["gen_ai.request.id"] == whole["id"]
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "demo"
    assert told["gen_ai.usage.input_tokens"] == whole["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"]
    assert told["gen_ai.latency.e2e"] * 1e9 == pytest.approx(
        first.end_time_unix_nano - first.start_time_unix_nano, abs=1e6
    )
    assert other["gen_ai.operation.name"] == "chat"
    assert other["gen_ai.response.finish_reasons"] == ["abort"]
    assert 1 <= other["gen_ai.usage.output_tokens"] < 900
    assert first.status.code == second.status.code == Status.STATUS_CODE_UNSET


@pytest.mark.parametrize(
    "url", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://127.0.0.1:4318", "http:///v1/traces"]
)
def test_an_endpoint_that_takes_no_traces(url: str) -> None:
    with pytest.raises(ConfigError, match="v1/traces"):
        ServerConfig(otlp_traces_endpoint=url)
