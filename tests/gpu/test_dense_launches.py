"""Attention over a paged cache, norms, rotary positions and products with few rows, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moetor
from kernels.attention_cases import SMALL, PagedCase, draw, expected, largest_error
from kernels.dense_cases import (
    FORMS,
    LIMITS,
    check_activation,
    check_cache,
    check_few_rows,
    check_norm,
    check_rotate,
)
from kernels.turning_cases import check_turning
from moetor.kernels import dense
from moetor.kernels.attention import paged_attention as attention_in_torch
from moetor.kernels.dense import Norm, RotaryForm
from moetor.kernels.triton import dense as launches
from moetor.kernels.triton import rows as rows_launches
from moetor.kernels.triton.attention import attention_refusal, paged_attention
from moetor.tools.tiny.calls import tiny_inputs
from moetor.tools.tiny.models import tiny_model

REFUSED = attention_refusal("cuda", torch.float32, width=64, value_width=64)
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=f"the Triton attention {REFUSED}")
ATTENTION = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

LARGE = (
    PagedCase(id="qwen3 decode", new=(1,) * 5, lens=(1, 1033, 2048, 17, 300), heads=(32, 4),
              widths=(128, 128), block=16),
    PagedCase(id="qwen3 prompts", new=(300, 1, 129, 64), lens=(300, 700, 513, 64), heads=(32, 4),
              widths=(128, 128), block=16),
    PagedCase(id="gpt-oss", new=(1, 1), lens=(700, 90), heads=(64, 8), widths=(64, 64), block=16,
              options={"window": 128}, sinks=True),
    PagedCase(id="gpt-oss prompts", new=(200, 70), lens=(700, 90), heads=(64, 8), widths=(64, 64),
              block=32, options={"window": 128}, sinks=True),
    PagedCase(id="latent", new=(1, 1), lens=(700, 90), heads=(16, 16), widths=(192, 128), block=16),
    PagedCase(id="latent prompts", new=(150, 3), lens=(150, 90), heads=(16, 16),
              widths=(192, 128), block=16),
    PagedCase(id="absorbed latent", new=(1, 1), lens=(300, 90), heads=(128, 1), widths=(576, 512),
              block=16),
    PagedCase(id="absorbed latent prompts", new=(40,), lens=(90,), heads=(16, 1),
              widths=(576, 512), block=16),
    PagedCase(id="wide heads", new=(1, 60), lens=(400, 90), heads=(8, 2), widths=(256, 256),
              block=16),
    PagedCase(id="odd heads", new=(1, 60), lens=(400, 90), heads=(10, 2), widths=(80, 112),
              block=16),
    PagedCase(id="many heads of one", new=(1, 1), lens=(400, 90), heads=(71, 1), widths=(64, 64),
              block=16),
)  # fmt: skip


def on_gpu(drawn: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in drawn.items()}


@pytest.mark.parametrize("dtype", ATTENTION, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", SMALL + LARGE, ids=lambda case: case.id)
def test_attention(case: PagedCase, dtype: torch.dtype, rng: torch.Generator) -> None:
    drawn = on_gpu(draw(case, dtype, rng))
    torch.full((2**20,), float("nan"), device="cuda")  # memory that the output may get
    found = paged_attention(**drawn, max_query_len=max(case.new))
    assert largest_error(found, expected(case, drawn)) < ATTENTION[dtype]
    assert torch.equal(found, paged_attention(**drawn, max_query_len=max(case.new)))


@pytest.mark.parametrize("dtype", ATTENTION, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("norm", [None, "plain", "weighted"])
def test_attention_that_turns(norm: str | None, dtype: torch.dtype, rng: torch.Generator) -> None:
    def attend(**drawn: Any) -> Tensor:
        return paged_attention(**drawn, max_query_len=1)

    for form in FORMS:
        check_turning(attend, form, norm, dtype, rng, "cuda")
    long = PagedCase(id="", new=(1,) * 3, lens=(1033, 256, 9), heads=(32, 4), widths=(128, 128),
                     block=16)  # fmt: skip
    check_turning(attend, RotaryForm(width=128), norm, dtype, rng, "cuda", long)


def test_attention_in_a_graph(rng: torch.Generator) -> None:
    """Captured once, replayed with other lengths and blocks."""
    case = PagedCase(id="", new=(1, 1), lens=(700, 900), heads=(8, 2), widths=(128, 128), block=16)
    drawn = on_gpu(draw(case, torch.bfloat16, rng))
    paged_attention(**drawn, max_query_len=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = paged_attention(**drawn, max_query_len=1)
    for lens in ((700, 900), (3, 64), (699, 1)):
        drawn["seq_lens"].copy_(torch.tensor(lens))
        drawn["query"].normal_()
        graph.replay()
        assert largest_error(found, attention_in_torch(**drawn).double()) < 3e-2


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_launches(dtype: torch.dtype, rng: torch.Generator) -> None:
    for width in (50, 2048, 7168):
        check_norm(launches.add_rms_norm, dtype, rng, "cuda", width)
    for form in FORMS:
        for norm in (None, "plain", "weighted"):
            check_rotate(launches.rotate, form, norm, dtype, rng, "cuda")
    check_cache(launches.write_to_cache, dtype, rng, "cuda")
    for rows in (1, 2, 3, 8, 19):
        check_few_rows(rows_launches.few_rows, rows, dtype, rng, "cuda")
        check_few_rows(rows_launches.few_rows, rows, dtype, rng, "cuda", (130, 2048))
    check_activation(launches.gated_activation, dtype, rng, "cuda", 1500)


def test_the_gpu_is_used_and_agrees(rng: torch.Generator) -> None:
    """The public functions give on a GPU what their torch forms give."""
    x = torch.randn(3, 64, generator=rng).cuda()
    norm = Norm(torch.randn(64, generator=rng).cuda(), 1e-6)
    a, b = dense.rms_norm(x, norm), dense.rms_norm(x, norm, in_torch=True)
    assert torch.allclose(a, b, atol=1e-5)
    weight = torch.randn(32, 64, generator=rng).cuda()
    a, b = dense.linear(x, weight), dense.linear(x, weight, in_torch=True)
    assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_fused_model(family: str) -> None:
    """Experts and dense parts, in float32 against the model as it was."""
    model = tiny_model(family).cuda()
    inputs = {name: x.cuda() for name, x in tiny_inputs(family, model).items()}
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
        report = moetor.fuse(model, dense=True)
        assert {part.kind for part in report.dense if part.done} > {"norm", "attention", "layer"}
        found = model(**inputs, use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
