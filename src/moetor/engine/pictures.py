"""From a conversation with pictures to a prompt, by the model's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moetor.errors import ConfigError, InputError


class PictureReader:
    """Makes prompts of conversations in which parts of messages are pictures.

    Args:
        processor: of Transformers, with an image processor and a tokenizer.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any], **template: Any
    ) -> dict[str, Any]:
        """The prompt, as `Prompt` has it, that ends where the answer begins.

        Args:
            messages: whose content is text or a list of parts, each of type `text` or `image`.
            images: of Pillow, in the order of their parts.
            template: further arguments of `apply_chat_template`.

        Raises:
            ConfigError: there is no chat template.
            InputError: the template or the processor refuses the messages or a picture.
        """
        from jinja2 import TemplateError

        processor = self._processor
        own = processor.tokenizer.chat_template or getattr(processor, "chat_template", None)
        if own is None:
            raise ConfigError("the processor has no chat template; give pixels with a prompt")
        options = {"add_generation_prompt": True, "chat_template": own, **template}
        try:
            text = processor.tokenizer.apply_chat_template(
                list(messages), **{**options, "tokenize": False}
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise InputError(f"the chat template refuses the messages: {error}") from error
        try:
            made = dict(processor(text=[text], images=list(images), return_tensors="pt"))
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise InputError(f"the model's processor refuses the pictures: {error}") from error
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        return {"prompt_token_ids": ids, "inputs": made}


def has_pictures(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message has a part that is a picture."""
    return any(
        isinstance(part, Mapping) and part.get("type") == "image"
        for message in messages
        if isinstance(message.get("content"), list | tuple)
        for part in message["content"]
    )


def taken_out(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with bare picture parts, and the pictures, which stood there under `image`.

    Raises:
        InputError: one is not of Pillow.
    """
    images: list[Any] = []
    bare = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = []
            for part in content:
                if part.get("type") == "image":
                    if not hasattr(part.get("image"), "convert"):
                        raise InputError("a part of type 'image' has a Pillow image as its 'image'")
                    images.append(part["image"].convert("RGB"))
                    part = {"type": "image"}
                parts.append(part)
            content = parts
        bare.append({**message, "content": content})
    return bare, images
