from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moetor.bench import case, layer, peers, plot, quantized
from moetor.bench.request import LayerBenchRequest
from moetor.bench.rotation import Step
from moetor.bench.shapes import parse_shapes
from moetor.cli.main import main

TINY = ["bench", "layer", "--shape", "4,2,32,16", "--dtype", "float32"]
ROW = {
    *("shape", "num_experts", "top_k", "hidden_size", "intermediate_size", "tokens", "kernel"),
    *("max_error", "active_experts", "read_bytes", "flops", "floor_us", "bound", "rotation"),
    *("other_use", "implementations"),
}
IMPLEMENTATION = {
    *("name", "library", "median_us", "p10_us", "p90_us", "samples", "cuda_graph", "gb_per_s"),
    *("tflop_per_s", "share_of_floor", "times_ours", "rested_us", "rested_share_of_floor"),
    *("read_bytes", "floor_us"),
}


def _record(folder: Path, *flags: str) -> dict[str, Any]:
    path = folder / "out.json"
    assert main([*TINY, "--json", str(path), *flags]) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.usefixtures("quick")
def test_the_record_of_a_run(tmp_path: Path) -> None:
    record = _record(tmp_path, "--tokens", "1,5", "--kernel", "torch", "--threads", "1")
    assert set(record) == {
        *("command", "date", "git", "versions", "hardware", "format", "settings", "ceilings"),
        *("rows", "skipped", "failures", "unmeasured"),
    }
    versions = set(record["versions"]) - {"llama_cpp_python"}
    assert versions == {"python", "torch", "transformers", "moetor"}
    assert record["hardware"]["threads"] == 1
    assert record["settings"]["tokens"] == [1, 5]
    assert record["ceilings"]["used"]["flops_dtype"] == "float32"
    assert [row["tokens"] for row in record["rows"]] == [1, 5]
    for row in record["rows"]:
        assert set(row) == ROW
        assert row["kernel"] == "torch"
        assert row["max_error"] < 1e-5
        # 1536 weights of 4 bytes an expert; the made-up ceilings are 1e9 bytes/s and 2e9 flop/s.
        assert row["read_bytes"] == row["active_experts"] * 1536 * 4
        assert row["flops"] == 2 * row["tokens"] * 2 * 1536
        expected = max(row["read_bytes"] / 1e9, row["flops"] / 2e9) * 1e6
        assert row["floor_us"] == pytest.approx(expected)
        names = [found["name"] for found in row["implementations"]]
        assert names == ["torch", "eager", "grouped_mm", "batched_mm"]
        for found in row["implementations"]:
            assert set(found) == IMPLEMENTATION
            assert found["samples"] >= 5
            assert found["p10_us"] <= found["median_us"] <= found["p90_us"]
            assert found["share_of_floor"] == pytest.approx(row["floor_us"] / found["median_us"])
        assert row["implementations"][0]["times_ours"] == 1


@pytest.mark.usefixtures("quick")
def test_quantised_weights_beside_their_originals(tmp_path: Path) -> None:
    flags = ("--tokens", "3", "--kernel", "torch", "--peers", "eager")
    record = _record(tmp_path, *flags, "--quantization", "int8,int4")
    (row,) = record["rows"]
    found = {one["name"]: one for one in row["implementations"]}
    assert list(found) == ["torch", "torch int8", "torch int4", "eager"]
    # 32 rows of 32 weights and 32 of 16, which int4 pads to its group of 32; a scale a row.
    bytes_of = {"torch int8": 1536 + 4 * 64, "torch int4": 64 * 16 + 2 * 64}
    for name, size in bytes_of.items():
        assert found[name]["read_bytes"] == pytest.approx(row["active_experts"] * size)
        expected = max(found[name]["read_bytes"] / 1e9, row["flops"] / 2e9) * 1e6
        assert found[name]["floor_us"] == pytest.approx(expected)
    assert record["settings"]["quantizations"] == ["int8", "int4"]


@pytest.mark.usefixtures("quick")
def test_wrong_quantised_results_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quantized.QuantizedSets.run
    monkeypatch.setattr(quantized.QuantizedSets, "run", lambda *args: 1.1 * run(*args))
    record = _record(tmp_path, "--tokens", "1", "--kernel", "torch", "--quantization", "int8")
    assert "torch int8" not in [one["name"] for one in record["rows"][0]["implementations"]]
    (reason,) = [one["reason"] for one in record["skipped"] if one["name"] == "torch int8"]
    assert reason.startswith("computes something else")


@pytest.mark.usefixtures("quick")
def test_the_table_is_plain_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--tokens", "1", "--peers", "eager"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["shape", "T", "kernel", "us"]
    assert "vs eager" in lines[1]
    assert lines[2].startswith("4,2,32,16")
    assert any(line.startswith("ceilings: read 1 GB/s (made up)") for line in lines)
    assert any("used: float32" in line for line in lines)


@pytest.mark.usefixtures("quick")
def test_a_peer_that_copies_too_much_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "_CPU_COPY_BYTES", 1000)
    record = _record(tmp_path, "--tokens", "1")
    (skipped,) = record["skipped"]
    assert (skipped["shape"], skipped["tokens"], skipped["name"]) == ("4,2,32,16", 1, "batched_mm")
    assert "copies the weights of 2 experts" in skipped["reason"]
    assert "batched_mm left out: copies the weights" in capsys.readouterr().out
    names = [found["name"] for found in record["rows"][0]["implementations"]]
    assert "batched_mm" not in names


