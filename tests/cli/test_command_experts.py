"""`moetor experts`: counts against the router's own choices, table, JSON, picture, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetor.cli.expert_map import draw_expert_map
from moetor.cli.main import main
from moetor.demo import heldout_text, model_path
from moetor.huggingface.expert_load import ExpertLoad, LayerLoad

TEXT = "To be, or not to be, that is the question."


def test_counts_are_those_of_the_original_routers(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["experts", "--prompt", TEXT, "--json", "--dtype", "float32"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(model_path())(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    assert report["tokens"] == ids.numel()
    for line, layer in zip(report["layers"], logits, strict=True):
        chosen = layer.softmax(-1).topk(4).indices.flatten()
        assert line["counts"] == torch.bincount(chosen, minlength=16).tolist()
        assert line["dropped"] == 0


def test_windows_do_not_change_the_number_of_slots(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "--max-tokens", "1100", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 1100
    assert all(sum(layer["counts"]) == 4400 for layer in report["layers"])


@pytest.mark.parametrize(
    ("counts", "share", "balancedness", "entropy", "unused"),
    [
        ((5, 5, 5, 5), 0.25, 1.0, 1.0, 0),
        ((8, 0, 0, 0), 1.0, 0.25, 0.0, 3),
        ((6, 2, 0, 0), 0.75, 1 / 3, 0.8112781 / 2, 2),
        ((0, 0), 0.0, 1.0, 1.0, 2),
        ((3,), 1.0, 1.0, 1.0, 0),
    ],
)
def test_figures_of_a_layer(
    counts: tuple[int, ...], share: float, balancedness: float, entropy: float, unused: int
) -> None:
    load = LayerLoad(layer="mlp", counts=counts, dropped=0)
    assert load.busiest_share == pytest.approx(share)
    assert load.balancedness == pytest.approx(balancedness)
    assert load.entropy == pytest.approx(entropy)
    assert load.unused == unused
    assert math.isfinite(load.entropy)


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book, picture = tmp_path / "book.txt", tmp_path / "experts.png"
    book.write_text(heldout_text()[:3000], encoding="utf-8")
    assert main(["experts", "--file", str(book), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "mlp" in line] == [
        f"model.layers.{layer}.mlp" for layer in range(4)
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_layers_with_different_numbers_of_experts(tmp_path: Path) -> None:
    layers = (
        LayerLoad(layer="a", counts=(3, 1), dropped=2),
        LayerLoad(layer="b", counts=(1, 2, 3, 4, 5, 0), dropped=0),
    )
    draw_expert_map(ExpertLoad(tokens=3, layers=layers), "two", tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--file", "b"], "--prompt and --file both name a text"),
        (["--file", "no/such/file"], "--file no/such/file cannot be read"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--prompt", ""], "the text has no tokens"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
