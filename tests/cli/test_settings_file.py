"""Flags from a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetor.cli.flags import Parser, UsageError, add_flags, parse_options
from moetor.cli.serve import ServeOptions


def parse(*words: str) -> ServeOptions:
    parser = Parser(prog="moetor serve", description="", epilog="")
    add_flags(parser, ServeOptions)
    return parse_options(parser, ServeOptions, words)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.yaml"


def test_the_file_gives_flags_and_the_line_wins(file: Path) -> None:
    file.write_text(
        "model: ./a folder\nport: 8001\nmax-num-seqs: 8\nserved_model_name: [a, b]\n"
        "enable-prefix-caching: false\nenforce-eager: true\nrecord-expert-load: true\n"
    )
    options = parse("--config", str(file), "--port", "9000")
    assert options.model == "./a folder"
    assert options.port == 9000
    assert options.max_num_seqs == 8
    assert options.served_model_name == ("a", "b")
    assert not options.enable_prefix_caching
    assert options.enforce_eager
    assert options.record_expert_load
    assert parse("other", "--config", str(file)).model == "other"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot: 1", "prot is not a flag"),
        ("config: x.yaml", "config is not a flag"),
        ("port: many", "invalid int value"),
        ("enforce-eager: 1", "enforce-eager is a switch"),
        ("port:", "port needs a value"),
        ("- port", "one flag a line"),
        ("port: [", "is not YAML"),
    ],
)
def test_what_is_wrong_with_it_is_said(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError, match=told):
        parse("--config", str(file))


def test_a_missing_file(file: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse("--config", str(file))