@pytest.mark.usefixtures("quick")
def test_a_slow_peer_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "_CALL_LIMIT_SECONDS", 0.0)
    record = _record(tmp_path, "--tokens", "1", "--peers", "eager")
    assert "s a call" in record["skipped"][0]["reason"]


@pytest.mark.usefixtures("quick")
def test_without_peers(tmp_path: Path) -> None:
    record = _record(tmp_path, "--tokens", "2", "--peers", "none")
    assert len(record["rows"][0]["implementations"]) == 1
    assert record["skipped"] == []


@pytest.mark.usefixtures("quick")
def test_the_plot_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    assert main([*TINY, "--tokens", "1,2", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.usefixtures("quick")
def test_an_earlier_run_is_drawn_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "again.png"
    _record(tmp_path, "--tokens", "1,2", "--plot", str(tmp_path / "first.png"))
    plot.main([str(tmp_path / "out.json"), str(path)])
    assert path.read_bytes() == (tmp_path / "first.png").read_bytes()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("uses", "kept"), [([0.0], 0.0), ([0.5, 0.01], 0.01), ([0.5, 0.3, 0.4], 0.3)]
)
def test_a_disturbed_row_is_measured_again(
    uses: list[float],
    kept: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = iter(uses)

    class Use:
        def share(self) -> float:
            return next(left)

    monkeypatch.setattr(case, "OtherUse", Use)
    record = _record(tmp_path, "--tokens", "1", "--peers", "none")
    assert record["rows"][0]["other_use"] == kept
    assert next(left, None) is None
    assert ("disturbed" in capsys.readouterr().out) == (kept > 0.05)


@pytest.mark.usefixtures("quick")
def test_a_wrong_kernel_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(case.TOLERANCES, torch.float32, 0.0)
    path = tmp_path / "out.json"
    flags = ["--tokens", "3", "--kernel", "torch", "--json", str(path)]
    assert main([*TINY, *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "4,2,32,16, T=3: kernel 'torch' is wrong" in err
    record = json.loads(path.read_text())
    assert record["rows"] == []
    assert len(record["failures"]) == 1


@pytest.mark.usefixtures("quick")
def test_a_failed_row_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = case.Case._ours

    def ours(self: case.Case, step: Step) -> torch.Tensor:
        if self.tokens == 2:
            raise RuntimeError("the compiler gave up\nwith a page of detail")
        return real(self, step)

    monkeypatch.setattr(case.Case, "_ours", ours)
    path = tmp_path / "out.json"
    flags = ["--tokens", "1,2,3", "--peers", "none", "--json", str(path)]
    assert main([*TINY, *flags]) == 1
    record = json.loads(path.read_text())
    assert [row["tokens"] for row in record["rows"]] == [1, 3]
    assert record["failures"] == ["4,2,32,16, T=2: the compiler gave up"]
    assert "the compiler gave up" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_no_row_is_begun_after_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = iter([0.0, 1.0, 1.0, 11.0, 11.0])
    monkeypatch.setattr(layer, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    record = _record(tmp_path, "--tokens", "1,2,3", "--peers", "none", "--seconds", "10")
    assert [row["tokens"] for row in record["rows"]] == [1]
    assert [row["tokens"] for row in record["unmeasured"]] == [2, 3]
    assert "--seconds 10 were over: 4,2,32,16 T=2, 4,2,32,16 T=3" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_what_was_measured_is_kept_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    request = LayerBenchRequest(
        shapes=parse_shapes(["4,2,32,16"]),
        tokens=(1, 2),
        dtype=torch.float32,
        device="cpu",
        threads=1,
        kernel="torch",
        peers=(),
        routing="uniform",
        seed=0,
    )
    kept: list[int] = []
    layer.bench_layers(request, keep=lambda report: kept.append(len(report.times)))
    assert kept == [1, 2]


def _refused(capsys: pytest.CaptureFixture[str], status: int, *flags: str) -> str:
    assert main(["bench", "layer", *flags]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--shape", "gpt"], "qwen3-30b-a3b"),
        (["--shape", "4,8,32,16"], "top_k=8"),
        (["--tokens", "0"], "--tokens 0"),
        (["--tokens", "1,many"], "many"),
        (["--kernel", "fastest"], "auto, native"),
        (["--peers", "sglang"], "eager, grouped_mm, batched_mm, vllm, dense"),
        (["--variants", "plans"], "device cuda"),
        (["--quantization", "runes"], "mxfp4"),
        (["--variants", "all"], "small, large, plans, routing"),
        (["--seconds", "0"], "--seconds 0"),
        (["--peers", "none,eager"], "none"),
        (["--dtype", "int8"], "bfloat16"),
        (["--device", "tpu"], "cuda"),
        (["--threads", "0"], "--threads 0"),
        (["--routing", "random"], "zipf"),
        (["--plot", "out.svg"], "PNG"),
        (["--json", "no/such/folder/out.json"], "no folder"),
        (["--json", "."], "folder"),
    ],
)
def test_bad_usage(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in _refused(capsys, 2, *flags)


def test_an_unknown_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "everything"]) == 2
    assert "layer" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no NVIDIA GPU" in _refused(capsys, 1, "--device", "cuda")


def test_not_enough_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layer, "available_memory", lambda device: 10**9)
    text = _refused(capsys, 1, "--shape", "mixtral-8x7b", "--kernel", "torch")
    assert "2.82 GB" in text
    assert "smaller shape or dtype" in text


def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else real(name, *rest),
    )
    assert "moetor[plot]" in _refused(capsys, 1, "--plot", "out.png")
