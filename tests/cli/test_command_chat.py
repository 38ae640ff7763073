"""`moetor chat` with the demo model, fed from a pipe."""

from __future__ import annotations

import io
import sys

import pytest

from moetor.cli.main import main
from moetor.huggingface import loading

Captured = pytest.CaptureFixture[str]


def chat(
    captured: Captured, patch: pytest.MonkeyPatch, *lines: str, flags: tuple[str, ...] = ()
) -> tuple[list[str], str]:
    """Lines on standard output, and standard error."""
    patch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    given = ("--max-tokens", "8", "--temperature", "0", *flags)
    assert main(["chat", *given]) == 0
    out, err = captured.readouterr()
    return out.splitlines(), err


def test_answers_on_standard_output_and_figures_on_standard_error(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = chat(capsys, monkeypatch, "Who is there?")
    tokenizer = loading.load_tokenizer("demo")
    messages = [{"role": "user", "content": "Who is there?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert main(["generate", "--prompt", prompt, "--max-tokens", "8"]) == 0
    assert "\n".join(out) + "\n" == capsys.readouterr().out
    assert "generated 8 tokens at " in err


def test_the_conversation_is_remembered_and_found_in_the_cache(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ("Who is there?", "Stand and unfold yourself.", "/history", "/undo", "/history")
    _, err = chat(capsys, monkeypatch, *said, flags=("--system", "You are a watchman."))
    roles = [line.partition(":")[0] for line in err.splitlines()]
    history = [role for role in roles if role in ("system", "user", "assistant")]
    both = ["system", "user", "assistant", "user", "assistant"]
    assert history == [*both, "system", "user", "assistant"]


def test_commands(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "/help",
        "/nonsense",
        "/undo",
        "/set top_k 5",
        "/set top_p 7",
        "/set colour red",
        "",
        "/quit",
        "never reached",
    )
    out, err = chat(capsys, monkeypatch, *lines)
    assert out == []
    assert "/reset " in err
    assert "/nonsense is no command" in err
    assert "nothing was said yet" in err
    assert "/set top_p: top_p 7.0 must be above 0 and at most 1" in err
    assert "colour is none of temperature" in err
    assert "generated" not in err


def test_retry_and_reset(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = chat(capsys, monkeypatch, "Who is there?")
    again, _ = chat(capsys, monkeypatch, "Who is there?", "/retry")
    assert again == first * 2
    fresh, _ = chat(capsys, monkeypatch, "Who is there?", "/reset", "Who is there?")
    assert fresh == first * 2


def test_a_conversation_that_is_too_long_is_refused_and_goes_on(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = chat(capsys, monkeypatch, "word " * 1200, "Who is there?")
    assert out
    assert "max_model_len" in err
    assert "/reset forgets the conversation" in err


def test_what_a_conversation_cannot_be(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["chat", "--json"]) == 2
    assert "generate --chat" in capsys.readouterr().err
    assert main(["chat", "--level", "none", "--kernel", "native"]) == 2
    assert "plain Transformers" in capsys.readouterr().err
    tokenizer = loading.load_tokenizer("demo")
    tokenizer.chat_template = None
    monkeypatch.setattr(loading, "load_tokenizer", lambda *_, **__: tokenizer)
    assert main(["chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err
