"""Quantised weights on the path for few tokens, under Triton's interpreter, as in
`test_triton_interpreter.py`: this file is a script, too."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

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
from kernels.quantized_cases import FORMATS, ROUNDED, random_weights  # noqa: E402
from layer.expert_cases import EDGES, FORMS, Drawn, ExpertsCase, draw  # noqa: E402
from moetor.config import ExpertsConfig  # noqa: E402
from moetor.kernels.formats import (  # noqa: E402
    ActivationFormat,
    QuantizedExpertWeights,
    canonical,
)
from moetor.kernels.reference import ReferenceKernel  # noqa: E402
from moetor.kernels.triton import choose  # noqa: E402

BY_ID = {case.id: case for case in FORMS + EDGES}
SOME = ("silu", "bias", "ungated", "post_norm", "weight_on_input_bias", "gpt_oss", "one_token",
        "expert_twice_in_a_token", "all_tokens_on_one_expert", "all_slots_dropped",
        "dropped_weight_on_input", "no_token")  # fmt: skip
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@needs_triton
@pytest.mark.parametrize("part", ["formats", "forms", "activations"])
def test_under_the_interpreter(part: str, seed: int) -> None:
    run_interpreted(HERE, part, str(seed))


# --- what runs in that process -------------------------------------------------------------------


def _run(
    drawn: Drawn, weights: QuantizedExpertWeights, config: ExpertsConfig, like: int | None = None
) -> Tensor:
    """The path with its own plan, or with the one for another number of tokens."""
    from moetor.kernels.triton.choose_small_quantized import quantized_small_plan
    from moetor.kernels.triton.small_quantized import run_small_quantized

    tokens, top_k = drawn.topk_ids.shape
    plan = quantized_small_plan(
        config,
        top_k,
        tokens if like is None else like,
        (weights.gate_up.format, weights.down.format),
        weights.activation_format,
        choose.Device(sms=132, shared=232448, capability=(8, 0)),
        drawn.hidden.dtype,
    )
    inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids)
    return run_small_quantized(*inputs, weights, config, plan)


def _errors(
    out: Tensor, drawn: Drawn, weights: QuantizedExpertWeights, config: ExpertsConfig
) -> Tensor:
    """Of each row against the reference in float64."""
    assert out.dtype == drawn.hidden.dtype
    assert out.isfinite().all()
    inputs = (drawn.hidden.double(), drawn.topk_weights, drawn.topk_ids)
    expected = ReferenceKernel()(*inputs, weights, config)
    return (out.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)


def _check(
    case: ExpertsCase, name: str, dtype: torch.dtype, rng: torch.Generator, like: int | None = None
) -> None:
    case = replace(case, config=canonical(case.config))
    drawn = draw(case, dtype, rng)
    weights = random_weights(case.config, name, "unquantized", rng, dtype=dtype)
    errors = _errors(_run(drawn, weights, case.config, like), drawn, weights, case.config)
    assert (errors < LIMITS[dtype]).all(), (case.id, name, dtype, like, errors)


def _formats(rng: torch.Generator) -> None:
    """Every format, at widths that no group divides; a program for each slot, parts of the depth
    side by side, or tokens that share programs."""
    sizes = {"num_experts": 3, "has_bias": True}
    odd = ExpertsConfig(hidden_size=44, intermediate_size=37, **sizes)
    even = ExpertsConfig(hidden_size=256, intermediate_size=128, **sizes)
    for number, name in enumerate(FORMATS):
        dtype = list(LIMITS)[number % 3]
        _check(ExpertsCase(id="odd", config=odd, tokens=3), name, dtype, rng)
    for name in ("int8", "fp8", "int4_g32", "int4_g128", "mxfp4"):
        _check(ExpertsCase(id="even", config=even, tokens=1), name, torch.bfloat16, rng)


def _forms(rng: torch.Generator) -> None:
    """With the plan of few tokens, and with one whose programs have fewer tokens than there are."""
    for number, id in enumerate(SOME):
        name = ("int4_g32_zp", "mxfp4", "fp8")[number % 3]
        for like in (2, 9):
            _check(BY_ID[id], name, torch.float32, rng, like)


def _activations(rng: torch.Generator) -> None:
    """Inputs of both products rounded as the reference rounds them."""
    pairs: list[tuple[str, ActivationFormat]] = [*ROUNDED]
    for number, (name, activations) in enumerate(pairs):
        case = BY_ID["weight_on_input" if number % 2 else "bias"]
        config = replace(case.config, hidden_size=140, intermediate_size=36)
        for tokens in (2, 7):
            drawn = draw(replace(case, config=config, tokens=tokens), torch.float32, rng)
            weights = random_weights(config, name, activations, rng)
            out = _run(drawn, weights, config)
            # Where a value lies between two codes as near as float32 can tell, it may take the
            # other.
            errors = _errors(out, drawn, weights, config)
            what = (name, activations, tokens, errors)
            assert errors.sort().values[0] < 2e-6, what
            assert errors.max() < 0.1, what
            plain = replace(weights, activation_format="unquantized")
            assert _errors(out, drawn, plain, config).min() > 1e-4, what


def _main(part: str, seed: int) -> None:
    allow_loop_bounds()
    allow_small_floats()
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    rng = torch.Generator().manual_seed(seed)
    {"formats": _formats, "forms": _forms, "activations": _activations}[part](rng)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
