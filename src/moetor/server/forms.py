"""The form that a request asks its text to have: `response_format`, `structured_outputs`, tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moetor.engine import StructuredOutputsParams
from moetor.engine.grammar import GrammarCompiler
from moetor.engine.structured import WHITE_SPACE, lark_json
from moetor.errors import ConfigError, InputError
from moetor.server.errors import refusal
from moetor.server.protocol import ChatBody, Sampling
from moetor.server.tools import BEGIN, END, Offer

FORMAT, OUTPUTS = "response_format", "structured_outputs"


@dataclass(frozen=True, slots=True)
class Form:
    """What the engine is asked for, and the field of the request that asks for it."""

    asked: StructuredOutputsParams
    field: str

    def check(self, grammars: GrammarCompiler) -> None:
        """Compiles it, which may take a while.

        Raises:
            ApiError: status 400, naming the field: it does not compile, or cannot be had here.
        """
        try:
            grammars.compile(self.asked)
        except (InputError, ConfigError) as error:
            raise refusal(f"{self.field}: {error}", self.field) from error


def text_form(body: Sampling) -> Form | None:
    """The form of a text that calls no tool; None where it is free.

    Raises:
        ApiError: status 400, naming the field.
    """
    asked, kind = body.response_format, "text"
    if asked is not None:
        kind = asked.type
        if (kind == "json_schema") != (asked.json_schema is not None):
            raise refusal(
                "response_format: json_schema goes with type 'json_schema', which needs it", FORMAT
            )
    if asked is not None and (kind == "structural_tag") != (asked.tags is not None):
        raise refusal(
            "response_format: structures and triggers go with type 'structural_tag', which needs "
            "both",
            FORMAT,
        )
    if kind == "text":
        if body.structured_outputs is None:
            return None
        given = body.structured_outputs.model_dump(exclude_none=True, by_alias=True)
        try:
            return Form(StructuredOutputsParams(**given), OUTPUTS)
        except InputError as error:
            raise refusal(str(error), OUTPUTS) from error
    if body.structured_outputs is not None:
        raise refusal("response_format and structured_outputs both ask for a form", OUTPUTS)
    assert asked is not None
    wanted: dict[str, Any] = {"json_object": True}
    if asked.json_schema is not None:
        wanted = {"json": asked.json_schema.schema_ or {}}
    if asked.tags is not None:
        wanted = {"structural_tag": asked.tags}
    try:
        return Form(StructuredOutputsParams(**wanted), FORMAT)
    except InputError as error:
        raise refusal(f"response_format: {error}", FORMAT) from error


def chat_form(body: ChatBody, offer: Offer | None, grammars: GrammarCompiler) -> Form | None:
    """The form of an answer that may call tools; None where it is free.

    Calls are constrained where one must be made, or where a tool is `strict`; the text beside them
    where `response_format` says so.

    Raises:
        ApiError: status 400, naming the field.
    """
    text = text_form(body)
    if offer is None:
        return text
    if text is None and not offer.constrained:
        return None
    if text is not None and text.asked.json is None and not text.asked.json_object:
        raise refusal(
            "structured_outputs with tools can be json or json_object alone; leave one out", OUTPUTS
        )
    if text is not None and offer.forced:
        raise refusal(
            f"{text.field} asks for a form of the text, and tool_choice for a call in its place; "
            "leave one out",
            "tool_choice",
        )
    blamed = "tools" if text is None else text.field
    try:
        marks = grammars.mark(BEGIN), grammars.mark(END)
    except ConfigError as error:
        raise refusal(f"{blamed}: {error}", blamed) from error
    grammar = _grammar(offer, None if text is None else text.asked, *marks)
    return Form(StructuredOutputsParams(grammar=grammar), blamed)


def _grammar(offer: Offer, text: StructuredOutputsParams | None, begin: str, end: str) -> str:
    """Calls in Lark's syntax: alone, or instead of a JSON document, or anywhere in a free text.

    Args:
        begin, end: the marks around a call, as Lark has them.
    """
    rules = ["%llguidance {}"]
    more = "?" if offer.single else "*"
    if offer.forced or text is not None:
        calls = "call" if offer.single else 'call ("\\n" call)*'
        rules.append(
            f"start: {calls}"
            if text is None
            else f"start: {calls} | {text.document(text.schema())}"
        )
        rules.append(f"call: {begin} call_body")
    elif begin.startswith("<"):
        rules += [f"start: (TEXT {begin} call_body){more} TEXT", "TEXT: /(.|\\n)*/"]
    else:
        rules += [f"start: (said call_body){more} TEXT", "TEXT: /(.|\\n)*/"]
        rules.append(f"said[lazy]: TEXT {begin}")
    names = [f"call_{number}" for number in range(len(offer.callable))]
    rules.append(f"call_body: ({' | '.join(names)}) {end}")
    for name, tool in zip(names, offer.callable, strict=True):
        function = tool["function"]
        head = json.dumps('\n{"name": ' + json.dumps(function["name"]) + ', "arguments": ')
        held = offer.forced or function.get("strict")
        schema = {"type": "object", **(_arguments(function) if held else {})}
        arguments = lark_json(schema, {"whitespace_pattern": " ?" if offer.forced else WHITE_SPACE})
        rules.append(f'{name}: {head} {arguments} "}}\\n"')
    return "\n".join(rules)


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; OpenAI's rule is that one without has none."""
    nothing: dict[str, Any] = {"properties": {}, "additionalProperties": False}
    return dict(function.get("parameters") or nothing)
