"""The choice of path and tiles for the Triton kernels; needs neither Triton nor a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from moetor.config import Activation, ExpertsConfig
from moetor.errors import InputError
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.triton.choose import (
    Device,
    LargePlan,
    large_plan,
    next_power_of_2,
    small_form,
    small_plan,
    tile_rows,
    tma_allowed,
    use_small,
)
from moetor.kernels.triton.fused import TritonKernel
from moetor.kernels.triton.large_kernel import TritonLargeKernel
from moetor.kernels.triton.small import TritonSmallKernel

KB = 1024
DEVICES = [
    Device(sms=108, shared=163 * KB, capability=(8, 0)),
    Device(sms=82, shared=99 * KB, capability=(8, 6)),
    Device(sms=128, shared=99 * KB, capability=(8, 9)),
    Device(sms=132, shared=227 * KB, capability=(9, 0), roles=True),
    Device(sms=148, shared=227 * KB, capability=(10, 0)),
    Device(sms=170, shared=99 * KB, capability=(12, 0)),
]
# (E, K, H, I)
SHAPES = [
    (128, 8, 2048, 768),
    (8, 2, 4096, 14336),
    (64, 8, 2048, 1024),
    (32, 4, 2880, 2880),
    (32, 8, 7168, 2048),
    (512, 10, 2048, 512),
    (256, 8, 7168, 2048),
    (16, 1, 5120, 8192),
    (1, 1, 1, 1),
    (3, 3, 13, 7),
    (4, 2, 96, 100),
    (1024, 64, 640, 48),
]
TOKENS = [None, 1, 2, 3, 4, 7, 16, 64, 100, 256, 1024, 4096, 16384, 100_000]
FORMS = [
    {},
    {"gated": False},
    {"interleaved": True},
    {"transposed": True},
    {"interleaved": True, "transposed": True},
    {"gated": False, "transposed": True},
]


def configs() -> list[tuple[int, ExpertsConfig]]:
    return [
        (
            top_k,
            ExpertsConfig(num_experts=experts, hidden_size=hidden, intermediate_size=size, **form),
        )
        for experts, top_k, hidden, size in SHAPES
        for form in FORMS
    ]


def is_power_of_2(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm{d.capability[0]}{d.capability[1]}")
@pytest.mark.parametrize("itemsize", [2, 4])
def test_no_tile_exceeds_the_shared_memory(device: Device, itemsize: int) -> None:
    for top_k, config in configs():
        for tokens in TOKENS:
            plan = large_plan(config, top_k, tokens, itemsize, device)
            assert plan.up.rows == plan.down.rows  # they share a tile map
            for tile, width, first in (
                (plan.up, plan.up.columns * (2 if config.gated else 1), True),
                (plan.down, plan.down.columns, False),
            ):
                needed = tile.shared_bytes(width=width, itemsize=itemsize, first=first)
                assert needed <= device.shared
                for size in (tile.rows, tile.columns, tile.depth):
                    assert is_power_of_2(size)
                    assert size >= 16  # what a tensor core takes
                assert tile.stages >= 1
                assert tile.warps in (4, 8)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm{d.capability[0]}{d.capability[1]}")
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_small_path_keeps_its_accumulators_in_registers(device: Device, itemsize: int) -> None:
    for top_k, config in configs():
        plan = small_plan(config, top_k, itemsize, device)
        operands = 2 if config.gated else 1
        up = operands * plan.up.rows * plan.up.depth
        assert (plan.parts > 0) == config.transposed
        assert plan.pdl == (device.capability >= (9, 0))
        side_by_side = 1 if plan.parts else next_power_of_2(top_k)
        down = side_by_side * plan.down.rows * plan.down.depth
        for tile, elements in ((plan.up, up), (plan.down, down)):
            assert is_power_of_2(tile.rows)
            assert is_power_of_2(tile.depth)
            assert elements <= 128 * 32 * tile.warps, (config, top_k, tile)


def test_a_plan_for_any_number_of_tokens_is_one_plan() -> None:
    for top_k, config in configs():
        plan: LargePlan = large_plan(config, top_k, None, 2, DEVICES[3])
        assert plan == large_plan(config, top_k, None, 2, DEVICES[3])


def test_row_tiles_grow_with_the_rows_of_an_expert() -> None:
    config = ExpertsConfig(num_experts=128, hidden_size=2048, intermediate_size=768)
    rows = [tile_rows(config, 8, tokens) for tokens in (1, 64, 256, 512, 1024, 4096)]
    assert rows == [16, 16, 32, 64, 128, 128]


def test_first_products_walk_where_experts_are_wide_and_have_many_rows() -> None:
    wide = ExpertsConfig(num_experts=8, hidden_size=4096, intermediate_size=14336)
    narrow = ExpertsConfig(num_experts=8, hidden_size=4096, intermediate_size=1024)
    # Gate and up columns of one tile lie apart in each row of the storage.
    apart = replace(wide, transposed=True)
    for config, tokens, walks in (
        (wide, 1024, False), (wide, 2048, True), (narrow, 16384, False), (apart, 16384, False),
    ):  # fmt: skip
        plan = large_plan(config, 2, tokens, 2, DEVICES[3])
        assert (plan.up.persistent > 0) == walks
        assert plan.up.halves != walks
        assert plan.down.persistent > 0
        assert plan.down.halves == plan.down.roles


def test_warps_have_roles_where_the_depth_is_short_and_experts_fill_a_tile() -> None:
    fine = ExpertsConfig(num_experts=64, hidden_size=2048, intermediate_size=1024)
    others = [
        replace(fine, intermediate_size=1536),
        replace(fine, transposed=True),
        replace(fine, has_bias=True),
        replace(fine, hidden_size=128),  # a tile has 256 columns
    ]
    assert large_plan(fine, 8, 1024, 2, DEVICES[3]).down.roles
    assert not large_plan(fine, 8, 1023, 2, DEVICES[3]).down.roles
    assert not large_plan(fine, 8, None, 2, DEVICES[3]).down.roles
    assert not large_plan(fine, 8, 16384, 4, DEVICES[3]).down.roles
    for config in others:
        assert not large_plan(config, 8, 16384, 2, DEVICES[3]).down.roles
    for device in (*DEVICES[:3], *DEVICES[4:], replace(DEVICES[3], roles=False)):
        assert not large_plan(fine, 8, 16384, 2, device).down.roles
    tile = large_plan(fine, 8, 1024, 2, DEVICES[3]).down
    plain = tile.without_roles()
    assert (plain.roles, plain.persistent, plain.halves) == (False, 0, True)
    assert plain.without_roles() is plain


def test_the_small_path_takes_few_tokens_that_share_little() -> None:
    fine = ExpertsConfig(num_experts=128, hidden_size=2048, intermediate_size=768)
    coarse = ExpertsConfig(num_experts=8, hidden_size=4096, intermediate_size=14336)
    assert use_small(fine, 8, 1, 2)
    assert use_small(fine, 8, 2, 2)
    assert not use_small(fine, 8, 64, 2)
    assert use_small(coarse, 2, 1, 2)
    assert use_small(fine, 8, 4, 2)
    assert not use_small(fine, 8, 9, 2)
    assert use_small(coarse, 2, 2, 2)
    assert not use_small(coarse, 2, 3, 2)
    assert use_small(coarse, 2, 0, 2)


def test_descriptors_need_alignment() -> None:
    tile = large_plan(
        ExpertsConfig(num_experts=8, hidden_size=256, intermediate_size=256), 2, 4096, 2, DEVICES[3]
    ).up
    good = {"contiguous": True, "address": 256, "inner": 256, "depth": 256, "itemsize": 2}
    assert tma_allowed(tile, transposed=False, **good)
    for change in ({"contiguous": False}, {"address": 8}, {"inner": 257}):
        assert not tma_allowed(tile, transposed=False, **(good | change))
    uneven = good | {"depth": 250}
    assert tma_allowed(tile, transposed=False, **uneven)
    assert not tma_allowed(tile, transposed=True, **uneven)


# --- what the kernels refuse ---------------------------------------------------------------------

KERNELS = [TritonKernel(), TritonSmallKernel(), TritonLargeKernel()]
CONFIG = ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=8)
QUERY = KernelQuery(device="cuda", dtype=torch.bfloat16, experts=CONFIG, top_k=2)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("query", "words"),
    [
        (replace(QUERY, device="cpu"), "NVIDIA"),
        (replace(QUERY, dtype=torch.float64), "float64"),
        (replace(QUERY, weight_format="int4"), "int4"),
        (replace(QUERY, top_k=65), "64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_with_a_reason(kernel: TritonKernel, query: KernelQuery, words: str) -> None:
    reason = kernel.refusal(query)
    assert reason is not None
    assert words in reason


def test_the_small_path_leaves_some_forms_to_the_large_one() -> None:
    for config, words in (
        (replace(CONFIG, post_norm_eps=1e-6), "norm"),
        (replace(CONFIG, activation=Activation(function=abs)), "abs"),
    ):
        assert words in str(small_form(config))
        assert not use_small(config, 2, 1, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_refuses_where_there_is_no_gpu(kernel: TritonKernel) -> None:
    assert kernel.refusal(QUERY) is not None


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("tokens", [1, 50])
def test_refuses_cpu_tensors_before_a_launch(kernel: TritonKernel, tokens: int) -> None:
    weights = ExpertWeights(torch.zeros(CONFIG.gate_up_shape), torch.zeros(CONFIG.down_shape))
    with pytest.raises(InputError, match="CUDA"):
        kernel(
            torch.zeros(tokens, 8),
            torch.ones(tokens, 2),
            torch.zeros(tokens, 2, dtype=torch.int32),
            weights,
            CONFIG,
        )


def test_importing_the_kernels_does_not_import_triton() -> None:
    # torch itself may import Triton where it is installed, so what counts is our own modules.
    code = (
        "import sys, moetor.kernels.triton.fused as f; f.TritonKernel(); "
        "assert not [m for m in sys.modules if m.startswith('moetor') and m.endswith('_kernels')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("budget", [1, 10**6, 256 * 2**20, 2**31])
def test_many_tokens_share_the_padding_of_their_tiles(budget: int) -> None:
    kernel = TritonKernel()
    for top_k, config in configs():
        most = kernel.tokens_within(config, top_k, torch.bfloat16, budget)
        one = kernel.workspace_bytes_per_token(config, top_k, torch.bfloat16)
        row = 2 * (2 * config.hidden_size + config.intermediate_size)
        assert most >= max(1, budget // one)
        assert most == 1 or most * top_k * row < budget
    # 128 experts whose last tile of up to 128 rows is half empty.
    qwen = configs()[0][1]
    assert kernel.tokens_within(qwen, 8, torch.bfloat16, 256 * 2**20) > 1000
