"""Quantised weights on the Triton kernels: which path and tiles are chosen, and what is
refused; needs neither Triton nor a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.quantized_cases import FORMATS, ROUNDED, random_weights
from kernels.test_triton_choose import DEVICES, SHAPES, TOKENS
from kernels.test_triton_refusals import Machine, pretend
from layer.expert_cases import ExpertsCase, draw
from moetor.config import Activation, ExpertsConfig
from moetor.errors import InputError
from moetor.kernels.base import KernelQuery
from moetor.kernels.formats import ActivationFormat, find_format
from moetor.kernels.select import select_kernel
from moetor.kernels.triton import choose, choose_quantized
from moetor.kernels.triton.choose_small_quantized import use_small_quantized
from moetor.kernels.triton.fused import TritonKernel
from moetor.kernels.triton.large_kernel import TritonLargeKernel
from moetor.kernels.triton.quantized_support import check_quantized_inputs
from moetor.quant_config import PRESETS


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm{d.capability[0]}{d.capability[1]}")
@pytest.mark.parametrize("itemsize", [2, 4])
def test_no_tile_exceeds_the_shared_memory(device: choose.Device, itemsize: int) -> None:
    pairs = [(name, "unquantized") for name in FORMATS] + list(ROUNDED)
    for experts, top_k, hidden, size in SHAPES:
        for gated, (name, activations), tokens in itertools.product((True, False), pairs, TOKENS):
            config = ExpertsConfig(
                num_experts=experts, hidden_size=hidden, intermediate_size=size, gated=gated
            )
            kind = find_format(name)
            up = choose_quantized.operands(kind, activations, itemsize, gated=gated)
            down = choose_quantized.operands(kind, activations, itemsize, gated=False)
            plan = choose_quantized.quantized_large_plan(config, top_k, tokens, up, down, device)
            assert plan.up.tile.rows == plan.down.tile.rows  # they share a tile map
            for reads, chosen in ((up, plan.up), (down, plan.down)):
                tile = chosen.tile
                assert reads.shared_bytes(tile) <= device.shared
                assert all(
                    value >= least and value & (value - 1) == 0
                    for value, least in ((tile.rows, 16), (tile.columns, 16), (tile.depth, 32))
                )
                assert tile.stages >= 1
                assert tile.warps in (4, 8)
                # A block's sums have one scale a row; groups and tiles divide one another.
                assert reads.arithmetic != "block" or tile.depth <= 128
                assert not tile.tma or device.capability[0] == 9


def test_a_workspace_is_taken_for_many_rows_and_has_a_bound() -> None:
    def asked(
        tokens: int, hidden: int = 2048, activations: ActivationFormat = "unquantized"
    ) -> Any:
        config = ExpertsConfig(num_experts=128, hidden_size=hidden, intermediate_size=768)
        kind = find_format("mxfp8")
        up = choose_quantized.operands(kind, activations, 2, gated=True)
        down = choose_quantized.operands(kind, activations, 2, gated=False)
        return choose_quantized.use_workspace(config, 8, tokens, up, down, activations)

    assert asked(16384)
    assert not asked(256)
    assert not asked(16384, hidden=8192)
    assert not asked(16384, activations="mxfp8")


# --- what is refused -----------------------------------------------------------------------------

CONFIG = ExpertsConfig(num_experts=4, hidden_size=16, intermediate_size=8)
QUERY = KernelQuery(
    device="cuda",
    dtype=torch.bfloat16,
    experts=CONFIG,
    top_k=2,
    weight_format="fp8",
    activation_format="fp8_token",
)


def test_every_format_of_ours_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(Machine(id="hopper", words=""), monkeypatch)
    for preset in PRESETS.values():
        query = replace(
            QUERY,
            weight_format=preset.weight_format,
            activation_format=preset.activation_format,
        )
        assert select_kernel(query).kernel.name == "triton"
    mixed = replace(QUERY, weight_format="int4_g32+int8", activation_format="unquantized")
    assert select_kernel(mixed).kernel.name == "triton"


@pytest.mark.parametrize(
    ("change", "capability", "words"),
    [
        ({}, (8, 6), "fp8_w8a16"),
        ({"weight_format": "fp8_block128x128", "activation_format": "fp8_group128"}, (8, 0), "8.9"),
        # mxfp8 activations pass through fp8, whatever multiplies them afterwards.
        ({"weight_format": "mxfp8", "activation_format": "mxfp8"}, (8, 6), "8.9"),
        ({"activation_format": "int8_token"}, (9, 0), "fp8 weights with int8_token activations"),
        ({"weight_format": "fp8+int8"}, (9, 0), "int8 weights with fp8_token activations"),
        ({"weight_format": "fp8_block96x96", "activation_format": "unquantized"}, (9, 0), "96x96"),
        ({"weight_format": "runes"}, (9, 0), "runes"),
        ({"experts": replace(CONFIG, transposed=True)}, (9, 0), "canonical"),
        ({"dtype": torch.float64}, (9, 0), "float64"),
        ({"top_k": 65}, (9, 0), "64"),
        ({"device": "cpu"}, (9, 0), "NVIDIA"),
    ],
)
def test_refuses_with_a_reason(
    change: dict[str, Any],
    capability: tuple[int, int],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(Machine(id="made_up", words="", capability=capability), monkeypatch)
    for kernel in (TritonKernel(), TritonLargeKernel()):
        assert words in str(kernel.refusal(replace(QUERY, **change)))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_older_gpus_multiply_fp8_weights_with_wider_activations(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(Machine(id="ampere", words="", capability=capability), monkeypatch)
    for name in ("fp8", "fp8_block128x128", "mxfp8"):
        query = replace(QUERY, weight_format=name, activation_format="unquantized")
        assert TritonKernel().refusal(query) is None


def _call(rng: torch.Generator, name: str, activations: ActivationFormat) -> dict[str, Any]:
    case = ExpertsCase(id="call", config=replace(CONFIG, has_bias=True))
    drawn = draw(case, torch.bfloat16, rng)
    return {
        "hidden_TH": drawn.hidden,
        "topk_weights_TK": drawn.topk_weights,
        "topk_ids_TK": drawn.topk_ids,
        "weights": random_weights(case.config, name, activations, rng),
        "config": case.config,
    }


@pytest.mark.parametrize(
    ("part", "field", "change", "words"),
    [
        ("up", "values", lambda x: x.view(torch.int8), "gate_up.values is torch.int8"),
        ("up", "values", lambda x: x[:, :-1], r"\[4, 16, 16\]"),
        ("up", "values", lambda x: x.mT.contiguous().mT, "contiguous"),
        ("down", "scales", lambda x: x.double(), "down.scales is torch.float64"),
        ("down", "scales", lambda x: x[:, :3], "down.scales has shape"),
        ("down", "depth", lambda x: x + 1, "depth of 9, it must be 8"),
        ("up", "input_scales", lambda x: None, "gate_up is fp8 with fp8_static.*input_scales"),
    ],
)
def test_wrong_tensors_are_named(
    part: str, field: str, change: Any, words: str, rng: torch.Generator
) -> None:
    inputs = _call(rng, "fp8", "fp8_static")
    check_quantized_inputs(**inputs)
    weights = inputs["weights"]
    name = "gate_up" if part == "up" else "down"
    matrix = getattr(weights, name)
    wrong = replace(matrix, **{field: change(getattr(matrix, field))})
    with pytest.raises(InputError, match=words):
        check_quantized_inputs(**inputs | {"weights": replace(weights, **{name: wrong})})
    with pytest.raises(InputError, match="gate_up_bias is missing"):
        check_quantized_inputs(**inputs | {"weights": replace(weights, gate_up_bias=None)})


@pytest.mark.parametrize(
    ("name", "field"), [("int4_g32_zp", "zero_points"), ("nvfp4", "row_scales")]
)
def test_missing_scales_are_named(name: str, field: str, rng: torch.Generator) -> None:
    inputs = _call(rng, name, "unquantized")
    weights = inputs["weights"]
    wrong = replace(weights, down=replace(weights.down, **{field: None}))
    with pytest.raises(InputError, match=f"down is {name}.*{field}"):
        check_quantized_inputs(**inputs | {"weights": wrong})


def test_cpu_tensors_are_refused(rng: torch.Generator) -> None:
    inputs = _call(rng, "int8", "int8_token")
    for kernel in (TritonKernel(), TritonLargeKernel()):
        with pytest.raises(InputError, match="CUDA"):
            kernel(*inputs.values())


def test_few_tokens_take_the_small_path_where_it_is_the_faster_one() -> None:
    config = ExpertsConfig(num_experts=8, hidden_size=64, intermediate_size=64)

    def most(up: str, down: str, activations: ActivationFormat = "unquantized", **form: Any) -> int:
        formats = find_format(up), find_format(down)
        chosen = [
            tokens
            for tokens in range(100)
            if use_small_quantized(replace(config, **form), tokens, formats, activations)
        ]
        assert chosen == list(range(1, len(chosen) + 1))
        return len(chosen)

    assert most("int4_g32", "mxfp4") == 16
    assert most("int4_g32", "int8") == most("fp8", "fp8") == most("fp8", "fp8", "fp8_token") == 2
    assert most("mxfp4", "mxfp4", activation=Activation(function=torch.tanh)) == 0
