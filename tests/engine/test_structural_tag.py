"""Texts that are free but for tags: which texts a grammar takes, and which tags are refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import AddedToken

from moetor import StructuredOutputsParams
from moetor.engine.grammar import GrammarCompiler
from moetor.errors import InputError
from moetor.huggingface.loading import load_tokenizer

CITY = {"type": "object", "properties": {"city": {"enum": ["Elsinore", "Verona"]}}}
HOURS = {"type": "integer", "minimum": 1, "maximum": 9}
TAGS: Any = {
    "structures": [
        {"begin": "<call>\n<look>", "schema": {**CITY, "required": ["city"]}, "end": "</call>"},
        {"begin": "<call>\n<wait>", "schema": HOURS, "end": "</call>"},
        {"begin": "[[", "schema": HOURS, "end": "]]"},
    ],
    "triggers": ["<call>", "[["],
}
LOOK = '<call>\n<look>{"city": "Verona"}</call>'
WAIT = "<call>\n<wait>5</call>"


def compiler(marks: bool | None) -> tuple[GrammarCompiler, Any]:
    tokenizer = copy.deepcopy(load_tokenizer("demo"))
    if marks is not None:
        for mark in ("<call>", "</call>"):
            tokenizer.add_tokens([AddedToken(mark, special=marks, normalized=False)])
    return GrammarCompiler(tokenizer, len(tokenizer), frozenset({0})), tokenizer


@pytest.mark.parametrize("marks", [None, False, True])
def test_texts_with_tags(marks: bool | None) -> None:
    """Whether the marks are text or tokens of their own."""
    grammars, tokenizer = compiler(marks)
    asked = StructuredOutputsParams(structural_tag=TAGS)
    assert asked.tags() == StructuredOutputsParams(structural_tag=json.dumps(TAGS)).tags()
    for text, right in (
        ("", True),
        ("Nobody, and [one] of them.", True),
        (LOOK, True),
        (f"I look.\n{LOOK}\nand {WAIT}[[7]] I wait", True),
        (f"{WAIT}{WAIT}", True),
        (LOOK.replace("Verona", "Rome"), False),
        (LOOK.replace("look", "jump"), False),
        (f"{WAIT} and [[12]]", False),
        (f"{WAIT} and [[1", False),
        (f"I wait. {WAIT[:-2]}", False),
    ):
        matcher = grammars.start(asked).matcher
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        fits = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        assert fits is right, text


def test_white_space_and_further_properties() -> None:
    grammars, tokenizer = compiler(None)

    def fits(text: str, **settings: Any) -> bool:
        asked = StructuredOutputsParams(structural_tag=TAGS, **settings)
        matcher = grammars.start(asked).matcher
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    more = LOOK.replace('"Verona"', '"Verona", "x": 1')
    assert fits(LOOK)
    assert fits(more)
    assert not fits(LOOK, disable_any_whitespace=True)
    assert fits(LOOK.replace(": ", ":"), disable_any_whitespace=True)
    assert fits(LOOK.replace(": ", ":--"), whitespace_pattern="-*")
    assert fits(LOOK, disable_additional_properties=True)
    assert not fits(more, disable_additional_properties=True)


BAD: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ([1], "not JSON"),
    ("[]", "object"),
    ({}, "no fields"),
    ({**TAGS, "type": "json"}, "of type structural_tag"),
    ({"type": "structural_tag", "format": {"type": "any_text"}}, "format"),
    ({**TAGS, "at_least_one": True}, "at_least_one"),
    ({**TAGS, "triggers": []}, "triggers"),
    ({**TAGS, "triggers": "<call>"}, "triggers"),
    ({**TAGS, "triggers": ["<call>", ""]}, "triggers"),
    ({**TAGS, "triggers": ["[["]}, r"structures\.0 begins with none"),
    ({**TAGS, "structures": []}, "at least one"),
    ({**TAGS, "structures": [{"begin": "[[", "end": "]]"}]}, r"structures\.0"),
    ({**TAGS, "structures": [{"begin": 5, "schema": {}, "end": "]]"}]}, r"structures\.0"),
    ({**TAGS, "structures": [{"begin": "[[", "schema": "{}", "end": "]]"}]}, "schema"),
]


@pytest.mark.parametrize(("given", "told"), BAD)
def test_tags_that_are_refused(given: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        StructuredOutputsParams(structural_tag=given)


def test_a_schema_that_does_not_compile() -> None:
    grammars, _ = compiler(None)
    wrong = {**TAGS, "structures": [{**TAGS["structures"][2], "schema": {"type": "nothing"}}]}
    with pytest.raises(InputError, match="nothing"):
        grammars.start(StructuredOutputsParams(structural_tag=wrong))
