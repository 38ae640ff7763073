"""The small path over quantised weights under Triton's interpreter (this file as a script): every
format, form, edge case and rounding of activations, small."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve()
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))

from interpreted import needs_triton, run_interpreted  # noqa: E402


@needs_triton
@pytest.mark.parametrize("part", ["formats", "forms", "activations"])
def test_under_the_interpreter(part: str, seed: int) -> None:
    run_interpreted(HERE, part, str(seed))


# --- what runs in that process -------------------------------------------------------------------


def _run(drawn: object, weights: object, config: object, like: int | None = None) -> Tensor:
    """The path with its own plan, or with the one for another number of tokens."""
    from moetor.kernels.triton import choose
    from moetor.kernels.triton.choose_small_quantized import quantized_small_plan
    from moetor.kernels.triton.small_quantized import run_small_quantized

    tokens, top_k = drawn.topk_ids.shape
    dtype = drawn.hidden.dtype
    plan = quantized_small_plan(
        config,
        top_k,
        tokens if like is None else like,
        (weights.gate_up.format, weights.down.format),
        weights.activation_format,
        choose.Device(sms=132, shared=232448, capability=(8, 0)),
        half=dtype == torch.float16,
        itemsize=dtype.itemsize,
    )
    return run_small_quantized(
        drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, config, plan
    )


def _check(name: str, out: Tensor, drawn: object, config: object) -> None:
    from oracle import assert_close

    try:
        assert out.dtype == drawn.hidden.dtype
        assert_close(out, drawn.expected(config))
    except AssertionError as error:
        raise AssertionError(f"{name} {out.dtype}: {error}") from error


def _formats(rng: torch.Generator) -> None:
    """Every format in two dtypes, at widths that no group divides; parts of the depth side by
    side where widths allow it."""
    from kernels.quantized_cases import FORMATS, draw_quantized
    from layer.expert_cases import FORMS, draw

    case = next(case for case in FORMS if case.id == "bias")
    for hidden, size, tokens in ((44, 37, 3), (160, 32, 3), (512, 256, 1)):
        sizes = {"num_experts": 3, "hidden_size": hidden, "intermediate_size": size}
        config = replace(case.config, **sizes)
        for dtype in (torch.float32, torch.float16):
            for name in FORMATS if tokens > 1 else ("int8", "fp8", "int4_g128"):
                drawn = draw(replace(case, config=config, tokens=tokens), dtype, rng)
                weights, tensors = draw_quantized(config, name, rng, dtype=dtype)
                drawn = replace(drawn, tensors=tensors)
                _check(name, _run(drawn, weights, config), drawn, config)


def _cases() -> Iterator[object]:
    from layer.expert_cases import EDGES, FORMS
    from moetor.kernels.formats import canonical

    seen = set()
    for case in FORMS + EDGES:
        config = canonical(case.config)
        key = replace(case, id="", config=config)
        if config.activation.function is None and repr(key) not in seen:
            seen.add(repr(key))
            yield replace(case, config=config, tokens=min(case.tokens, 12))


def _forms(rng: torch.Generator) -> None:
    """Every form and edge case; programs by slot and by expert, with the sum in the second product
    or in a launch of its own, and more tokens than a program has."""
    from kernels.quantized_cases import draw_quantized
    from layer.expert_cases import draw

    for number, case in enumerate(_cases()):
        name = ("int4_g32_zp", "mxfp4", "fp8")[number % 3]
        drawn = draw(case, torch.float32, rng)
        weights, tensors = draw_quantized(case.config, name, rng)
        drawn = replace(drawn, tensors=tensors)
        for like in (None, 2, 9):
            out = _run(drawn, weights, case.config, like)
            _check(f"{case.id} {name} {like}", out, drawn, case.config)


def _activations(rng: torch.Generator) -> None:
    """Rounded inputs of both products, as the reference rounds them."""
    from kernels.quantized_cases import draw_quantized
    from layer.expert_cases import EDGES, FORMS, draw
    from moetor.kernels.reference import ReferenceKernel

    cases = [case for case in FORMS + EDGES if case.id in ("bias", "weight_on_input", "top_1")]
    for case in cases:
        config = replace(case.config, hidden_size=140, intermediate_size=36)
        for activations, name in (
            ("int8_token", "int8"),
            ("fp8_token", "fp8"),
            ("fp8_static", "fp8"),
            ("fp8_group128", "fp8_block128x128"),
            ("fp8_group128", "fp8"),
            ("mxfp8", "mxfp8"),
        ):
            drawn = draw(replace(case, config=config), torch.float32, rng)
            weights, _ = draw_quantized(config, name, rng, activations=activations)
            if activations == "fp8_static":
                scales = 0.005 * (1 + torch.rand(2, config.num_experts, generator=rng))
                weights = replace(
                    weights,
                    gate_up=replace(weights.gate_up, input_scales=scales[0]),
                    down=replace(weights.down, input_scales=scales[1]),
                )
            inputs = (drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, config)
            expected = ReferenceKernel()(*inputs)
            plain = ReferenceKernel()(
                *inputs[:3], replace(weights, activation_format="unquantized"), config
            )
            out = _run(drawn, weights, config)
            error = (out - expected).norm() / expected.norm()
            rounding = (plain - expected).norm() / expected.norm()
            assert error < 1e-5 < rounding, (case.id, activations, error, rounding)


def _main(part: str, seed: int) -> None:
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    rng = torch.Generator().manual_seed(seed)
    {"formats": _formats, "forms": _forms, "activations": _activations}[part](rng)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
