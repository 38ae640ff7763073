"""Chosen tiles compiled for six generations of GPUs, none of which need be here: what a program
really needs of shared memory, against the bound that the choice relied on and against the GPU.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, N outputs, D depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled import Compiled, compiling_for
from interpreted import needs_triton
from kernels.test_triton_choose import DEVICES
from moetor.config import Activation, ExpertsConfig, RouterConfig
from moetor.kernels.base import ExpertWeights
from moetor.kernels.dense import NewHeads, Norm, RotaryForm
from moetor.kernels.formats import (
    ActivationFormat,
    QuantizedExpertWeights,
    QuantizedMatrix,
    find_format,
)
from moetor.kernels.triton import attention, choose, choose_quantized, support
from moetor.kernels.triton.choose_attention import attention_plan
from moetor.kernels.triton.choose_small_quantized import quantized_small_plan
from moetor.kernels.triton.large import run_large
from moetor.kernels.triton.large_quantized import run_large_quantized
from moetor.kernels.triton.routing import run_route
from moetor.kernels.triton.small import run_small
from moetor.kernels.triton.small_quantized import run_small_quantized

pytestmark = needs_triton
BY_CAPABILITY = {
    device.capability: replace(device, roles=device.roles and support.have_roles())
    for device in DEVICES
}
COARSE, TRANSPOSED, ODD = (8, 2, 4096, 14336), (32, 4, 2880, 2880), (1024, 8, 1000, 333)
UNGATED: dict[str, Any] = {"gated": False, "activation": Activation(name="relu2")}
STORED: dict[str, Any] = {"interleaved": True, "transposed": True, "has_bias": True}


def meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def inputs(tokens: int, top_k: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        meta(tokens, hidden, dtype=dtype),
        meta(tokens, top_k, dtype=torch.float32),
        meta(tokens, top_k, dtype=torch.int32),
    )


def check(made: list[Compiled], device: choose.Device, bounds: dict[str, int]) -> None:
    for kernel in made:
        assert kernel.shared <= device.shared, kernel.name
        product = next((name for name in ("up", "down") if name in kernel.name), None)
        if product in bounds:
            assert kernel.shared <= bounds[product], kernel.name


def quantized(
    config: ExpertsConfig, name: str, activations: ActivationFormat
) -> QuantizedExpertWeights:
    experts, kind = config.num_experts, find_format(name)

    def matrix(rows: int, depth: int) -> QuantizedMatrix:
        scales = meta(experts, *kind.scale_shape(rows, depth), dtype=kind.scale_dtypes[0])
        return QuantizedMatrix(
            format=kind,
            depth=depth,
            values=meta(experts, *kind.value_shape(rows, depth), dtype=kind.value_dtype),
            scales=scales,
            zero_points=scales if kind.zero_points else None,
        )

    return QuantizedExpertWeights(
        gate_up=matrix(config.up_size, config.hidden_size),
        down=matrix(config.hidden_size, config.intermediate_size),
        activation_format=activations,
    )


@dataclass(frozen=True)
class Case:
    """A call with unquantised weights."""

    capability: tuple[int, int]
    shape: tuple[int, int, int, int]
    tokens: int
    form: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16


CASES = [
    Case((9, 0), COARSE, 16384, {}),
    Case((9, 0), COARSE, 16384, UNGATED | {"has_bias": True}),
    Case((9, 0), (8, 2, 4096, 1536), 1024, STORED),
    Case((9, 0), (8, 2, 4096, 768), 1024, {"has_bias": True, "weight_on_input": True}),
    Case((9, 0), (64, 8, 2048, 1024), 4096, {}),
    Case((9, 0), ODD, 300, {}),
    Case((8, 0), COARSE, 16384, {}),
    Case((8, 6), COARSE, 16384, STORED),
    Case((8, 9), ODD, 64, STORED, torch.float32),
    Case((10, 0), TRANSPOSED, 1024, STORED),
    Case((12, 0), COARSE, 16384, UNGATED),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"sm{case.capability}-{case.shape}")
def test_the_large_path(case: Case) -> None:
    device, (experts, top_k, hidden, size) = BY_CAPABILITY[case.capability], case.shape
    config = ExpertsConfig(
        num_experts=experts, hidden_size=hidden, intermediate_size=size, **case.form
    )
    weights = ExpertWeights(
        meta(*config.gate_up_shape, dtype=case.dtype),
        meta(*config.down_shape, dtype=case.dtype),
        meta(experts, config.up_size, dtype=case.dtype) if config.has_bias else None,
        meta(experts, hidden, dtype=case.dtype) if config.has_bias else None,
    )
    bytes_each = case.dtype.itemsize
    plan = choose.large_plan(config, top_k, case.tokens, bytes_each, device)
    with compiling_for(device) as made:
        run_large(*inputs(case.tokens, top_k, hidden, case.dtype), weights, config, plan)
    width = plan.up.columns * (2 if config.gated else 1)
    bounds = {
        "up": plan.up.shared_bytes(width=width, itemsize=bytes_each, first=True),
        "down": plan.down.shared_bytes(width=plan.down.columns, itemsize=bytes_each, first=False),
    }
    names = {kernel.name for kernel in made}
    down = "down_by_roles" if plan.down.roles else "large_down"
    assert {down, "sum_rows"} <= names
    assert names & {"place_slots", "place_few_slots"}
    check(made, device, bounds)


@pytest.mark.parametrize(
    ("capability", "name", "activations", "tokens", "dtype"),
    [
        # Results of four bytes need twice the room to be stored.
        ((9, 0), "fp8", "fp8_token", 16384, torch.float32),
        ((9, 0), "fp8", "fp8_token", 16384, torch.bfloat16),
        ((9, 0), "fp8_block128x128", "fp8_group128", 1024, torch.bfloat16),
        ((8, 6), "int4_g32_zp", "unquantized", 256, torch.float16),
        ((12, 0), "mxfp4", "unquantized", 16, torch.bfloat16),
    ],
)
def test_the_large_path_with_quantised_weights(
    capability: tuple[int, int],
    name: str,
    activations: ActivationFormat,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    device, kind = BY_CAPABILITY[capability], find_format(name)
    experts, top_k, hidden, size = COARSE
    config = ExpertsConfig(num_experts=experts, hidden_size=hidden, intermediate_size=size)
    weights = quantized(config, name, activations)
    up = choose_quantized.operands(kind, activations, dtype.itemsize, gated=True)
    down = choose_quantized.operands(kind, activations, dtype.itemsize, gated=False)
    plan = choose_quantized.quantized_large_plan(config, top_k, tokens, up, down, device)
    with compiling_for(device) as made:
        run_large_quantized(*inputs(tokens, top_k, hidden, dtype), weights, config, plan)
    bounds = {"up": up.shared_bytes(plan.up.tile), "down": down.shared_bytes(plan.down.tile)}
    assert "large_quantized_up" in {kernel.name for kernel in made}
    check(made, device, bounds)


@pytest.mark.parametrize(
    ("capability", "name", "activations", "tokens", "dtype"),
    [
        ((9, 0), "int4_g32", "unquantized", 1, torch.bfloat16),
        ((9, 0), "fp8", "fp8_token", 16, torch.bfloat16),
        ((8, 6), "mxfp4", "unquantized", 16, torch.bfloat16),
        ((10, 0), "int4_g128_zp", "unquantized", 4, torch.float16),
    ],
)
def test_few_tokens_with_quantised_weights(
    capability: tuple[int, int],
    name: str,
    activations: ActivationFormat,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    device, kind = BY_CAPABILITY[capability], find_format(name)
    experts, top_k, hidden, size = COARSE
    config = ExpertsConfig(num_experts=experts, hidden_size=hidden, intermediate_size=size)
    plan = quantized_small_plan(config, top_k, tokens, (kind, kind), activations, device, dtype)
    weights = quantized(config, name, activations)
    with compiling_for(device) as made:
        run_small_quantized(*inputs(tokens, top_k, hidden, dtype), weights, config, plan)
    bits = 4 if kind.packed else 8
    bounds = {
        "up": plan.up.shared_bytes(code_bits=bits),
        "down": plan.down.shared_bytes(code_bits=bits),
    }
    last = "quantized_down_sum" if plan.summed else "quantized_sum"
    assert {"quantized_up", last} <= {kernel.name for kernel in made}
    check(made, device, bounds)


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
def test_routing_and_few_tokens(capability: tuple[int, int]) -> None:
    device, (experts, top_k, hidden, size) = BY_CAPABILITY[capability], ODD
    config = ExpertsConfig(num_experts=experts, hidden_size=hidden, intermediate_size=size)
    dtype = torch.bfloat16
    weights = ExpertWeights(
        meta(*config.gate_up_shape, dtype=dtype), meta(*config.down_shape, dtype=dtype)
    )
    plan = choose.small_plan(config, top_k, 2, device)
    router = RouterConfig(
        num_experts=experts, top_k=64, scoring="sigmoid", num_groups=8, top_k_groups=4
    )
    with compiling_for(device) as made:
        run_small(*inputs(2, top_k, hidden, dtype), weights, config, plan)
        run_route(meta(3, experts, dtype=dtype), router, None, dtype)
    assert {kernel.name for kernel in made} == {"small_up", "small_down", "route_tokens"}
    check(made, device, {})


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
@pytest.mark.parametrize(("width", "value_width", "new"), [(128, 128, 512), (576, 512, 1)])
def test_attention(capability: tuple[int, int], width: int, value_width: int, new: int) -> None:
    device, dtype = BY_CAPABILITY[capability], torch.bfloat16
    plan = attention_plan(
        sequences=4, kv_heads=1, group=16, width=width, value_width=value_width, max_keys=4096,
        max_query_len=new, itemsize=2, sms=device.sms, shared=device.shared,
        overlap=capability >= (9, 0),
    )  # fmt: skip
    with compiling_for(device) as made:
        attention.run_attention(
            meta(4 * new, 16, width, dtype=dtype),
            meta(300, 16, 1, width, dtype=dtype),
            meta(300, 16, 1, value_width, dtype=dtype),
            meta(4, 256, dtype=torch.int32),
            meta(4, dtype=torch.int32),
            meta(5, dtype=torch.int32),
            plan,
            decode=new == 1, scale=0.1, softcap=None, window=None, chunk=None, sinks=None,
        )  # fmt: skip
    assert "attend" in {kernel.name for kernel in made}
    check(made, device, {})


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
@pytest.mark.parametrize("sequences", [1, 120])
def test_attention_that_turns(capability: tuple[int, int], sequences: int) -> None:
    device, dtype = BY_CAPABILITY[capability], torch.bfloat16
    plan = attention_plan(
        sequences=sequences, kv_heads=1, group=8, width=128, value_width=128, max_keys=4096,
        max_query_len=1, itemsize=2, sms=device.sms, shared=device.shared,
        overlap=capability >= (9, 0), turns=True,
    )  # fmt: skip
    assert plan.ahead == (sequences == 1)
    norm = Norm(meta(128, dtype=dtype), 1e-6)
    new = NewHeads(
        key=meta(sequences, 1, 128, dtype=dtype), value=meta(sequences, 1, 128, dtype=dtype),
        cos=meta(sequences, 128, dtype=dtype), sin=meta(sequences, 128, dtype=dtype),
        slots=meta(sequences, dtype=torch.int64), form=RotaryForm(width=128),
        query_norm=norm, key_norm=norm,
    )  # fmt: skip
    with compiling_for(device) as made:
        attention.run_attention(
            meta(sequences, 8, 128, dtype=dtype),
            meta(300, 16, 1, 128, dtype=dtype),
            meta(300, 16, 1, 128, dtype=dtype),
            meta(sequences, 256, dtype=torch.int32),
            meta(sequences, dtype=torch.int32),
            meta(sequences + 1, dtype=torch.int32),
            plan,
            decode=True, scale=0.1, softcap=None, window=None, chunk=None, sinks=None, new=new,
        )  # fmt: skip
    assert "attend" in {kernel.name for kernel in made}
    check(made, device, {})
