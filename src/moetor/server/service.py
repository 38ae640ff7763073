"""What the endpoints share: the engine, the names, the tokenizer's thread, the queue's bound."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moetor.engine import (
    EngineClient,
    EngineStoppedError,
    OutputStream,
    RequestOutput,
    SamplingParams,
)
from moetor.engine.grammar import GrammarCompiler
from moetor.engine.sequence import Request as EngineRequest
from moetor.engine.text import decode_function
from moetor.errors import InputError
from moetor.server.config import ServerConfig
from moetor.server.errors import ApiError, refusal
from moetor.server.forms import Form
from moetor.server.images import ImageLoader
from moetor.server.metrics import Metrics
from moetor.server.streams import EventStream, while_connected
from moetor.server.traces import Traces

_log = logging.getLogger("moetor.server")
Result = TypeVar("Result")


class Job:
    """The prompts of one request, on their way through the engine.

    Args:
        name: of the request.
        choices: continuations of each prompt.
        metrics: count it.
        release: called once, at the end.
        ended: called then with each prompt's request.

    Attributes:
        numbers: of its prompts, by the name of their engine's request.
    """

    def __init__(
        self,
        name: str,
        choices: int,
        metrics: Metrics,
        release: Callable[[], None],
        ended: Callable[[EngineRequest], None],
    ) -> None:
        self.name, self.choices = name, choices
        self.streams: list[OutputStream] = []
        self.numbers: dict[str, int] = {}
        self._metrics = metrics
        self._release: Callable[[], None] | None = release
        self._ended = ended
        self._begin = time.monotonic()

    def take(self, stream: OutputStream) -> None:
        """Adds the next prompt's stream."""
        times: dict[int, float] = {}
        stream.watch = lambda number, new: self._metrics.token_times(times, number, new)
        self.numbers[stream.request_id] = len(self.streams)
        self.streams.append(stream)

    def outputs(self) -> OutputStream | AsyncGenerator[RequestOutput]:
        """Outputs as they come; closing it aborts the rest."""
        return self.streams[0] if len(self.streams) == 1 else _merged(self.streams)

    async def aclose(self) -> None:
        """Aborts what has not finished."""
        for stream in self.streams:
            await stream.aclose()
        if self._release is None:
            return
        self._release()
        self._release = None
        requests = [stream.request for stream in self.streams]
        for request in requests:
            if request.finished:
                self._metrics.finished(request)
            self._ended(request)
        left = sum(not request.finished for request in requests)
        if left:
            self._metrics.ended("abort", left * self.choices)
        _log.info(
            "request %s: prompts=%d prompt_tokens=%d generated_tokens=%d ended_early=%d "
            "seconds=%.3f",
            self.name,
            len(requests),
            sum(len(request.prompt_ids) for request in requests),
            sum(one.known - one.prompt_len for request in requests for one in request.sequences),
            left,
            time.monotonic() - self._begin,
        )


class Answer(Protocol):
    """What an endpoint makes of a job's outputs."""

    async def whole(self, job: Job) -> dict[str, Any]:
        """The body, once all is generated."""

    def events(self, job: Job) -> AsyncGenerator[bytes]:
        """The same piece by piece."""


