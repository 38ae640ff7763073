"""What importing costs, and which releases of torch and Transformers are refused, and when."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from moetor.errors import VersionError
from moetor.huggingface.versions import SUPPORTED, check_versions


@dataclass(frozen=True)
class Release:
    package: str
    version: str | None
    supported: bool

    @property
    def id(self) -> str:
        return f"{self.package}-{self.version}"


RELEASES = (
    Release("torch", "2.11.0", True),
    Release("torch", "2.13.0+cpu", True),
    Release("torch", "2.14.0.dev20261101", True),
    Release("torch", "2.12.0a0+git1234", True),
    Release("torch", "3.0", True),
    Release("torch", "2.10.1", False),
    Release("torch", "2.9", False),
    Release("torch", "1.13.1+cu117", False),
    Release("torch", None, False),
    Release("transformers", "5.17.0", True),
    Release("transformers", "5.23.0", True),
    Release("transformers", "5.99.1", True),
    Release("transformers", "5.17.0.dev0", True),
    Release("transformers", "5.16.9", False),
    Release("transformers", "5.3.0", False),
    Release("transformers", "4.57.1", False),
    Release("transformers", "6.0.0", False),
    Release("transformers", "6.1.0.dev0", False),
    Release("transformers", "10.0", False),
    Release("transformers", None, False),
)


def pretend(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    """Makes the package's metadata say this release, or that it is not installed."""
    from moetor.huggingface import versions

    real = importlib.metadata.version

    def answer(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(versions, "version", answer)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.id)
def test_releases(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, release.package, release.version)
    if release.supported:
        check_versions()
        return
    with pytest.raises(VersionError) as caught:
        check_versions()
    text = str(caught.value)
    low, high = SUPPORTED[release.package]
    assert "\n" not in text
    assert f">={low[0]}.{low[1]}" in text
    assert high is None or f"<{high[0]}" in text
    assert f"pip install '{release.package}" in text
    assert (release.version or "not installed") in text


def test_what_is_installed_is_supported() -> None:
    check_versions()


# --- In processes of their own -------------------------------------------------------------------

_PRETEND = """
import importlib.metadata
_real = importlib.metadata.version
importlib.metadata.version = lambda name: {versions!r}.get(name) or _real(name)
"""


def run_python(code: str, **versions: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where the packages claim these versions."""
    prefix = _PRETEND.format(versions=versions) if versions else ""
    return subprocess.run(
        [sys.executable, "-c", prefix + code],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_import_is_light() -> None:
    """Neither torch nor Transformers, nor what only some commands need."""
    code = (
        "import sys, moetor, moetor.errors, moetor.config, moetor.cli.main\n"
        "heavy = ('torch', 'transformers', 'numpy', 'safetensors', 'rich', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_layer_needs_no_transformers() -> None:
    code = (
        "import sys, torch\n"
        "from moetor import ExpertsConfig, MoEConfig, MoELayer, RouterConfig\n"
        "layer = MoELayer(MoEConfig(hidden_size=8, router=RouterConfig(num_experts=4, top_k=2),\n"
        "    experts=ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=8))).eval()\n"
        "assert layer(torch.randn(3, 8)).shape == (3, 8)\n"
        "print('transformers' in sys.modules)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


BAD = [{"transformers": "4.57.1"}, {"transformers": "6.0.0"}, {"torch": "2.10.0"}]
USES = {
    "fuse": "moetor.fuse",
    "verify": "moetor.verify",
    "explain": "moetor.explain",
    "report": "from moetor import FusionReport",
    "experts": "AutoModelForCausalLM.from_config(config, experts_implementation='moetor')(ids)",
}


@pytest.mark.parametrize("versions", BAD, ids=str)
def test_refused_at_the_first_use_and_not_before(versions: dict[str, Any]) -> None:
    """`import moetor`, the layer and Transformers itself go on working."""
    uses = "\n".join(
        f"try:\n    {use}\n    print('{name} went through')\n"
        f"except VersionError as error:\n    print(error)"
        for name, use in USES.items()
    )
    code = (
        "import moetor, torch\n"
        "from moetor.errors import VersionError\n"
        "from moetor import MoELayer\n"
        "from transformers import AutoModelForCausalLM, MixtralConfig\n"
        "import transformers.integrations.finegrained_fp8\n"
        "config = MixtralConfig(vocab_size=9, hidden_size=32, intermediate_size=32,\n"
        "    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)\n"
        "ids = torch.zeros(1, 2, dtype=torch.long)\n"
        "AutoModelForCausalLM.from_config(config)(ids)\n"
        "print('plain Transformers runs')\n" + uses
    )
    done = run_python(code, **versions)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0] == "plain Transformers runs"
    assert len(lines) == 1 + len(USES)
    ((package, version),) = versions.items()
    for line in lines[1:]:
        assert line.startswith(f"{package} {version} is installed")
        assert "pip install" in line


def test_without_transformers() -> None:
    """Not installed: the layer works, and the Hugging Face part says what to install."""
    code = (
        "import importlib.metadata, sys\n"
        "real = importlib.metadata.version\n"
        "def version(name):\n"
        "    if name == 'transformers':\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "importlib.metadata.version = version\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'transformers':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "import moetor\n"
        "from moetor import MoELayer\n"
        "from moetor.errors import VersionError\n"
        "try:\n"
        "    moetor.fuse\n"
        "except VersionError as error:\n"
        "    print(error)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "transformers>=5.17,<6 is needed and not installed" in done.stdout


def test_command_with_an_unsupported_release() -> None:
    """One line, no traceback, status 1."""
    code = "import sys\nfrom moetor.cli.main import main\nsys.exit(main(['verify']))"
    done = run_python(code, transformers="6.0.0")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "transformers 6.0.0 is installed" in done.stderr
    assert "unexpected" not in done.stderr
