"""torch's grouped product as a kernel: its arithmetic on the CPU, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from layer.expert_cases import EDGES, FORMS, ExpertsCase, draw
from moetor.config import ExpertsConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.base import ExpertWeights, KernelQuery
from moetor.kernels.grouped_mm import GroupedMMKernel, run_grouped_mm
from moetor.kernels.select import select_kernel
from oracle import assert_close


def aligned(case: ExpertsCase) -> ExpertsCase:
    """The case with rows of a multiple of 16 bytes."""
    return replace(case, config=replace(case.config, hidden_size=16, intermediate_size=8))


CASES = [aligned(case) for case in FORMS + EDGES]
QUERY = KernelQuery(
    device="cuda",
    dtype=torch.bfloat16,
    experts=ExpertsConfig(num_experts=4, hidden_size=16, intermediate_size=8),
    top_k=2,
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_the_oracle(case: ExpertsCase, rng: torch.Generator) -> None:
    drawn = draw(case, torch.bfloat16, rng)
    weights = ExpertWeights(**drawn.tensors._asdict())
    arguments = (drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, case.config)
    out = run_grouped_mm(*arguments)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, run_grouped_mm(*arguments))
    assert_close(out, drawn.expected(case.config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cpu"}, "not on cpu"),
        ({"dtype": torch.float16}, "not float16"),
        ({"weight_format": "int4"}, "not int4"),
        ({"batch_invariant": True}, "batch"),
        ({"experts": replace(QUERY.experts, hidden_size=12)}, "multiples of 8, not 12 and 8"),
        ({"experts": replace(QUERY.experts, intermediate_size=7)}, "not 16 and 7"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    reason = GroupedMMKernel().refusal(replace(QUERY, **change))
    assert reason is not None
    assert words in reason


def test_it_is_never_chosen_but_can_be_named() -> None:
    with pytest.raises(KernelRefusedError, match="'grouped_mm' was asked for and runs on NVIDIA"):
        select_kernel(replace(QUERY, device="cpu"), "grouped_mm")
    assert select_kernel(QUERY).kernel.name != "grouped_mm"


def test_bad_input_is_refused_before_anything_is_computed(rng: torch.Generator) -> None:
    case = CASES[0]
    drawn = draw(case, torch.bfloat16, rng)
    weights = ExpertWeights(**drawn.tensors._asdict())
    kernel = GroupedMMKernel()
    with pytest.raises(InputError, match=r"topk_ids is torch\.int64"):
        kernel(drawn.hidden, drawn.topk_weights, drawn.topk_ids.long(), weights, case.config)
    with pytest.raises(KernelRefusedError, match="not on cpu; use kernel 'torch'"):
        kernel(drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, case.config)
