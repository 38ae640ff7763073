"""The examples in `deploy/` use flags that there are, and what they run runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetor.cli.flags import Parser, add_flags, parse_options
from moetor.cli.serve import ServeOptions
from server.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


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


def test_kubernetes_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="a client, not installed")
    for resource in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        validate.validate(resource, validate.latest_version(), strict=True)


def told(name: str, instruction: str) -> list[str]:
    """What stands behind each `instruction` of a Dockerfile."""
    text = (DEPLOY / name).read_text().replace("\\\n", " ")
    return re.findall(rf"^ *{instruction} (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_docker(name: str) -> None:
    (entry,) = told(name, "ENTRYPOINT")
    words = yaml.safe_load(entry)
    assert words[:2] == ["moetor", "serve"]
    options = parse(words[2:])
    assert options.host == "0.0.0.0"
    assert told(name, "EXPOSE") == [str(options.port)]
    # A user with a name could be root as far as Kubernetes knows.
    (user,) = told(name, "USER")
    assert int(user) > 0
    assert any(f"useradd --uid {user} " in line for line in told(name, "RUN"))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_docker_copies_what_is_installed(name: str) -> None:
    copied = {word for line in told(name, "COPY") for word in line.split()[:-1]}
    assert all((ROOT / one).exists() for one in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]["where"]
    needed = {project["project"]["readme"], *project["project"]["license-files"], *found}
    assert {"pyproject.toml", *needed} <= copied
    (install,) = (line for line in told(name, "RUN") if line.startswith("pip install"))
    assert ("--constraint constraints.txt" in install) == ("constraints.txt" in copied)
    (extras,) = re.findall(r'"\.\[(.*)\]"', install)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_docker_asks_for_health(name: str, server: ServerProcess) -> None:
    command = yaml.safe_load(told(name, "HEALTHCHECK")[0].partition("CMD ")[2])
    assert command[0] == "python"

    def ask(url: str) -> int:
        code = command[2].replace("http://127.0.0.1:8000", url)
        return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode

    assert ask(server.url) == 0
    assert ask("http://127.0.0.1:9") != 0
