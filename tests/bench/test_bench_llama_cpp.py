"""llama.cpp as a peer: what it computes, and what a run without it says."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetor.bench import llama_cpp
from moetor.bench.floor import Work
from moetor.bench.llama_cpp import LlamaCppSets, ggml_type, label_of, llama_cpp_refusal
from moetor.bench.shapes import SHAPES, parse_shapes
from moetor.bench.weights import make_weights
from moetor.cli.main import main
from moetor.kernels.reference import ReferenceKernel

installed = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
SHAPE = parse_shapes(["8,2,64,32"])[0]
TINY = ["bench", "layer", "--shape", "8,2,64,32", "--tokens", "3", "--kernel", "torch"]


@pytest.mark.parametrize(
    ("row", "dtype", "label"),
    [
        ("native", torch.bfloat16, "llama.cpp BF16"),
        ("native", torch.float32, "llama.cpp F32"),
        ("native int8", torch.bfloat16, "llama.cpp Q8_0"),
        ("torch fp8_block", torch.bfloat16, "llama.cpp Q8_0"),
        ("native int4_g128", torch.float32, "llama.cpp Q4_0"),
        ("native mxfp4", torch.bfloat16, "llama.cpp MXFP4"),
    ],
)
def test_a_row_is_compared_at_equal_bits(row: str, dtype: torch.dtype, label: str) -> None:
    assert label_of(row, dtype) == label


def test_forms_and_sizes_that_are_left_out() -> None:
    assert llama_cpp_refusal(SHAPES["olmoe"]) is None
    assert "gated" in str(llama_cpp_refusal(SHAPES["gpt-oss-20b"]))
    odd = replace(SHAPE, experts=replace(SHAPE.experts, intermediate_size=48))
    assert "32" in str(llama_cpp_refusal(odd))


def test_refused_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        llama_cpp.importlib.util,
        "find_spec",
        lambda name: None if name == "llama_cpp" else find(name),
    )
    assert main([*TINY, "--peers", "eager,llama.cpp"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--peers llama.cpp needs llama-cpp-python, which is not installed" in line


@installed
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_graph_is_the_layer(tokens: int, dtype: torch.dtype) -> None:
    """Unquantised against the layer itself; codes against the layer of what gguf reads in them,
    and that against the layer to the codes' precision."""
    weights = make_weights(SHAPE, 2, dtype, "cpu", seed=0)
    sets = LlamaCppSets(SHAPE, weights, ("int8", "int4", "mxfp4"))
    plain = ggml_type("", dtype)
    exact = 1e-5 if dtype == torch.float32 else 1e-2
    bounds = {plain: exact, "Q8_0": 3e-2, "Q4_0": 0.3, "MXFP4": 0.4}
    assert sets.labels == tuple(f"llama.cpp {name}" for name in bounds)
    hidden = torch.randn(tokens, 64).to(dtype)
    ids = torch.rand(tokens, 8).topk(2).indices.int()
    slots = torch.rand(tokens, 2)
    for weight_set, own in enumerate(weights):
        layer_TH = ReferenceKernel()(hidden.float(), slots, ids, own, SHAPE.experts)
        for label, (name, bound) in zip(sets.labels, bounds.items(), strict=True):
            found = sets.run(label, hidden, slots, ids, weight_set).clone()
            codes_TH = sets.reference(label, hidden, slots, ids, weight_set)
            assert sets.rounds_inputs(label) == (name != plain)
            assert _error(found, codes_TH) < (exact if name == plain else 3e-2), label
            assert _error(codes_TH, layer_TH) < bound, label


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@installed
def test_its_bytes() -> None:
    sets = LlamaCppSets(SHAPE, make_weights(SHAPE, 1, torch.bfloat16, "cpu", 0), ("int4",))
    read = [sets.work(label, Work(read_bytes=64, flops=1)).read_bytes for label in sets.labels]
    assert read == [64, 18]  # 32 weights: a block of Q4_0


@installed
@pytest.mark.usefixtures("quick")
def test_rows_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    flags = ["--peers", "llama.cpp", "--quantization", "int8,int4", "--json", str(path)]
    assert main([*TINY, *flags]) == 0
    record = json.loads(path.read_text())
    (row,) = record["rows"]
    found = {one["name"]: one for one in row["implementations"]}
    peers = ["llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    assert list(found) == ["torch", "torch int8", "torch int4", *peers]
    assert {found[name]["library"] for name in peers} == {"llama_cpp_python"}
    assert "llama_cpp_python" in record["versions"]
    table = capsys.readouterr().out.splitlines()
    assert table[1].endswith("vs llama.cpp")
    for line, ours, peer in zip(table[2:5], list(found)[:3], peers, strict=True):
        ratio = found[peer]["median_us"] / found[ours]["median_us"]
        assert line.split()[-1] == f"{ratio:.2f}x"


@installed
@pytest.mark.usefixtures("quick")
def test_wrong_results_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LlamaCppSets.run
    monkeypatch.setattr(LlamaCppSets, "run", lambda *args: 1.2 * run(*args))
    path = tmp_path / "run.json"
    assert main([*TINY, "--peers", "llama.cpp", "--json", str(path)]) == 0
    (skipped,) = json.loads(path.read_text())["skipped"]
    assert skipped["name"] == "llama.cpp BF16"
    assert skipped["reason"].startswith("computes something else")
