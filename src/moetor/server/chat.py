"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from moetor.engine import CompletionOutput, RequestOutput
from moetor.server.answers import Answer, routed_experts
from moetor.server.conversation import chat_template, conversation_prompt, prompt_ids
from moetor.server.errors import refusal
from moetor.server.forms import chat_form
from moetor.server.logprobs import chat_logprobs
from moetor.server.protocol import ChatBody
from moetor.server.responses import ChatCompletion, answers
from moetor.server.sampling import sampling_params
from moetor.server.service import Service, request_name
from moetor.server.streams import quoted
from moetor.server.tools import Offer, ToolParser, offered_tools

MAX_TOP_LOGPROBS = 20
router = APIRouter()


@router.post(
    "/v1/chat/completions", response_model=None, responses=answers(ChatCompletion, streamed=True)
)
async def chat(body: ChatBody, request: Request) -> Response:
    """Answers a conversation."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    _check(body)
    limit = body.max_completion_tokens
    if limit is None:
        limit = body.max_tokens
    offer = offered_tools(body, chat_template(service.engine.tokenizer))
    form = await service.in_thread(chat_form, body, offer, service.grammars)
    await service.check_form(form)
    params = sampling_params(
        body,
        max_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        form=form,
    )
    prompt = await conversation_prompt(
        service,
        body.messages,
        tools=None if offer is None else offer.tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        extra=_template_kwargs(body, service),
    )
    service.check_length(prompt_ids(prompt), limit, "messages")
    name = request_name("chatcmpl")
    stream = bool(body.stream)
    job = await service.submit([prompt], params, name, request.headers, stream=stream)
    answer = _Answer(service, body, name, offer)
    return await service.respond(request, answer, job, name, stream=stream)


def _template_kwargs(body: ChatBody, service: Service) -> dict[str, Any]:
    """Further variables of the chat template, of which an effort of reasoning is one."""
    given = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is None:
        return given
    if "reasoning_effort" not in chat_template(service.engine.tokenizer):
        raise refusal(
            "reasoning_effort: the chat template of this model knows none; leave it out",
            "reasoning_effort",
        )
    if given.setdefault("reasoning_effort", effort) != effort:
        raise refusal(
            "reasoning_effort and chat_template_kwargs name different efforts", "reasoning_effort"
        )
    return given


def _check(body: ChatBody) -> None:
    both = body.max_tokens is not None and body.max_completion_tokens is not None
    if both and body.max_tokens != body.max_completion_tokens:
        raise refusal(
            "max_tokens and max_completion_tokens differ; send the second alone", "max_tokens"
        )
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise refusal("top_logprobs needs logprobs to be true", "top_logprobs")
        if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
            raise refusal(
                f"top_logprobs {body.top_logprobs} must be between 0 and {MAX_TOP_LOGPROBS}",
                "top_logprobs",
            )
    if body.stream_options is not None and not body.stream:
        raise refusal("stream_options needs stream to be true", "stream_options")
    if body.add_special_tokens:
        raise refusal(
            "add_special_tokens: a chat template brings the special tokens itself; leave it out",
            "add_special_tokens",
        )


class _Answer(Answer):
    """Makes the answer's parts.

    Args:
        offer: of tools, of which calls are looked for; None where there are none.
    """

    def __init__(self, service: Service, body: ChatBody, name: str, offer: Offer | None) -> None:
        frame = {"id": name, "created": int(time.time()), "model": service.names[0]}
        super().__init__(frame, ("chat.completion", "chat.completion.chunk"), body.stream_options)
        self._body, self._offer = body, offer
        self._piece = service.tokenizer().convert_ids_to_tokens
        self._parsers: dict[int, ToolParser] = {}

    def _choices(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        choices = []
        for one in outputs[0].outputs:
            said, calls = self._parse(one, one.text)
            message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
            if calls:
                message["content"] = said or None
                message["tool_calls"] = [
                    {name: call[name] for name in call if name != "index"} for call in calls
                ]
            choices.append(
                {
                    "index": one.index,
                    "message": message,
                    "logprobs": self._logprobs(one, one.token_ids),
                    "finish_reason": self._reason(one),
                    "stop_reason": one.stop_reason,
                    **routed_experts(one),
                }
            )
        return choices

    def _event(
        self, number: int, output: RequestOutput, one: CompletionOutput, first: bool
    ) -> bytes:
        plain = not (first or one.finished or self._offer) and one.logprobs is None
        if plain and one.new_text:  # most events; the same in less time
            return self._chunks.choice(
                f'{{"index":{one.index},"delta":{{"content":{quoted(one.new_text)}}},'
                '"logprobs":null,"finish_reason":null}'
            )
        logprobs = self._logprobs(one, one.new_token_ids)
        said, calls = self._parse(one, one.new_text)
        if not (first or said or calls or logprobs or one.finished):
            return b""
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if first or said:
            delta["content"] = said
        if calls:
            delta["tool_calls"] = calls
        choice = {
            "index": one.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": self._reason(one),
        }
        if one.finished:
            choice |= {"stop_reason": one.stop_reason, **routed_experts(one)}
        return self._chunks.choice(choice)

    def _parse(self, one: CompletionOutput, text: str) -> tuple[str, list[dict[str, Any]]]:
        if self._offer is None:
            return text, []
        parser = self._parsers.setdefault(one.index, ToolParser(single=self._offer.single))
        return parser.feed(text, final=one.finished)

    def _reason(self, one: CompletionOutput) -> str | None:
        parser = self._parsers.get(one.index)
        called = parser is not None and parser.count > 0
        return "tool_calls" if called and one.finish_reason == "stop" else one.finish_reason

    def _logprobs(self, one: CompletionOutput, tokens: Sequence[int]) -> dict[str, Any] | None:
        if one.logprobs is None or not tokens:
            return None
        entries = one.logprobs[len(one.token_ids) - len(tokens) :]
        return chat_logprobs(tokens, entries, self._body.top_logprobs or 0, self._piece)
