"""`moetor verify`: what it prints and its exit status."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

import moetor.huggingface
from moetor.cli.main import main
from moetor.huggingface import BlockCheck, VerifyReport, verifying

Captured = pytest.CaptureFixture[str]

GOOD = BlockCheck(
    name="layers.0.mlp", level="block", kernel="torch", max_error=1e-6, tolerance=1e-5, ok=True
)
REPORT = VerifyReport(
    blocks=(GOOD, replace(GOOD, name="layers.1.mlp", max_error=None, note="left alone")),
    logits_error=2e-6,
    logits_tolerance=1e-5,
    non_finite=(),
    perplexity=None,
)


def verify(
    monkeypatch: pytest.MonkeyPatch, captured: Captured, report: VerifyReport, status: int
) -> list[str]:
    """The lines that `moetor verify` prints for `report`."""
    monkeypatch.setattr(moetor.huggingface, "verify", lambda *_, **__: report)
    assert main(["verify"]) == status
    out, err = captured.readouterr()
    assert err == ""
    return out.splitlines()


def test_agreement(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert verify(monkeypatch, capsys, REPORT, 0) == [
        "demo: fused against original, 2 MoE blocks",
        "block         level  kernel  error    tolerance  result  note",
        "layers.0.mlp  block  torch   1.0e-06  1.0e-05    ok      -",
        "layers.1.mlp  block  torch   -        1.0e-05    ok      left alone",
        "logits: error 2.0e-06, tolerance 1.0e-05",
        "ok",
    ]


def test_a_block_that_differs(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    bad = replace(GOOD, max_error=math.nan, ok=False, note="something")
    lines = verify(monkeypatch, capsys, replace(REPORT, blocks=(GOOD, bad)), 1)
    assert lines[3] == "layers.0.mlp  block  torch   nan      1.0e-05    DIFFERS  something"
    assert lines[-1] == "FAILED: 1 of 2 blocks differ"


@pytest.mark.parametrize("error", [1.0, math.inf, math.nan])
def test_logits_that_differ(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    lines = verify(monkeypatch, capsys, replace(REPORT, logits_error=error), 1)
    assert lines[-1] == "FAILED: the logits differ"


def test_weights_that_are_not_finite(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    names = tuple(f"w{number}" for number in range(7))
    lines = verify(monkeypatch, capsys, replace(REPORT, non_finite=names), 1)
    said = "FAILED: weights that are not finite (NaN or infinity): w0, w1, w2, w3, w4 and 2 more"
    assert lines[-1] == said


def test_a_model_without_moe(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    lines = verify(monkeypatch, capsys, replace(REPORT, blocks=()), 0)
    assert lines[0] == "demo: no MoE blocks, nothing to fuse"


def test_json_is_valid_whatever_the_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    report = replace(REPORT, logits_error=math.inf)
    monkeypatch.setattr(moetor.huggingface, "verify", lambda *_, **__: report)
    assert main(["verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["logits_error"] is None
    assert found["blocks"][0]["name"] == "layers.0.mlp"


def test_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(verifying, "PERPLEXITY_TOKENS", 256)
    assert main(["verify", "--dtype", "float32", "--kernel", "torch"]) == 0
    out, err = capsys.readouterr()
    assert err == "comparing demo: 4 blocks\n"
    lines = out.splitlines()
    assert len(lines) == 9
    assert lines[-2].startswith("perplexity: ")
    original, fused = (word for word in lines[-2].split() if word[0].isdigit())
    assert original == fused
    assert lines[-1] == "ok"
