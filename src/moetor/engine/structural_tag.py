"""Texts that are free but for tags: what follows a trigger is a tag with a JSON document in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetor.errors import InputError

_WHAT = "structured_outputs: structural_tag"


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag.

    Attributes:
        trigger: with which `begin` starts; what is written after it is a tag.
        begin, end: the texts around the document.
        schema: of the document, for JSON.
    """

    trigger: str
    begin: str
    schema: dict[str, Any]
    end: str


def read_tags(given: str | Mapping[str, Any]) -> list[Tag]:
    """The tags of a structural tag as vLLM takes it, a mapping or the JSON of it: `structures`,
    each with `begin`, `schema` and `end`, and `triggers`.

    Raises:
        InputError: it is malformed, or of the form that only xgrammar knows.
    """
    try:
        read = json.loads(given if isinstance(given, str) else json.dumps(dict(given)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{_WHAT} is not JSON: {error}") from error
    if not isinstance(read, dict) or read.pop("type", "structural_tag") != "structural_tag":
        raise InputError(f"{_WHAT} must be an object of type structural_tag")
    if set(read) != {"structures", "triggers"}:
        raise InputError(
            f"{_WHAT} has {', '.join(sorted(read)) or 'no fields'}; it is taken with structures "
            "and triggers, and no other fields"
        )
    triggers, structures = read["triggers"], read["structures"]
    if not _texts(triggers) or not all(triggers):
        raise InputError(f"{_WHAT}: triggers must be a list of texts, each of at least a character")
    if not isinstance(structures, list) or not structures:
        raise InputError(f"{_WHAT}: structures must be a list of at least one")
    return [_tag(one, index, triggers) for index, one in enumerate(structures)]


def _texts(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(one, str) for one in given)


def _tag(given: Any, index: int, triggers: Sequence[str]) -> Tag:
    sound = isinstance(given, dict) and set(given) == {"begin", "schema", "end"}
    if not sound or not _texts([given["begin"], given["end"]]):
        raise InputError(f"{_WHAT}: structures.{index} must have the texts begin and end, a schema")
    if not isinstance(given["schema"], dict):
        raise InputError(f"{_WHAT}: structures.{index}: its schema must be an object")
    begin = given["begin"]
    trigger = next((one for one in triggers if begin.startswith(one)), None)
    if trigger is None:
        raise InputError(f"{_WHAT}: structures.{index} begins with none of the triggers")
    return Tag(trigger, begin, given["schema"], given["end"])


def lark(
    tags: Sequence[Tag],
    pieces: Callable[[str], list[str]],
    document: Callable[[dict[str, Any]], str],
) -> str:
    """The grammar in Lark's syntax.

    Args:
        pieces: of a text: tokens that stand apart from text, as `<...>`, and what is between them,
            in quotes.
        document: a schema's document.
    """
    rules = ["%llguidance {}", r"TEXT: /(.|\n)*/"]
    names = [f"tag_{number}" for number in range(len(tags))]
    rules.append(f"start: ({' | '.join(names)})* TEXT")
    said: dict[str, str] = {}
    for name, tag in zip(names, tags, strict=True):
        first, *rest = pieces(tag.trigger)
        rest += pieces(tag.begin.removeprefix(tag.trigger))
        body = " ".join([*rest, document(tag.schema), *pieces(tag.end)])
        if first.startswith("<"):
            rules.append(f"{name}: TEXT {first} {body}")
            continue
        if first not in said:
            said[first] = f"said_{len(said)}"
            rules.append(f"{said[first]}[lazy]: TEXT {first}")
        rules.append(f"{name}: {said[first]} {body}")
    return "\n".join(rules)
