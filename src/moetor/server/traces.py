"""OpenTelemetry traces: one span for each prompt, with vLLM's attributes and those of the GenAI
semantic conventions. Neither prompts nor texts are part of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moetor.engine.sequence import Request
from moetor.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_NS = 10**9


def require_otel() -> None:
    """Refuses traces where the extra is not installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"otlp_traces_endpoint needs {missing.name}, which is not installed; pip install "
            "'moetor[otel]'"
        ) from missing


class Traces:
    """Sends a span when a request is over.

    Args:
        endpoint: of a collector that speaks OTLP over HTTP, such as
            `http://127.0.0.1:4318/v1/traces`.
        model: name of the model.
        exporter: where spans go instead.

    Raises:
        ConfigError: the extra is not installed.
    """

    def __init__(self, endpoint: str, model: str, exporter: SpanExporter | None = None) -> None:
        require_otel()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._model, self._server, self._failed = model, SpanKind.SERVER, StatusCode.ERROR
        self._contexts = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "moetor"}))
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint))
        )
        self._tracer = self._provider.get_tracer("moetor")

    def ended(self, request: Request, name: str, headers: Mapping[str, str]) -> None:
        """Notes a prompt whose answer is over, or was given up.

        Args:
            name: of the HTTP request.
            headers: of it, whose `traceparent` is the span's parent.
        """
        # Times of the request are those of a clock that does not know the date.
        shift = time.time() - time.monotonic()
        times = request.metrics
        end = time.monotonic() if times.finished_time is None else times.finished_time
        span = self._tracer.start_span(
            "llm_request",
            context=self._contexts.extract(headers),
            kind=self._server,
            start_time=int((times.arrival_time + shift) * _NS),
            attributes=self._attributes(request, name, end),
        )
        if request.error is not None:
            # Without the message, which may repeat what was sent.
            span.set_status(self._failed)
            span.set_attribute("error.type", request.error.partition(":")[0])
        span.end(int((end + shift) * _NS))

    def _attributes(self, request: Request, name: str, end: float) -> dict[str, Any]:
        params, times = request.params, request.metrics
        made = sum(one.known - one.prompt_len for one in request.sequences)
        found: dict[str, Any] = {
            "gen_ai.operation.name": "chat" if name.startswith("chat") else "text_completion",
            "gen_ai.request.id": name,
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": len(request.prompt_ids),
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
            "gen_ai.usage.completion_tokens": made,
            "gen_ai.usage.output_tokens": made,
            "gen_ai.response.finish_reasons": [
                one.finish_reason or "abort" for one in request.sequences
            ],
            "gen_ai.latency.e2e": end - times.arrival_time,
        }
        if params.max_tokens is not None:
            found["gen_ai.request.max_tokens"] = params.max_tokens
        if times.first_scheduled_time is not None:
            found["gen_ai.latency.time_in_queue"] = times.first_scheduled_time - times.arrival_time
        if times.first_token_time is not None:
            found["gen_ai.latency.time_to_first_token"] = (
                times.first_token_time - times.arrival_time
            )
        return found

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
