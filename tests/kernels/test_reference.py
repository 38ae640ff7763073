"""What the reference kernel promises beyond the contract (`test_grouped.py`): all in float32."""

from __future__ import annotations

import pytest
import torch

from layer.expert_cases import EDGES, FORMS, ExpertsCase, draw
from moetor.kernels.base import ExpertWeights
from moetor.kernels.reference import ReferenceKernel, one_expert
from oracle import tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", FORMS + EDGES, ids=lambda case: case.id)
def test_rounds_once(case: ExpertsCase, dtype: torch.dtype, rng: torch.Generator) -> None:
    """16-bit results are float32 results, rounded: half a unit in the last place and no more."""
    drawn = draw(case, dtype, rng)
    out = ReferenceKernel()(
        drawn.hidden,
        drawn.topk_weights,
        drawn.topk_ids,
        ExpertWeights(**drawn.tensors._asdict()),
        case.config,
    )
    expected = drawn.expected(case.config)
    info = torch.finfo(dtype)
    last_place = expected.value.abs() * info.eps / 2 + info.smallest_normal * info.eps
    allowed = last_place + tolerance(expected, torch.float32)
    assert ((out.double() - expected.value).abs() <= allowed).all()


def test_one_expert_is_the_kernel_with_one_slot_of_weight_one(rng: torch.Generator) -> None:
    case = next(case for case in FORMS if case.id == "gpt_oss")
    drawn = draw(case, torch.float64, rng)
    weights = ExpertWeights(**drawn.tensors._asdict())
    ids = torch.full((case.tokens, 1), 3, dtype=torch.int32)
    ones = torch.ones(case.tokens, 1)
    out = ReferenceKernel()(drawn.hidden, ones, ids, weights, case.config)
    assert torch.equal(out, one_expert(drawn.hidden, 3, weights, case.config))
