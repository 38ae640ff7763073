"""Quantised weights on the large path of the Triton kernels, under Triton's interpreter, as in
`test_triton_interpreter.py`: this file is a script, too."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve()
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))

from interpreted import (  # noqa: E402
    allow_loop_bounds,
    allow_small_floats,
    needs_triton,
    run_interpreted,
)
from kernels.quantized_cases import (  # noqa: E402
    FORMATS,
    ROUNDED,
    dense,
    random_weights,
)
from layer.expert_cases import EDGES, FORMS, Drawn, ExpertsCase, draw  # noqa: E402
from moetor.config import ExpertsConfig  # noqa: E402
from moetor.kernels.dequantize import round_activations  # noqa: E402
from moetor.kernels.formats import (  # noqa: E402
    ActivationFormat,
    QuantizedExpertWeights,
    canonical,
)
from moetor.kernels.reference import ReferenceKernel  # noqa: E402
from moetor.kernels.triton import choose, choose_quantized  # noqa: E402
from oracle import Tensors, assert_close  # noqa: E402

BY_ID = {case.id: case for case in FORMS + EDGES}
SOME = ("silu", "function", "bias", "ungated", "post_norm", "weight_on_input_bias", "gpt_oss",
        "one_of_everything", "odd_sizes", "dropped_weight_on_input", "no_token")  # fmt: skip


@needs_triton
@pytest.mark.parametrize("part", ["rows", "codes", "numbers", "sizes"])
def test_under_the_interpreter(part: str, seed: int) -> None:
    run_interpreted(HERE, part, str(seed))


# --- what runs in that process -------------------------------------------------------------------


def _plan(rng: torch.Generator, **tile: Any) -> choose_quantized.QuantizedLargePlan:
    """Small tiles, of which each product swaps its sides or not."""
    plain = choose.Tile(**({"rows": 16, "columns": 16, "depth": 32, "group": 2} | tile),
                        warps=4, stages=1)  # fmt: skip
    up, down = (
        choose_quantized.QuantizedTile(
            tile=plain,
            swap=bool(torch.randint(2, (), generator=rng)),
        )
        for _ in range(2)
    )
    return choose_quantized.QuantizedLargePlan(up=up, down=down)


def _run(drawn: Drawn, weights: QuantizedExpertWeights, config: ExpertsConfig, plan: Any) -> Tensor:
    from moetor.kernels.triton.large_quantized import run_large_quantized

    inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids)
    return run_large_quantized(*inputs, weights, config, plan)


def _run_dequantized(
    drawn: Drawn, weights: QuantizedExpertWeights, config: ExpertsConfig
) -> Tensor:
    from moetor.kernels.triton.large_quantized import run_dequantized

    tile = choose.Tile(rows=16, columns=16, depth=16, warps=4, stages=1, group=2)
    inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids)
    return run_dequantized(*inputs, weights, config, choose.LargePlan(up=tile, down=tile))


def _check(
    case: ExpertsCase,
    name: str,
    activations: ActivationFormat,
    rng: torch.Generator,
    **tile: Any,
) -> None:
    """Against the reference in float64, which rounds activations by the formats' definition."""
    case = replace(case, config=canonical(case.config))
    drawn = draw(case, torch.float32, rng)
    weights = random_weights(case.config, name, activations, rng)
    plan = _plan(rng, **tile)
    out = _run(drawn, weights, case.config, plan)
    assert out.dtype == drawn.hidden.dtype
    inputs = (drawn.hidden.double(), drawn.topk_weights, drawn.topk_ids)
    expected = ReferenceKernel()(*inputs, weights, case.config)
    # Where a value lies between two codes as near as float32 can tell, a row may take the other.
    errors = (out.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    what = f"{case.id} {name} {activations} {plan}: {errors}"
    assert out.isfinite().all(), what
    assert (errors < 0.1).all(), what
    assert errors.numel() == 0 or errors.median() < 2e-5, what


def _check_rows(rng: torch.Generator) -> None:
    """Codes times scales are what `round_activations` makes of the rows."""
    from moetor.kernels.triton.quantize_rows import quantize
    from moetor.kernels.triton.sort import make_row_tiles

    for tokens, top_k, experts, width in ((5, 2, 4, 12), (1, 1, 1, 1), (3, 2, 4, 300)):
        ids = torch.stack([torch.randperm(experts, generator=rng)[:top_k] for _ in range(tokens)])
        ids[0, 0] = experts
        made = make_row_tiles(ids.int(), experts, 16, pdl=False)
        x = torch.randn(tokens, width, generator=rng)
        x *= 10.0 ** torch.randint(-3, 3, (tokens, 1), generator=rng)
        x[-1, : width // 2] = 0
        slot_weights = torch.rand(tokens, top_k, generator=rng) + 0.2
        steps = 0.01 + 0.02 * torch.rand(experts, generator=rng)
        for _, activations in ROUNDED:
            for weighted in (False, True):
                rows = quantize(
                    x, activations, made, tile_rows=16, tokens=True,
                    input_scales=steps if activations == "fp8_static" else None,
                    weights_TK=slot_weights if weighted else None, pdl=False,
                )  # fmt: skip
                numbers = rows.values.float()
                if activations != "mxfp8":
                    run = 128 if activations == "fp8_group128" else width
                    numbers *= rows.scales.T.repeat_interleave(run, 1)[:, :width]
                for token, slot in torch.nonzero(ids != experts).tolist():
                    source = x[token : token + 1] * (slot_weights[token, slot] if weighted else 1)
                    wanted = round_activations(source, activations, steps[ids[token, slot]])[0]
                    row = token if rows.by_token else int(made.place[token, slot])
                    torch.testing.assert_close(numbers[row], wanted, rtol=1e-6, atol=1e-30)


def _check_tiny_rows() -> None:
    """Values whose scale is below the normal numbers, beside zeros: near to what they were."""
    from moetor.kernels.triton.quantize_rows import quantize
    from moetor.kernels.triton.sort import make_row_tiles

    made = make_row_tiles(torch.zeros(4, 1, dtype=torch.int32), 1, 16, pdl=False)
    x = torch.tensor([1e-30, 1e-36, 1e-38, 1e-40])[:, None] * torch.tensor([1.0, 0.0, -0.5, 0.0])
    for activations in ("fp8_token", "fp8_group128", "int8_token", "mxfp8"):
        rows = quantize(
            x, activations, made, tile_rows=16, tokens=True, input_scales=None, weights_TK=None,
            pdl=False,
        )  # fmt: skip
        numbers = rows.values.float()
        if activations != "mxfp8":
            numbers *= rows.scales.T
        torch.testing.assert_close(numbers, x, rtol=0.07, atol=1e-38)


def _check_numbers(rng: torch.Generator) -> None:
    """Weights in every format, activations unquantised, against the oracle."""
    for dtype in (torch.float32, torch.float16):
        for name in FORMATS:
            ids = ("bias", "odd_sizes") if dtype == torch.float32 else ("bias",)
            for case in (BY_ID[id] for id in ids):
                drawn = draw(case, dtype, rng)
                weights = random_weights(case.config, name, "unquantized", rng, dtype=dtype)
                outs = (
                    _run(drawn, weights, case.config, _plan(rng)),
                    _run_dequantized(drawn, weights, case.config),
                )
                numbers = Tensors(
                    gate_up=dense(weights.gate_up),
                    down=dense(weights.down),
                    gate_up_bias=weights.gate_up_bias,
                    down_bias=weights.down_bias,
                )
                expected = replace(drawn, tensors=numbers).expected(case.config)
                for what, out in zip(("in the loop", "before"), outs, strict=True):
                    try:
                        assert_close(out, expected)
                    except AssertionError as error:
                        told = f"{case.id} {name} {dtype}, numbers made {what}: {error}"
                        raise AssertionError(told) from error


def _check_sizes(rng: torch.Generator) -> None:
    """More than one tile and group in every direction, and ends within them."""
    config = ExpertsConfig(num_experts=2, hidden_size=144, intermediate_size=136)
    case = ExpertsCase(id="large", config=config, tokens=11, top_k=1)
    for columns, depth in ((128, 128), (32, 64)):
        for name, activations in ROUNDED:
            _check(case, name, activations, rng, columns=columns, depth=depth)
    for name in ("int8_g16", "int4_g128", "int4_g32_zp", "fp8_block128x128", "mxfp4", "nvfp4"):
        _check(case, name, "unquantized", rng, columns=64, depth=64)


def _main(part: str, seed: int) -> None:
    allow_loop_bounds()
    allow_small_floats()
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    rng = torch.Generator().manual_seed(seed)
    if part == "rows":
        _check_rows(rng)
        _check_tiny_rows()
    elif part == "codes":
        for id in SOME:
            for name, activations in ROUNDED if id in ("silu", "bias") else ROUNDED[:2]:
                _check(BY_ID[id], name, activations, rng)
    elif part == "numbers":
        _check_numbers(rng)
    else:
        _check_sizes(rng)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
