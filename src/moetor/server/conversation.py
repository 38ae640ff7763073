"""From the messages of a conversation to token ids, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from moetor.engine.chat_template import chat_tokens
from moetor.errors import ConfigError, InputError
from moetor.server.errors import refusal
from moetor.server.protocol import Message
from moetor.server.service import Service
from moetor.server.tools import with_parsed_arguments


async def conversation_tokens(
    service: Service,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids that end where the answer begins.

    Args:
        tools: for the template.
        extra: further variables of the template.

    Raises:
        ApiError: status 400: no template, or it refuses the messages; the text has its own words.
    """
    tokenizer = service.tokenizer()
    # Its other arguments are the tokenizer's (padding, lengths, tensors), not the template's.
    own = set(signature(tokenizer.apply_chat_template).parameters) | {"messages"}
    own.intersection_update(extra or ())
    if own:
        raise refusal(
            f"chat_template_kwargs: {', '.join(sorted(own))} cannot be chosen by a request",
            "chat_template_kwargs",
        )
    if continue_final_message and add_generation_prompt:
        raise refusal(
            "continue_final_message needs add_generation_prompt to be false",
            "continue_final_message",
        )
    plain = [_plain(message, index) for index, message in enumerate(messages)]
    given: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        **(extra or {}),
    }
    if tools is not None:
        given["tools"] = tools

    def work() -> list[int]:
        return chat_tokens(tokenizer, plain, **given)

    try:
        return await service.in_thread(work)
    except ConfigError as error:
        raise refusal(
            "this model has no chat template; use /v1/completions, or start the server with "
            "--chat-template FILE",
            "messages",
        ) from error
    except InputError as error:
        raise refusal(str(error), "messages") from error


def _plain(message: Message, index: int) -> dict[str, Any]:
    made = message.model_dump(exclude_none=True)
    made["content"] = _text(message.content, index)
    if message.tool_calls is not None:
        made["tool_calls"] = with_parsed_arguments(message.tool_calls)
    return made


def _text(content: str | list[dict[str, Any]] | None, index: int) -> str:
    """The text of a message; parts stand on lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type")
        if kind != "text":
            raise refusal(
                f"messages.{index}: a content part of type {str(kind)[:40]!r} is not supported; "
                "this server takes text alone",
                "messages",
            )
        text = part.get("text")
        if not isinstance(text, str) or set(part) != {"type", "text"}:
            raise refusal(
                f"messages.{index}: a text part has the fields type and text, and no others",
                "messages",
            )
        texts.append(text)
    return "\n".join(texts)
