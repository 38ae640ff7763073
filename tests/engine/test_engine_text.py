"""Text leaves as soon as it is whole, and stop strings end it."""

from __future__ import annotations

import random

import pytest

from moetor.engine.text import TextBuilder


def decode(ids: list[int]) -> str:
    """Tokens that are bytes; id 0 is special. Like many, it strips a leading space."""
    return bytes(i for i in ids if i).decode("utf-8", errors="replace").removeprefix(" ")


def pieces(prompt: str, generated: bytes, *stop: str, include: bool = False) -> list[str]:
    """What each token adds to the text, and what its end adds."""
    built = TextBuilder(decode, list(prompt.encode()), stop, include_stop=include)
    found = []
    for token in generated:
        since = len(built.text)
        built.extend([token])
        ended = built.find_stop(since) is not None if stop else False
        found.append(built.report([], final=ended)[1])
        if ended:
            return [piece for piece in found if piece]
    built.finish()
    found.append(built.report([], final=True)[1])
    return [piece for piece in found if piece]


def test_each_character_is_emitted_at_once() -> None:
    assert pieces("ab", b"cd") == ["c", "d"]


def test_a_character_of_several_tokens_is_emitted_whole() -> None:
    assert pieces("a", "é€😀x".encode()) == ["é", "€", "😀", "x"]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    assert pieces("a", b"b" + "€".encode()[:2]) == ["b", "\ufffd"]


def test_a_leading_space_survives() -> None:
    assert pieces("a", b" b") == [" ", "b"]


def test_special_tokens_are_not_text() -> None:
    assert pieces("a", b"b\0") == ["b"]


def test_several_tokens_at_once_give_the_same_text() -> None:
    rng = random.Random(3)
    text = "Ein Wörterbuch 😀 für Größe: 12 €."
    built = TextBuilder(decode, list(b"prompt"), (), include_stop=False)
    ids = list(text.encode())
    while ids:
        count = rng.randrange(0, 6)
        built.extend(ids[:count])
        ids = ids[count:]
    built.finish()
    assert built.text == text
    assert built.count == len(text.encode())


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one two")])
def test_nothing_of_a_stop_string_is_emitted_before_it_is_decided(include: bool, text: str) -> None:
    found = pieces("a", b"one two three", "two", "never", include=include)
    assert "".join(found) == text
    assert all("t" not in piece for piece in found[:-1])


def test_what_only_began_like_a_stop_string_comes_out() -> None:
    assert "".join(pieces("a", b"one tw", "two")) == "one tw"


def test_the_first_of_several_stop_strings_counts() -> None:
    assert "".join(pieces("a", b"abcdef", "cdef", "bc")) == "a"


def test_a_stop_string_that_came_too_early_does_not_count_later() -> None:
    """Not even where a longer one is looked for further back."""
    built = TextBuilder(decode, list(b"a"), ("b", "never there"), include_stop=False)
    for character in b"abcd":
        built.extend([character])
    assert built.find_stop(2) is None
    built.extend(list(b"eb"))
    assert built.find_stop(4) == "b"
    assert built.text == "abcde"
