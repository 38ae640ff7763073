"""Text leaves the stream as soon as it is whole, and the figures follow from the clock."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moetor.cli.streaming import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes; id 0 is special. Like many, it strips a leading space."""

    def decode(
        self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return bytes(i for i in ids if i).decode("utf-8", errors="replace").removeprefix(" ")


def run(
    prompt: str, generated: bytes, ticks: list[float] | None = None
) -> tuple[list[str], TextStream]:
    pieces: list[str] = []
    times: Iterator[float] = iter(ticks or map(float, range(1000)))
    stream = TextStream(Bytes(), pieces.append, clock=lambda: next(times))
    stream.start()
    stream.put(torch.tensor([list(prompt.encode())]))
    for token in generated:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces, stream


def test_each_character_is_emitted_at_once() -> None:
    pieces, stream = run("ab", b"cd")
    assert pieces == ["c", "d"]
    assert stream.text == "cd"
    assert stream.prompt_ids == [97, 98]
    assert stream.token_ids == [99, 100]


def test_a_character_of_several_tokens_is_emitted_whole() -> None:
    pieces, _ = run("a", "é€😀x".encode())
    assert pieces == ["é", "€", "😀", "x"]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    pieces, _ = run("a", b"b" + "€".encode()[:2])
    assert pieces == ["b", "\ufffd"]


def test_a_leading_space_survives() -> None:
    pieces, _ = run("a", b" b")
    assert pieces == [" ", "b"]


def test_special_tokens_are_not_text() -> None:
    pieces, stream = run("a", b"b\0")
    assert pieces == ["b"]
    assert stream.token_ids == [98, 0]


def test_a_prompt_of_one_token_is_not_taken_for_an_answer() -> None:
    _, stream = run("a", b"b")
    assert stream.prompt_ids == [97]
    assert stream.token_ids == [98]


def test_figures() -> None:
    _, stream = run("four", b"abc", ticks=[10.0, 12.0, 12.5, 13.0])
    figures = stream.figures(("native",))
    assert figures.prompt_tokens == 4
    assert figures.generated_tokens == 3
    assert figures.seconds_to_first_token == 2.0
    assert figures.prompt_tokens_per_second == 2.0
    assert figures.generated_tokens_per_second == 2.0
    assert str(figures) == (
        "prompt 4 tokens at 2 tok/s | generated 3 tokens at 2.0 tok/s | "
        "first token after 2000 ms | kernels native"
    )


def test_figures_of_a_single_token_have_no_rate() -> None:
    _, stream = run("four", b"a")
    figures = stream.figures(())
    assert figures.generated_tokens_per_second is None
    assert "generated 1 token |" in str(figures)
    assert "kernels none of ours" in str(figures)
