"""From the messages of a conversation to token ids, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from moetor.engine.chat_template import chat_tokens
from moetor.engine.intake import Prompt
from moetor.errors import ConfigError, InputError
from moetor.server.errors import refusal
from moetor.server.protocol import Message
from moetor.server.service import Service
from moetor.server.tools import with_parsed_arguments


async def conversation_prompt(
    service: Service,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Prompt:
    """A prompt that ends where the answer begins: token ids, with pixels where there are pictures.

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
    for index, message in enumerate(messages):
        _check(message, index, chat_template(tokenizer))
    urls: list[str] = []
    plain = [_plain(message, index, urls) for index, message in enumerate(messages)]
    if "developer" not in chat_template(tokenizer):
        # OpenAI's later name, which most templates would leave out without a word.
        for made in plain:
            made["role"] = "system" if made["role"] == "developer" else made["role"]
    given: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        **(extra or {}),
    }
    if tools is not None:
        given["tools"] = tools

    try:
        pictures = service.engine.intake.pictures if urls else None
    except InputError as error:
        raise refusal(str(error), "messages") from error
    images = await service.images.load(urls)

    def work() -> Prompt:
        if pictures is None:
            return chat_tokens(tokenizer, plain, **given)
        return pictures.prompt(plain, images, **given)

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


def chat_template(tokenizer: Any) -> str:
    """The text of the chat template; empty where there is none."""
    found = getattr(tokenizer, "chat_template", None)
    return found if isinstance(found, str) else ""


def prompt_ids(prompt: Prompt) -> list[int]:
    """The token ids of what `conversation_prompt` makes."""
    ids: Any = prompt["prompt_token_ids"] if isinstance(prompt, Mapping) else prompt
    return list(ids)


def _check(message: Message, index: int, template: str) -> None:
    """Refuses a message of which a part would be lost."""
    called = message.role == "assistant" and message.tool_calls
    if message.content is None and not called:
        raise refusal(
            f"messages.{index}: content is missing; an assistant's message with tool_calls alone "
            "may leave it out",
            "messages",
        )
    if message.tool_calls and "tool_calls" not in template:
        raise refusal(
            f"messages.{index}: the chat template of this model knows no tool_calls; start the "
            "server with --chat-template FILE, or write the call into the content",
            "messages",
        )


def _plain(message: Message, index: int, urls: list[str]) -> dict[str, Any]:
    """A message as templates know it; the URLs of its pictures are added to `urls`."""
    made = message.model_dump(exclude_none=True)
    made["content"] = _content(message.content, index, urls)
    if message.tool_calls is not None:
        made["tool_calls"] = with_parsed_arguments(message.tool_calls)
    return made


def _content(
    content: str | list[dict[str, Any]] | None, index: int, urls: list[str]
) -> str | list[dict[str, Any]]:
    """The text of a message, whose parts stand on lines of their own; with pictures, the parts."""
    if content is None or isinstance(content, str):
        return content or ""
    before = len(urls)
    parts = [_part(part, index, urls) for part in content]
    if len(urls) > before:
        return parts
    return "\n".join(part["text"] for part in parts)


def _part(part: dict[str, Any], index: int, urls: list[str]) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "image_url":
        urls.append(_url(part, index))
        return {"type": "image"}
    if kind != "text":
        raise refusal(
            f"messages.{index}: a content part of type {str(kind)[:40]!r} is not supported; text "
            "and image_url are",
            "messages",
        )
    if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
        raise refusal(
            f"messages.{index}: a text part has the fields type and text, and no others", "messages"
        )
    return part


def _url(part: dict[str, Any], index: int) -> str:
    told = part.get("image_url")
    if not isinstance(told, dict) or not isinstance(told.get("url"), str):
        raise refusal(f"messages.{index}: image_url must be an object with a url", "messages")
    if set(part) != {"type", "image_url"} or not set(told) <= {"url", "detail"}:
        raise refusal(
            f"messages.{index}: an image part has the fields type and image_url, with url and "
            "detail, and no others",
            "messages",
        )
    if told.get("detail") not in (None, "auto"):
        raise refusal(
            f"messages.{index}: detail cannot be chosen here, the model's processor does; leave it "
            "out or take 'auto'",
            "messages",
        )
    url: str = told["url"]
    return url
