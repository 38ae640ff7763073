"""`/v1/completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from moetor.engine import CompletionOutput, RequestOutput
from moetor.server.answers import Answer, routed_experts, usage
from moetor.server.errors import refusal
from moetor.server.forms import text_form
from moetor.server.logprobs import TextLogprobs
from moetor.server.protocol import CompletionBody
from moetor.server.responses import Completion, answers
from moetor.server.sampling import sampling_params
from moetor.server.service import Job, Service, request_name
from moetor.server.streams import quoted

DEFAULT_MAX_TOKENS = 16
router = APIRouter()


@router.post("/v1/completions", response_model=None, responses=answers(Completion, streamed=True))
async def complete(body: CompletionBody, request: Request) -> Response:
    """Continues prompts."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    _check(body)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    alone = max_tokens == 0
    if alone and not body.echo:
        raise refusal("max_tokens 0 asks for nothing; take at least 1, or echo", "max_tokens")
    form = text_form(body)
    if alone and form is not None:
        raise refusal(f"{form.field} needs max_tokens above 0", form.field)
    params = sampling_params(
        body,
        # The engine always generates; what it adds to an echo without continuation is left out.
        max_tokens=1 if alone else max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        form=form,
    )
    await service.check_form(form)
    prompts = await _prompts(service, body)
    for ids, _ in prompts:
        service.check_length(ids, max_tokens, "prompt")
    name = request_name("cmpl")
    token_ids, stream = [ids for ids, _ in prompts], bool(body.stream)
    job = await service.submit(token_ids, params, name, request.headers, stream=stream)
    answer = _Answer(service, body, name, [text for _, text in prompts], alone)
    return await service.respond(request, answer, job, name, stream=stream)


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise refusal("suffix is not supported: models here only continue a text", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refusal(
            f"best_of {body.best_of} must be n ({body.n or 1}): texts are not ranked here",
            "best_of",
        )
    if body.stream_options is not None and not body.stream:
        raise refusal("stream_options needs stream to be true", "stream_options")


async def _prompts(service: Service, body: CompletionBody) -> list[tuple[list[int], str]]:
    """Token ids, and the text where it is echoed."""
    given: Any = body.prompt
    many: Sequence[Any] = given if not isinstance(given, str) else [given]
    if not isinstance(given, str) and isinstance(given[0], int):
        many = [given]
    special = body.add_special_tokens is not False
    made = []
    for index, prompt in enumerate(many):
        if isinstance(prompt, str):
            ids = await service.encode(prompt, special=special)
        else:
            ids = list(prompt)
        if not ids:
            raise refusal(f"prompt {index} has no tokens; give at least one", "prompt")
        text = prompt if isinstance(prompt, str) else ""
        if body.echo and not isinstance(prompt, str):
            text = await service.decode(
                ids, "prompt", skip_special=body.skip_special_tokens is not False
            )
        made.append((ids, text))
    return made


class _Answer(Answer):
    """Makes the answer's parts.

    Args:
        texts: of the prompts.
        alone: whether the prompt is echoed without a continuation.
    """

    def __init__(
        self, service: Service, body: CompletionBody, name: str, texts: list[str], alone: bool
    ) -> None:
        frame = {"id": name, "created": int(time.time()), "model": service.names[0]}
        super().__init__(frame, ("text_completion", "text_completion"), body.stream_options)
        self._service, self._body, self._texts, self._alone = service, body, texts, alone
        self._logprobs: dict[int, TextLogprobs] = {}

    def _choices(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        choices = []
        for number, output in enumerate(outputs):
            for one in output.outputs:
                index = self._index(number, one)
                text, logprobs = self._piece(index, number, output, one, first=True, whole=True)
                choices.append(_choice(index, text, logprobs, one))
        return choices

    def _event(
        self, number: int, output: RequestOutput, one: CompletionOutput, first: bool
    ) -> bytes:
        index = self._index(number, one)
        if not (first or one.finished or self._alone) and self._body.logprobs is None:
            if not one.new_text:
                return b""
            return self._chunks.choice(  # most events; the same in less time
                f'{{"index":{index},"text":{quoted(one.new_text)},"logprobs":null,'
                '"finish_reason":null,"stop_reason":null}'
            )
        text, logprobs = self._piece(index, number, output, one, first=first, whole=False)
        if not text and logprobs is None and not one.finished:
            return b""
        return self._chunks.choice(_choice(index, text, logprobs, one))

    def _index(self, number: int, one: CompletionOutput) -> int:
        return number * (self._body.n or 1) + one.index

    def _piece(
        self,
        index: int,
        number: int,
        output: RequestOutput,
        one: CompletionOutput,
        *,
        first: bool,
        whole: bool,
    ) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities: all of them, or what is new."""
        text = one.text if whole else one.new_text
        tokens = one.token_ids if whole else one.new_token_ids
        if self._alone:
            text, tokens = "", []
        entries: list[Any] = []
        if one.logprobs is not None:
            entries = list(one.logprobs[len(one.token_ids) - len(tokens) :]) if tokens else []
        texts: list[str] = [""] * len(entries)
        if first and self._body.echo:
            text = self._texts[number] + text
            prompt = output.prompt_token_ids
            tokens = [*prompt, *tokens]
            if output.prompt_logprobs is not None:
                entries = [*output.prompt_logprobs, *entries]
                texts = [self._service.piece(prompt[0]), *[""] * (len(tokens) - 1)]
        if self._body.logprobs is None or not tokens:
            return text, None
        maker = self._logprobs.setdefault(index, TextLogprobs(self._body.logprobs))
        return text, maker.take(tokens, entries, texts)

    def _usage(self, job: Job) -> dict[str, Any]:
        return usage(job, generated=not self._alone)


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, one: CompletionOutput
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": one.finish_reason,
        "stop_reason": one.stop_reason,
        **routed_experts(one),
    }
