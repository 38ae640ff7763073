"""The bodies of requests. A field that is not here is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
MAX_CHOICES = 128
MAX_PROMPTS = 2048


class Body(BaseModel):
    """What all have in common: exact types, finite numbers, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _within(**limits: Any) -> Any:
    """A field whose limits the document tells; the engine checks them and says why."""
    return Field(default=None, json_schema_extra=limits)


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """Of `response_format`; the text always satisfies the schema, `strict` or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Structure(Body):
    """A tag in a text that is free: a document of a schema between two texts."""

    begin: str
    schema_: dict[str, Any] = Field(alias="schema")
    end: str


class ResponseFormat(Body):
    """The form of the text; `text` leaves it free. With `structural_tag` what follows a trigger is
    one of the structures.
    """

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[Structure] | None = None
    triggers: list[str] | None = None

    @property
    def tags(self) -> dict[str, Any] | None:
        """The structural tag; None where there is none."""
        if self.structures is None and self.triggers is None:
            return None
        given = self.model_dump(include={"structures", "triggers"}, by_alias=True)
        return {name: value for name, value in given.items() if value is not None}


class StructuredOutputs(Body):
    """The form of the text, as vLLM asks for it: one of the first six."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
    disable_additional_properties: bool | None = None


class Sampling(Body):
    """The fields that both completion endpoints share; those of vLLM beside OpenAI's."""

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = _within(minimum=0)
    min_tokens: int | None = _within(minimum=0)
    temperature: float | None = _within(minimum=0)
    top_p: float | None = _within(exclusiveMinimum=0, maximum=1)
    top_k: int | None = _within(minimum=-1)
    min_p: float | None = _within(minimum=0, maximum=1)
    presence_penalty: float | None = _within(minimum=-2, maximum=2)
    frequency_penalty: float | None = _within(minimum=-2, maximum=2)
    repetition_penalty: float | None = _within(minimum=1e-6, maximum=1e6)
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = Field(default=None, description="Identifies the end user to the caller.")


class CompletionBody(Sampling):
    """Of `/v1/completions`."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    best_of: int | None = _within(minimum=1, description="Must equal n.")
    echo: bool | None = None
    logprobs: int | None = _within(minimum=0, maximum=100)
    suffix: str | None = _within(maxLength=0, description="Not supported.")


class Message(Body):
    """One of a conversation; the fields that answers have may be sent back."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None


class ChatBody(Sampling):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = _within(minimum=1)
    logprobs: bool | None = None
    top_logprobs: int | None = _within(minimum=0, maximum=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # What OpenAI offers besides, as far as a server of one model has it.
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TokenizeBody(Body):
    """Of `/tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Of `/detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
