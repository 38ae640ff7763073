"""From the messages of a conversation to token ids, by the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from moetor.errors import ConfigError, InputError


def chat_tokens(tokenizer: Any, messages: Any, **template: Any) -> list[int]:
    """A conversation as token ids that end where the answer begins.

    Raises:
        ConfigError: the tokenizer has no chat template.
        InputError: the template refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer is None or tokenizer.chat_template is None:
        raise ConfigError("the tokenizer has no chat template; use generate() with a text")
    options = {"add_generation_prompt": True, **template, "tokenize": True, "return_dict": True}
    try:
        return list(tokenizer.apply_chat_template(list(messages), **options)["input_ids"])
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"the chat template refuses the messages: {error}") from error
