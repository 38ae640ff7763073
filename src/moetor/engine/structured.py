"""What a request may ask of the form of its text."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetor.engine.structural_tag import Tag, read_tags
from moetor.errors import InputError

# Without a bound a model may write blanks until its text is full.
WHITE_SPACE = r"[ \t]?|\r?\n[ \t]{0,20}"
FORMS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_WITH_JSON = ("json", "json_object", "structural_tag")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """The form that a text must have: one of `json`, `json_object`, `regex`, `choice`, `grammar`,
    `structural_tag`. The names are those of vLLM.

    Every token is chosen among those with which the text can still come to have that form, and an
    end token only where it has it. A text that `max_tokens` or a stop string ends is cut short.

    Attributes:
        json: a JSON schema, as a mapping or as text; the text is a document that satisfies it, with
            its properties in the schema's order.
        json_object: the text is a JSON object.
        regex: the text matches it as a whole.
        choice: the text is one of these.
        grammar: the text follows it; Lark's syntax with a rule `start`, or GBNF with a rule `root`.
        structural_tag: the text is free, but what follows one of `triggers` is one of `structures`:
            its `begin`, a JSON document of its `schema`, and its `end`. A mapping with these, or
            its JSON.
        disable_any_whitespace: no white space between JSON's tokens.
        whitespace_pattern: a regular expression for the white space between JSON's tokens; without
            it that is at most one blank, or a line break and an indentation of 20 blanks.
        disable_additional_properties: an object of a schema has only the properties that the
            schema lists, unless the schema itself speaks of further ones.

    Raises:
        InputError: not exactly one form is asked for, or a value is of the wrong kind.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        asked = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if len(asked) != 1:
            raise InputError(
                f"structured_outputs has {' and '.join(asked) or 'no form'}; give exactly one of "
                f"{', '.join(FORMS)}"
            )
        (form,) = asked
        value = getattr(self, form)
        if form in ("regex", "grammar") and not isinstance(value, str):
            raise InputError(f"structured_outputs: {form} must be text, not {_kind(value)}")
        if form == "choice":
            self._check_choice()
        if form == "json":
            self.schema()
        if form == "structural_tag":
            self.tags()
        for name in ("disable_any_whitespace", "whitespace_pattern"):
            if getattr(self, name) and form not in _WITH_JSON:
                raise InputError(
                    f"structured_outputs: {name} goes with {', '.join(_WITH_JSON)} alone"
                )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise InputError(
                "structured_outputs: whitespace_pattern says which white space there is, and "
                "disable_any_whitespace that there is none; give one"
            )
        if self.disable_additional_properties and form not in ("json", "structural_tag"):
            raise InputError(
                "structured_outputs: disable_additional_properties goes with schemas, of json or "
                "structural_tag, alone"
            )

    def _check_choice(self) -> None:
        value: Any = self.choice
        texts = [] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError(
                "structured_outputs: choice must be a list of texts, each of at least one character"
            )
        object.__setattr__(self, "choice", tuple(texts))

    def schema(self) -> dict[str, Any]:
        """The schema of `json` or `json_object`, as JSON has it.

        Raises:
            InputError: it is not a JSON object.
        """
        if self.json is None:
            return {"type": "object"}
        try:
            text = self.json if isinstance(self.json, str) else jsonlib.dumps(dict(self.json))
            schema = jsonlib.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"structured_outputs: json is not a JSON schema: {error}") from error
        if not isinstance(schema, dict):
            raise InputError(
                f"structured_outputs: json must be a JSON schema that is an object, not "
                f"{_kind(schema)}"
            )
        if self.disable_additional_properties:
            _close_objects(schema)
        return schema

    def tags(self) -> list[Tag]:
        """The tags of `structural_tag`.

        Raises:
            InputError: it is malformed.
        """
        tags = read_tags(self.structural_tag or {})
        if self.disable_additional_properties:
            for tag in tags:
                _close_objects(tag.schema)
        return tags

    def document(self, schema: Mapping[str, Any]) -> str:
        """A document of a schema in Lark's syntax, with the white space that is asked for."""
        if self.disable_any_whitespace:
            return lark_json(schema, {"whitespace_flexible": False})
        return lark_json(schema, {"whitespace_pattern": self.whitespace_pattern or WHITE_SPACE})


def lark_json(schema: Mapping[str, Any], spaces: Mapping[str, Any]) -> str:
    """A document of a schema in Lark's syntax, with what llguidance is told of white space."""
    return f"%json {jsonlib.dumps({**schema, 'x-guidance': spaces})}"


def _kind(value: Any) -> str:
    return type(value).__name__


def _close_objects(schema: Any) -> None:
    """Forbids further properties wherever properties are listed and nothing is said of others."""
    if isinstance(schema, list):
        for one in schema:
            _close_objects(one)
    if not isinstance(schema, dict):
        return
    for one in schema.values():
        _close_objects(one)
    if isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
