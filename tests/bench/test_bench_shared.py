"""`moetor bench shared`: what it compares, and what it makes of the times."""

from __future__ import annotations

import pytest
import torch

from moetor.bench import shared
from moetor.bench.shared import LAYERS, SharedRow, find_layers, threshold
from moetor.bench.timing import summarize
from moetor.cli.main import main
from moetor.config import SharedExpertsOrder
from moetor.errors import InputError, UnsupportedError

TINY = shared._layer((6, 2, 32, 16), 24, gate=True)


def row(tokens: int, one: float, two: float, layer: str = "a") -> SharedRow:
    return SharedRow(
        layer=layer,
        tokens=tokens,
        one_stream=summarize([one, one]),
        two_streams=summarize([two, two]),
    )


def test_both_orders_have_one_set_of_weights() -> None:
    made = shared._make("tiny", TINY, torch.float32, 0, "cpu")
    one, two = (made[order] for order in shared.ORDERS)
    assert len(one) == len(two) == 4
    for first, second in zip(one, two, strict=True):
        pointers = [
            {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
            for layer in (first, second)
        ]
        assert pointers[0] == pointers[1]
        orders = [layer.shared.config.order for layer in (first, second) if layer.shared]
        assert orders == list(shared.ORDERS)
    assert not torch.equal(one[0].routed_experts.down_proj, one[1].routed_experts.down_proj)
    assert one[0](torch.randn(3, 32)).isfinite().all()


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "available_memory", lambda device: 1000)
    with pytest.raises(UnsupportedError, match="layer tiny: 4 sets of weights"):
        shared._make("tiny", TINY, torch.float32, 0, "cpu")


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row(1, 2, 1), row(16, 2, 1), row(64, 1, 2)], 16),
        ([row(1, 1, 2), row(16, 2, 1)], 0),
        ([row(1, 2, 1), row(1, 1, 2, "b"), row(16, 2, 1)], 0),
        ([row(16, 2, 1), row(1, 2, 1)], 16),
    ],
)
def test_the_threshold_is_where_no_layer_loses(rows: list[SharedRow], wanted: int) -> None:
    assert threshold(rows) == wanted


def test_layers_by_name() -> None:
    assert find_layers(("all",)) == LAYERS
    assert list(find_layers(("qwen2-57b-a14b",))) == ["qwen2-57b-a14b"]
    with pytest.raises(InputError, match="qwen3-next-80b-a3b"):
        find_layers(("qwen4",))
    for config in LAYERS.values():
        assert config.shared is not None
        assert config.shared.order is SharedExpertsOrder.AUTO


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "shared"]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "status", "word"),
    [
        (["--layer", "gpt"], 2, "qwen2-57b-a14b"),
        (["--tokens", "0"], 2, "--tokens 0"),
        (["--json", "no/such/x.json"], 2, "no folder"),
    ],
)
def test_bad_usage(
    flags: list[str], status: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "shared", *flags]) == status
    assert word in capsys.readouterr().err
