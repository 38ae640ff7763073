"""The examples in `deploy/` use flags that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetor.cli.flags import Parser, add_flags, parse_options
from moetor.cli.serve import ServeOptions

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def parse(words: list[str]) -> ServeOptions:
    parser = Parser(prog="moetor serve", description="", epilog="")
    add_flags(parser, ServeOptions)
    return parse_options(parser, ServeOptions, words)


def test_the_settings_file() -> None:
    assert parse(["--config", str(DEPLOY / "server.yaml")]).max_waiting == 256


def test_kubernetes() -> None:
    deployment: Any
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = parse(container["args"])
    assert options.api_key_env == container["env"][0]["name"]
    assert pod["terminationGracePeriodSeconds"] > options.drain_timeout
    assert container["ports"][0]["containerPort"] == options.port
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_systemd() -> None:
    text = (DEPLOY / "moetor.service").read_text()
    words = re.search(r"^ExecStart=\S+/moetor serve (.*)$", text, re.MULTILINE)
    assert words is not None
    options = parse([word for word in words[1].split() if "server.yaml" not in word][1:])
    stop = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) > options.drain_timeout


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_docker(name: str) -> None:
    text = (DEPLOY / name).read_text()
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    assert entry is not None
    words = yaml.safe_load(entry[1])
    assert words[:2] == ["moetor", "serve"]
    assert parse(words[2:]).host == "0.0.0.0"
