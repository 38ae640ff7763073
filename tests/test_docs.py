"""The documents say what is true: their examples run, and what they name exists."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import moetor

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "moetor"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMING = ("architecture.md", "from-vllm.md")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
SOURCE_FILE = re.compile(r"[\w./-]+\.(?:py|cpp|h)")
FOLDER = re.compile(r"(?:\w+/)+")
DOTTED = re.compile(r"moetor(?:\.\w+)+")
# `layer/moe.py` (`MoELayer.forward`, `Gate`): what stands in the brackets is in that module.
LOCATED = re.compile(r"`([\w/]+\.py)`\s+\(((?:`[\w.]+`(?:,\s+)?)+)\)")
MODULE_LINE = re.compile(r"^- `([\w/]+\.py)`: \S", re.MULTILINE)

# The README shows a hub model and values of the reader's own; these stand in for them.
STAND_INS = {
    '"Qwen/Qwen3-30B-A3B"': "__import__('moetor.demo').demo.model_path()",
    "model.generate(...)": "model.generate(max_new_tokens=2)",
    "2048": "64",
    "1024": "32",
}
README_PRELUDE = "import moetor, torch; hidden_states = torch.randn(3, 64)"

# Runs [[code, ...], ...]: a fresh namespace for every inner list, one answer for every code.
RUNNER = """
import contextlib, io, json, sys, traceback
answers = []
for codes in json.load(sys.stdin):
    namespace = {"__name__": "__main__"}
    for code in codes:
        printed, error = io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "<example>", "exec"), namespace)
        except BaseException:
            error = traceback.format_exc()
        answers.append([printed.getvalue(), error])
json.dump(answers, sys.stdout)
"""


def read(name: str) -> str:
    found = next(path for path in DOCUMENTS if path.name == name)
    return found.read_text(encoding="utf-8")


def examples(name: str) -> list[tuple[str, str | None]]:
    """Each python block, with the text block right after it: what the block prints."""
    text = read(name)
    blocks = list(FENCE.finditer(text))
    found: list[tuple[str, str | None]] = []
    for number, block in enumerate(blocks):
        if block[1] != "python":
            continue
        after = blocks[number + 1] if number + 1 < len(blocks) else None
        shown = after is not None and after[1] == "text"
        adjacent = after is not None and not text[block.end() : after.start()].strip()
        found.append((block[2], after[2] if after is not None and shown and adjacent else None))
    return found


def readme_codes() -> list[str]:
    codes = [README_PRELUDE]
    for code, _ in examples("README.md"):
        for shown, used in STAND_INS.items():
            code = code.replace(shown, used)
        codes.append(code)
    return codes


@cache
def answers() -> list[list[str]]:
    """Prints and errors of all examples: those of the API page, then those of the README."""
    programs = [[code] for code, _ in examples("python-api.md")]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",  # more would wait for each other on a busy machine
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([*programs, readme_codes()]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("number", range(len(examples("python-api.md"))))
def test_examples_of_the_api_page_run_and_print_what_is_shown(number: int) -> None:
    code, shown = examples("python-api.md")[number]
    printed, error = answers()[number]
    assert not error, f"{code}\n{error}"
    if shown is not None:
        assert printed == shown


def test_examples_of_the_readme_run() -> None:
    first = len(examples("python-api.md"))
    for code, (_, error) in zip(readme_codes(), answers()[first:], strict=True):
        assert not error, f"{code}\n{error}"


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) < 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    text = CODE.sub("", FENCE.sub("", document.read_text(encoding="utf-8")))
    targets = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    missing = [name for name in targets if name and not (document.parent / name).exists()]
    assert not missing


def resolve(start: Any, path: str) -> Any:
    """The attribute at a dotted path; a module on the way is imported."""
    value = start
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            if not hasattr(value, "__path__"):
                raise
            value = importlib.import_module(f"{value.__name__}.{part}")
    return value


def is_missing(start: Any, path: str) -> bool:
    try:
        resolve(start, path)
    except (AttributeError, ImportError):
        return True
    return False


@pytest.mark.parametrize("name", NAMING)
def test_named_files_exist(name: str) -> None:
    words = set(CODE.findall(FENCE.sub("", read(name))))
    files = {word for word in words if SOURCE_FILE.fullmatch(word) or FOLDER.fullmatch(word)}
    assert files, "the document names files"
    assert not [word for word in files if not ((PACKAGE / word).exists() or (ROOT / word).is_dir())]


@pytest.mark.parametrize("name", NAMING)
def test_named_things_exist(name: str) -> None:
    text = read(name)
    missing = []
    for file, names in LOCATED.findall(text):
        module = importlib.import_module("moetor." + file.removesuffix(".py").replace("/", "."))
        missing += [f"{file}: {item}" for item in CODE.findall(names) if is_missing(module, item)]
    for word in set(CODE.findall(text)):
        owner, _, attribute = word.partition(".")
        if DOTTED.fullmatch(word):
            missing += [word] if is_missing(moetor, attribute) else []
        elif owner in moetor.__all__ and re.fullmatch(r"[\w.]+", attribute):
            missing += [word] if is_missing(getattr(moetor, owner), attribute) else []
    assert not missing


def test_the_api_page_names_every_kernel_and_error() -> None:
    classes = vars(importlib.import_module("moetor.errors")).values()
    errors = {item.__name__ for item in classes if isinstance(item, type)}
    kernels = importlib.import_module("moetor.kernels.select").kernel_names()
    assert errors | set(kernels) <= set(CODE.findall(FENCE.sub("", read("python-api.md"))))


def has_code(file: Path) -> bool:
    """Whether a module holds more than its docstring."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return len(body) > 1 or (bool(body) and not isinstance(body[0], ast.Expr))


def test_every_module_has_its_line() -> None:
    listed = MODULE_LINE.findall(read("architecture.md"))
    assert len(listed) == len(set(listed)), "a module is listed twice"
    modules = {
        file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if has_code(file)
    }
    assert modules - set(listed) == set(), "modules without a line in docs/architecture.md"
