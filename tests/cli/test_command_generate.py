"""`moetor generate` with the demo model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from moetor.cli.main import main
from moetor.huggingface import loading

Captured = pytest.CaptureFixture[str]
SHORT = ("--max-tokens", "6")


def generate(captured: Captured, *arguments: str, status: int = 0) -> tuple[str, str]:
    """What `moetor generate` prints on standard output and on standard error."""
    assert main(["generate", *arguments]) == status
    out, err = captured.readouterr()
    return out, err


def as_json(captured: Captured, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(generate(captured, *arguments, "--json")[0])
    return found


def refusal(captured: Captured, *arguments: str) -> str:
    out, err = generate(captured, *arguments, status=2)
    assert out == ""
    assert err.startswith("moetor: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Sets what is on standard input."""

    def install(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return install


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", load)


@pytest.fixture
def changed_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes the generation configuration that the demo model is loaded with."""
    load = loading.load_model

    def install(**settings: Any) -> None:
        def changed(*arguments: Any, **options: Any) -> Any:
            model = load(*arguments, **options)
            assert model.generation_config is not None
            for name, value in settings.items():
                setattr(model.generation_config, name, value)
            return model

        monkeypatch.setattr(loading, "load_model", changed)

    return install


def test_text_on_standard_output_and_figures_on_standard_error(capsys: Captured) -> None:
    out, err = generate(capsys, "--prompt", "ROMEO:", *SHORT)
    assert len(out) > 6
    lines = err.splitlines()
    assert lines[:2] == ["loading demo: 250 tensors", "fusing demo: 4 blocks"]
    assert lines[2].startswith("prompt 2 tokens at ")
    assert " | generated 6 tokens at " in lines[2]
    assert " | first token after " in lines[2]
    assert " | kernels " in lines[2]
    assert len(lines) == 3
    assert "\x1b" not in out + err


def test_json_holds_everything_and_stands_alone(capsys: Captured) -> None:
    found = as_json(capsys, "--prompt", "ROMEO:", *SHORT, "--kernel", "torch")
    tokenizer = loading.load_tokenizer("demo")
    assert found["model"] == "demo"
    assert found["prompt"] == "ROMEO:"
    assert found["prompt_token_ids"] == tokenizer("ROMEO:").input_ids
    assert found["text"] == tokenizer.decode(found["token_ids"])
    assert len(found["token_ids"]) == found["figures"]["generated_tokens"] == 6
    assert found["finish_reason"] == "length"
    assert found["figures"]["kernels"] == ["torch"]
    assert [block["level"] for block in found["fusion"]["blocks"]] == ["block"] * 4


def test_streamed_text_and_json_text_are_the_same(capsys: Captured) -> None:
    streamed = generate(capsys, "--prompt", "ROMEO:", *SHORT)[0]
    assert streamed == as_json(capsys, "--prompt", "ROMEO:", *SHORT)["text"] + "\n"


@pytest.mark.parametrize("level", ["block", "experts"])
def test_every_level_gives_the_text_of_plain_transformers(level: str, capsys: Captured) -> None:
    arguments = ("--prompt", "ROMEO:", "--max-tokens", "24", "--dtype", "float32")
    plain = as_json(capsys, *arguments, "--level", "none")
    assert plain["fusion"] is None
    assert plain["figures"]["kernels"] == []
    fused = as_json(capsys, *arguments, "--level", level)
    assert fused["token_ids"] == plain["token_ids"]
    assert {block["level"] for block in fused["fusion"]["blocks"]} == {level}


def test_a_seed_repeats_a_sample(capsys: Captured) -> None:
    sampled = ("--prompt", "ROMEO:", "--max-tokens", "16", "--temperature", "1.5")
    first, again, other = (
        as_json(capsys, *sampled, "--seed", seed)["token_ids"] for seed in ("7", "7", "8")
    )
    assert first == again
    assert first != other


def test_a_tiny_top_p_leaves_the_likeliest_token(capsys: Captured) -> None:
    greedy = as_json(capsys, "--prompt", "ROMEO:", *SHORT)["token_ids"]
    narrow = ("--temperature", "2", "--top-p", "0.000001")
    assert as_json(capsys, "--prompt", "ROMEO:", *SHORT, *narrow)["token_ids"] == greedy


def test_the_model_s_own_sampling_defaults_are_not_mixed_in(
    capsys: Captured, changed_model: Callable[..., None]
) -> None:
    arguments = ("--prompt", "ROMEO:", "--max-tokens", "24")
    before = as_json(capsys, *arguments)["token_ids"]
    changed_model(repetition_penalty=9.0, do_sample=True, top_k=3, max_length=4)
    assert as_json(capsys, *arguments)["token_ids"] == before


def test_an_end_token_ends_the_text(capsys: Captured, changed_model: Callable[..., None]) -> None:
    third = as_json(capsys, "--prompt", "ROMEO:", *SHORT)["token_ids"][2]
    changed_model(eos_token_id=[third, 0], pad_token_id=None)
    found = as_json(capsys, "--prompt", "ROMEO:", *SHORT)
    assert found["token_ids"][-1] == third
    assert len(found["token_ids"]) <= 3
    assert found["finish_reason"] == "stop"


def test_chat_uses_the_template(capsys: Captured) -> None:
    found = as_json(capsys, "--prompt", "Who is there?", "--chat", *SHORT)
    expected = loading.load_tokenizer("demo").apply_chat_template(
        [{"role": "user", "content": "Who is there?"}], add_generation_prompt=True, tokenize=False
    )
    decoded = loading.load_tokenizer("demo").decode(found["prompt_token_ids"])
    assert decoded == expected


@pytest.mark.usefixtures("no_weights")
def test_chat_without_a_template_is_refused(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = loading.load_tokenizer("demo")
    tokenizer.chat_template = None
    monkeypatch.setattr(loading, "load_tokenizer", lambda *_, **__: tokenizer)
    assert "has no chat template; leave out --chat" in refusal(capsys, "--prompt", "x", "--chat")


@pytest.mark.usefixtures("no_weights")
def test_a_template_that_refuses_is_a_sentence(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = loading.load_tokenizer("demo")
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    monkeypatch.setattr(loading, "load_tokenizer", lambda *_, **__: tokenizer)
    said = refusal(capsys, "--prompt", "x", "--chat")
    assert "the chat template refuses the messages: no user here" in said


def test_the_prompt_from_standard_input_loses_its_last_newline(
    capsys: Captured, piped: Callable[[bytes], None]
) -> None:
    piped("é\n\n".encode())
    assert as_json(capsys, "--prompt", "-", *SHORT)["prompt"] == "é\n"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "is empty"), (b"\n", "is empty"), (b"\xff\xfe", "is not UTF-8 text")],
)
def test_a_bad_prompt_on_standard_input(
    data: bytes, said: str, capsys: Captured, piped: Callable[[bytes], None]
) -> None:
    piped(data)
    assert said in refusal(capsys, "--prompt", "-")


@pytest.mark.usefixtures("no_weights")
def test_a_prompt_that_is_not_text(capsys: Captured) -> None:
    assert "is not UTF-8 text" in refusal(capsys, "--prompt", "\udcff")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "a b " * 2000), "that 'demo' can attend to; shorten the prompt\n"),
        (("--prompt", "ROMEO:", "--max-tokens", "1023"), "or take --max-tokens 1022 or less\n"),
    ],
)
def test_more_than_the_context_is_refused_before_weights_are_loaded(
    arguments: tuple[str, ...], said: str, capsys: Captured
) -> None:
    assert said in refusal(capsys, *arguments)


def test_a_model_without_moe_says_so(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    from moetor.huggingface import FusionReport, fusing

    monkeypatch.setattr(fusing, "fuse", lambda *_, **__: FusionReport([]))
    out, err = generate(capsys, "--prompt", "ROMEO:", *SHORT)
    assert out
    assert "demo has no MoE blocks; nothing was fused" in err
    assert err.endswith("| kernels none of ours\n")


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_is_not_there(capsys: Captured) -> None:
    out, err = generate(capsys, "./nowhere", "--prompt", "x", status=1)
    assert out == ""
    assert err.startswith("moetor: error: './nowhere' is neither a folder nor")
    assert err.count("\n") == 1
