"""`moetor bench serve` against a real server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moetor.bench.serving import RequestTimes, ServingResult, block, summary
from moetor.cli.main import main
from server.server_process import KEY, ServerProcess


def test_the_block_and_the_file(
    server: ServerProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BENCH_KEY", KEY)
    words = ["bench", "serve", "--url", server.url, "--api-key-env", "BENCH_KEY"]
    words += ["--num-prompts", "6", "--input-len", "12", "--output-len", "5"]
    words += ["--max-concurrency", "3", "--json", str(tmp_path / "made.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^Successful requests: +6$", printed, re.MULTILINE)
    assert re.search(r"^Total generated tokens: +30$", printed, re.MULTILINE)
    assert re.search(r"^Total input tokens: +72$", printed, re.MULTILINE)
    assert re.search(r"^Median TTFT \(ms\): +\d", printed, re.MULTILINE)
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["figures"]["generated_tokens"] == 30
    assert KEY not in json.dumps(made)


def test_what_a_server_refuses_is_told(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "serve", "--url", server.url]) == 1
    assert "API key" in capsys.readouterr().err
    monkeypatch.setenv("BENCH_KEY", KEY)
    words = ["bench", "serve", "--url", server.url, "--api-key-env", "BENCH_KEY"]
    assert main([*words, "--output-len", "5000"]) == 1
    assert "maximum context length" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    assert "there is no server" in capsys.readouterr().err


def test_the_figures() -> None:
    requests = [
        RequestTimes(begin=0.0, arrivals=[0.5, 0.7, 1.1], end=1.2, prompt_tokens=4, tokens=3),
        RequestTimes(begin=1.0, arrivals=[1.1], end=1.2, prompt_tokens=4, tokens=1),
        RequestTimes(begin=1.0, end=1.2, error="no"),
    ]
    figures = summary(ServingResult(requests=requests, seconds=2.0))
    assert figures["successful_requests"] == 2
    assert figures["failed_requests"] == 1
    assert figures["output_throughput"] == 2
    assert figures["total_throughput"] == 6
    assert figures["ttft_ms"]["mean"] == pytest.approx(300)
    assert figures["tpot_ms"]["median"] == pytest.approx(300)
    assert figures["itl_ms"]["p99"] == pytest.approx(400)
    assert len({len(line) for line in block(figures) if line[0] in "=-"}) == 1
