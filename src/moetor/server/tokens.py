"""`/tokenize`, `/detokenize` and `/tokenizer_info`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from moetor.server.conversation import conversation_prompt, prompt_ids
from moetor.server.errors import refusal
from moetor.server.protocol import DetokenizeBody, TokenizeBody
from moetor.server.responses import Prompt, TokenizerInfo, Tokens, answers
from moetor.server.service import Service

router = APIRouter()


@router.post("/tokenize", response_model=None, responses=answers(Tokens))
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """Token ids of a text or of a conversation."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise refusal("send either prompt or messages", "prompt")
    if body.prompt is not None:
        if body.add_generation_prompt is not None:
            raise refusal("add_generation_prompt goes with messages", "add_generation_prompt")
        ids = await service.encode(body.prompt, special=body.add_special_tokens is not False)
    else:
        if body.add_special_tokens is not None:
            raise refusal("add_special_tokens goes with prompt", "add_special_tokens")
        ids = prompt_ids(
            await conversation_prompt(
                service,
                body.messages or [],
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        )
    made: dict[str, Any] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": service.engine.max_model_len,
    }
    if body.return_token_strs:
        made["token_strs"] = service.tokenizer().convert_ids_to_tokens(ids)
    return made


@router.post("/detokenize", response_model=None, responses=answers(Prompt))
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
    """The text of token ids, special ones included."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    return {"prompt": await service.decode(body.tokens, "tokens", skip_special=False)}


@router.get("/tokenizer_info", response_model=None, responses=answers(TokenizerInfo))
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What kind of tokenizer the model has."""
    service: Service = request.app.state.service
    tokenizer = service.tokenizer()
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "model_vocab_size": service.engine.intake.vocab_size,
        "max_model_len": service.engine.max_model_len,
        "special_tokens": special,
        "eos_token_ids": sorted(service.engine.intake.ends),
        "chat_template": tokenizer.chat_template,
    }
