"""Flags generated from a dataclass: names, types, defaults, refusals."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from moetor.cli.flag_names import in_flags
from moetor.cli.flags import Parser, UsageError, add_flags, parse_options
from moetor.errors import ConfigError


def does(**metadata: Any) -> dict[str, Any]:
    return {"help": "what it does", **metadata}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    where: str = field(default="here", metadata=does(positional=True))
    needed: str = field(metadata={"help": "must be given", "metavar": "WORD"})
    count_of_things: int = field(default=3, metadata=does())
    share: float = field(default=0.5, metadata=does(group="numbers"))
    seed: int | None = field(default=None, metadata=does())
    folder: Path | None = field(default=None, metadata=does())
    quick: bool = field(default=False, metadata=does())
    checked: bool = field(default=True, metadata=does())
    mode: Literal["slow", "fast"] = field(default="slow", metadata=does())
    sizes: tuple[int, ...] = field(default=(1, 8), metadata=does())
    peers: tuple[Literal["a", "b"], ...] = field(default=(), metadata=does())

    def __post_init__(self) -> None:
        if self.count_of_things > 100:
            raise ConfigError("--count-of-things is at most 100")


def parse(*arguments: str, options: type[Any] = Sample) -> Any:
    parser = Parser("sample", "A sample.", "")
    add_flags(parser, options)
    return parse_options(parser, options, arguments)


def test_defaults_are_the_dataclass_s() -> None:
    assert parse("--needed", "x") == Sample(needed="x")


def test_every_kind_of_value_is_read() -> None:
    given = parse(
        *("there", "--needed", "x", "--count-of-things", "7", "--share", "-0.25", "--seed", "0"),
        *("--folder", "a/b", "--quick", "--no-checked", "--mode", "fast"),
        *("--sizes", "4, 5,6", "--peers", "b,a"),
    )
    assert given == Sample(
        where="there",
        needed="x",
        count_of_things=7,
        share=-0.25,
        seed=0,
        folder=Path("a/b"),
        quick=True,
        checked=False,
        mode="fast",
        sizes=(4, 5, 6),
        peers=("b", "a"),
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: --needed"),
        (["--needed"], "expected one argument"),
        (["--needed", "x", "--mode", "quick"], "'slow', 'fast'"),
        (["--needed", "x", "--count-of-things", "many"], "--count-of-things: invalid int value"),
        (["--needed", "x", "--count-of-things", "101"], "at most 100"),
        (["--needed", "x", "--sizes", "1,b"], "'b' in '1,b' is not of type int"),
        (["--needed", "x", "--sizes", "1,"], "'' in '1,' is not of type int"),
        (["--needed", "x", "--peers", "a,c"], "'c' is not one of a, b"),
        (["--needed", "x", "--count", "1"], "unrecognized arguments: --count"),
        (["--needed", "x", "here", "there"], "unrecognized arguments: there"),
    ],
)
def test_refusals_are_usage_errors(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(*arguments)
    assert said in str(refusal.value)


def test_help_names_every_flag_with_its_default() -> None:
    parser = Parser("sample", "A sample.", "")
    add_flags(parser, Sample)
    text = " ".join(parser.format_help().split())
    assert "usage: sample [WHERE] --needed WORD [flags]" in text
    for part in (
        "must be given (required)",
        "--count-of-things COUNT_OF_THINGS what it does (default: 3)",
        "--seed SEED what it does (default: none)",
        "--quick what it does (default: off)",
        "--checked, --no-checked what it does (default: on)",
        "--mode {slow,fast} what it does (default: slow)",
        "--sizes SIZES what it does (default: 1,8)",
        "numbers: --share SHARE what it does (default: 0.5)",
    ):
        assert part in text


def test_a_percent_sign_in_a_help_is_printed() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Percent:
        share: float = field(default=50.0, metadata={"help": "in %"})

    parser = Parser("sample", "A sample.", "")
    add_flags(parser, Percent)
    assert "in % (default: 50.0)" in parser.format_help()


def test_a_field_that_has_no_command_line_form_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        table: dict[str, int] | None = field(default=None, metadata=does())

    with pytest.raises(TypeError, match=r"Odd\.table: .* has no command-line form"):
        add_flags(Parser("sample", "", ""), Odd)


def test_a_field_without_help_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Silent:
        name: str = "x"

    with pytest.raises(TypeError, match=r"Silent\.name has no help"):
        add_flags(Parser("sample", "", ""), Silent)


@dataclass(frozen=True, kw_only=True)
class Named:
    """Fields that errors name."""

    model: str = field(default="demo", metadata={"positional": True, "help": "which"})
    seed: int = field(default=0, metadata={"help": "a word of the language too"})
    max_len: int | None = field(default=None, metadata={"help": "tokens"})
    eager: bool = field(default=False, metadata={"help": "a switch"})
    load_now: bool = field(default=False, metadata={"help": "one of two", "sets": "load"})
    load_file: str | None = field(default=None, metadata={"help": "the other", "sets": "load"})


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("NamedConfig: max_len=0 must be at least 1", "--max-len 0 must be at least 1"),
        ("lower max_len, or raise max_length", "lower --max-len, or raise max_length"),
        ("seed=-1: the seed is negative", "--seed -1: the seed is negative"),
        ("load='a b.json' was asked for", "--load-file a b.json was asked for"),
        ("NamedConfig: load needs seed", "--load-file needs seed"),
        ("a heavy load", "a heavy load"),
        ("needs eager=True", "needs --eager"),
        ("eager=False cannot be", "--no-eager cannot be"),
        ("model='x' is unknown", "model='x' is unknown"),
        ("OtherConfig: top_k=3 exceeds 2", "OtherConfig: top_k=3 exceeds 2"),
        ("--max-len and x.max_len are left", "--max-len and x.max_len are left"),
    ],
)
def test_fields_in_errors_are_told_as_flags(said: str, shown: str) -> None:
    given = {"load_file": "x", "load_now": False}
    assert in_flags(said, Named, given) == shown