class Service:
    """One engine behind the endpoints.

    Args:
        engine: on a thread or as a process.
        config: the server's settings.
        name: of the model, where `config` names none.

    Attributes:
        names: what the model is called; the first stands in answers.
        created: Unix time of the start.
        images: gets the pictures of messages.
        traces: gets a span for each prompt; None where none is asked for.
        draining: whether the server is going down.
    """

    def __init__(self, engine: EngineClient, config: ServerConfig, name: str) -> None:
        self.engine, self.config = engine, config
        engine.watch(config.engine_timeout)
        self.names = config.served_model_name or (name,)
        self.created = int(time.time())
        self.metrics = Metrics(engine, self.names[0], expert_tokens=config.expert_token_metrics)
        endpoint = config.otlp_traces_endpoint
        self.traces = None if endpoint is None else Traces(endpoint, self.names[0])
        self.images = ImageLoader(config.allow_image_host)
        self.draining = False
        self.sequences = 0
        self._most = engine.places + config.max_waiting
        # One thread: a tokenizer's settings are not safe to share, and its work would otherwise
        # hold up every other stream.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moetor-tokenizer")

    @property
    def trouble(self) -> str | None:
        """Why no requests are taken; None where they are."""
        if self.draining:
            return "the server is stopping"
        return None if self.engine.trouble is None else f"the engine {self.engine.trouble}"

    def state(self) -> dict[str, Any]:
        """What the engine holds now."""
        stats = self.engine.stats()
        return {
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_cache_usage": stats.kv_cache_usage,
        }

    def check_model(self, name: str | None) -> None:
        """Refuses a model that is not served here.

        Raises:
            ApiError: status 404.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; there is {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )

    async def in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `work` on the tokenizer's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, *arguments)

    @property
    def grammars(self) -> GrammarCompiler:
        """For texts that must have a form; its work belongs on the tokenizer's thread."""
        return self.engine.intake.grammars

    async def check_form(self, form: Form | None) -> None:
        """Compiles the form of a text, where it has one.

        Raises:
            ApiError: status 400: it does not compile, or cannot be had here.
        """
        if form is not None:
            await self.in_thread(form.check, self.grammars)

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ApiError: the engine has no tokenizer, or it refuses the text.
        """
        tokenizer = self.tokenizer()

        def work() -> list[int]:
            return list(tokenizer(text, add_special_tokens=special)["input_ids"])

        try:
            return await self.in_thread(work)
        except (TypeError, UnicodeError) as error:
            raise refusal(f"the tokenizer refuses the prompt: {error}", "prompt") from error

    async def decode(self, ids: Sequence[int], param: str, *, skip_special: bool) -> str:
        """The text of token ids.

        Raises:
            ApiError: one is outside the vocabulary, or there is no tokenizer.
        """
        size = self.engine.intake.vocab_size
        wrong = next((token for token in ids if token >= size), None)
        if wrong is not None:
            raise refusal(f"token id {wrong} is outside the vocabulary of {size} tokens", param)
        decode = decode_function(self.tokenizer(), skip_special_tokens=skip_special)
        return await self.in_thread(decode, list(ids))

    def piece(self, token: int) -> str:
        """The text of one token, special or not."""
        return decode_function(self.tokenizer(), skip_special_tokens=False)([token])

    def tokenizer(self) -> Any:
        """The model's.

        Raises:
            ApiError: it has none.
        """
        if self.engine.tokenizer is None:
            raise refusal("this model was loaded without a tokenizer; send token ids")
        return self.engine.tokenizer

    def check_length(self, prompt: Sequence[int], max_tokens: int | None, param: str) -> None:
        """Refuses a prompt that leaves no room for its continuation.

        Raises:
            ApiError: status 400, with OpenAI's code for it.
        """
        wanted = 1 if max_tokens is None else max_tokens
        most = self.engine.max_model_len
        if len(prompt) + wanted > most:
            raise refusal(
                f"This model's maximum context length is {most} tokens. However, you requested "
                f"{len(prompt) + wanted} tokens ({len(prompt)} in the {param}, {wanted} in the "
                f"completion). Please reduce the length of the {param} or of the completion.",
                param,
                "context_length_exceeded",
            )

    async def submit(
        self,
        prompts: Sequence[Any],
        params: SamplingParams,
        name: str,
        headers: Mapping[str, str],
        *,
        stream: bool,
    ) -> Job:
        """Queues prompts; all of them, or none.

        Args:
            headers: of the request, for its trace.
            stream: whether the answer is sent event by event.

        Raises:
            ApiError: the queue is full, the engine is down, or it refuses a prompt.
        """
        wanted = len(prompts) * params.n
        if self.sequences + wanted > self._most:
            raise ApiError(
                429,
                f"{self.sequences} sequences are under way, this request has {wanted}, and this "
                f"server takes {self._most} at a time; try again later, or with fewer",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        trouble = self.trouble
        if trouble is not None:
            raise unavailable(f"no requests are taken: {trouble}")
        self.sequences += wanted
        job = Job(
            name,
            params.n,
            self.metrics,
            lambda: self._release(wanted),
            lambda request: self._trace(request, name, headers),
        )
        try:
            for index, prompt in enumerate(prompts):
                outputs = await self.engine.add_request(
                    prompt,
                    params,
                    f"{name}-{index}",
                    merge=True,
                    interval=self.config.stream_interval,
                    delta=stream,
                )
                job.take(outputs)
        except InputError as error:
            await job.aclose()
            raise refusal(str(error), "prompt") from error
        except EngineStoppedError as error:
            await job.aclose()
            raise unavailable(str(error)) from error
        except BaseException:
            await job.aclose()
            raise
        return job

    async def respond(
        self, request: Request, answer: Answer, job: Job, name: str, *, stream: bool
    ) -> Response:
        """The answer to a completion, streamed or whole, at whose end `job` ends."""
        headers = {"X-Request-Id": request.headers.get("x-request-id", name)}
        if stream:
            return EventStream(
                answer.events(job),
                close=job.aclose,
                write_timeout=self.config.write_timeout,
                headers=headers,
            )
        try:
            content = await while_connected(request, answer.whole(job))
        finally:
            await job.aclose()
        return JSONResponse(content, headers=headers)

    def _trace(self, request: EngineRequest, name: str, headers: Mapping[str, str]) -> None:
        if self.traces is not None:
            self.traces.ended(request, name, headers)

    def _release(self, sequences: int) -> None:
        self.sequences -= sequences


async def _merged(streams: Sequence[OutputStream]) -> AsyncGenerator[RequestOutput]:
    # Its bound makes a slow reader hold back the pumps, so that outputs merge in their streams.
    queue: asyncio.Queue[RequestOutput] = asyncio.Queue(maxsize=1)

    async def pump(stream: OutputStream) -> None:
        async for output in stream:
            await queue.put(output)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(pumps)
        while left:
            output = await queue.get()
            left -= output.finished
            yield output
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def unavailable(message: str) -> ApiError:
    """Status 503."""
    return ApiError(503, message, code="service_unavailable", headers={"Retry-After": "5"})


def request_name(prefix: str) -> str:
    """A new id."""
    return f"{prefix}-{uuid.uuid4().hex}"
