"""What the answers look like, for the OpenAPI document; answers are not checked against it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """What all have in common: no field is left out of the document."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """Of an error: a sentence, its kind, the field to blame, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """Every error of the server."""

    error: ErrorDetail


class CachedTokens(Answer):
    """Tokens of prompts that were taken from the prefix cache."""

    cached_tokens: int


class Usage(Answer):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Likely(Answer):
    """A token, its natural log-probability, and its bytes where it is whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class LikelyToken(Likely):
    """The token that was taken, and the likeliest ones at its place."""

    top_logprobs: list[Likely]


class ChatLogprobs(Answer):
    """Of the tokens of a message."""

    content: list[LikelyToken]
    refusal: None


class FunctionCall(Answer):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Answer):
    """What the model says, or calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(Answer):
    """One of the n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None
    routed_experts: str = ""


class ChatCompletion(Answer):
    """The answer of `/v1/chat/completions` that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Answer):
    """Of the tokens of a text; null for its very first one."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(Answer):
    """One of the continuations; those of a prompt follow one another."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    routed_experts: str = ""


class Completion(Answer):
    """The answer of `/v1/completions` that is not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(Answer):
    """The model under one of its names; `created` is the server's start."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Answer):
    """All names."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Answer):
    """Token ids; their texts where `return_token_strs` asks for them."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] = []


class Prompt(Answer):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(Answer):
    """What kind of tokenizer the model has."""

    tokenizer_class: str
    vocab_size: int
    model_vocab_size: int
    max_model_len: int
    special_tokens: dict[str, str]
    eos_token_ids: list[int]
    chat_template: str | None


class Health(Answer):
    """What the engine holds: sequences, and a share of the cache from 0 to 1."""

    status: Literal["ok"]
    running: int
    waiting: int
    kv_cache_usage: float


class Version(Answer):
    """Of the package."""

    version: str


class LayerLoad(Answer):
    """Tokens of each expert of a layer since the start; balancedness is mean over maximum."""

    layer: str
    tokens: list[int]
    balancedness: float | None


class Refusal(Answer):
    """Why a kernel does not run a layer."""

    kernel: str
    reason: str


class FusedBlock(Answer):
    """What was fused, or why not."""

    layer: str
    family_block: str
    level: str
    kernel: str | None
    router: str | None
    reason: str | None
    quantization: str | None
    num_experts: int | None
    refusals: list[Refusal]


class EngineState(Answer):
    """Counters since the start, and the state now."""

    running: int
    waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generated_tokens: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    requests_finished: int
    max_num_seqs: int


class ExpertsStats(Answer):
    """How the experts are loaded, what was fused, and what the engine does."""

    model: str
    time: float
    healthy: bool
    recorded: bool
    layers: list[LayerLoad]
    fusion: list[FusedBlock]
    engine: EngineState


def answers(model: type[Answer], *, streamed: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint.

    Args:
        model: of the answer that goes well.
        streamed: whether it may come as server-sent events.
    """
    well: dict[str, Any] = {"model": model, "description": "The answer"}
    if streamed:
        well["content"] = {"text/event-stream": {"schema": EVENT}}
    return {200: well, **ERRORS}


# Under `stream`.
EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "A chunk as OpenAI has it, at last `[DONE]`"}
    },
    "required": ["data"],
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused"},
    "5XX": {"model": ErrorBody, "description": "The server failed, or takes no requests now"},
}
