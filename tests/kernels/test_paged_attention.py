"""Paged attention: the torch form, and the Triton kernel under Triton's interpreter.

The second runs in a process of its own: `TRITON_INTERPRET=1 python
tests/kernels/test_paged_attention.py SEED`.
"""

from __future__ import annotations

import itertools
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

from interpreted import needs_triton, run_interpreted  # noqa: E402
from kernels.attention_cases import SMALL, PagedCase, draw, expected, largest_error  # noqa: E402
from moetor.errors import InputError, KernelRefusedError  # noqa: E402
from moetor.kernels.attention import paged_attention  # noqa: E402
from moetor.kernels.dense import NewHeads, Norm, RotaryForm  # noqa: E402

LIMITS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_torch_form(case: PagedCase, dtype: torch.dtype, rng: torch.Generator) -> None:
    drawn = draw(case, dtype, rng)
    assert largest_error(paged_attention(**drawn), expected(case, drawn)) < LIMITS[dtype]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": 1.0, "window": 0}, "window=0"),
        ({"window": 3, "chunk": 3}, "window and chunk"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"seq_lens": torch.zeros(3)}, "seq_lens"),
        ({"key_cache": torch.zeros(3, 4, 3, 16)}, "key_cache"),
        ({"query": torch.zeros(3, 4, 16).half()}, "key_cache is"),
        ({"query": torch.zeros(3, 4)}, "query"),
        ({"sinks": torch.empty(4, device="meta")}, "sinks are on meta, the query is on cpu"),
    ],
)
def test_refused(changes: dict[str, object], words: str, rng: torch.Generator) -> None:
    drawn = draw(SMALL[0], torch.float32, rng)
    with pytest.raises(InputError, match=words):
        paged_attention(**(drawn | changes))


@pytest.mark.parametrize("name", ["block_table", "seq_lens", "query_start"])
def test_lengths_and_tables_elsewhere_refused(name: str, rng: torch.Generator) -> None:
    drawn = draw(SMALL[0], torch.float32, rng)
    with pytest.raises(InputError, match=f"{name} is on meta, the query is on cpu"):
        paged_attention(**(drawn | {name: drawn[name].to("meta")}))
    spread = drawn[name].repeat_interleave(2, -1)[..., ::2]
    with pytest.raises(InputError, match=f"{name}'s last axis must be contiguous"):
        paged_attention(**(drawn | {name: spread}))


def test_uneven_heads_refused(rng: torch.Generator) -> None:
    drawn = draw(replace(SMALL[0], heads=(5, 2)), torch.float32, rng)
    with pytest.raises(InputError, match="5 query heads"):
        paged_attention(**drawn)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_the_launch_refuses_a_cpu(rng: torch.Generator) -> None:
    from moetor.kernels.triton.attention import paged_attention as launch

    with pytest.raises(KernelRefusedError, match="NVIDIA GPUs, not on cpu"):
        launch(**draw(SMALL[0], torch.float32, rng), max_query_len=1)


@pytest.mark.parametrize(
    ("longest", "changes", "words"),
    [
        (2, {}, "one new token at most, not 2"),
        (1, {"slots": torch.zeros(4).long()}, "slots"),
        (1, {"value": torch.zeros(3, 2, 8)}, "new values"),
        (1, {"cos": torch.zeros(3, 4)}, "cos"),
        (1, {"query_norm": Norm(None, 1e-5)}, "both or neither"),
    ],
)
def test_heads_that_cannot_be_turned(
    longest: int, changes: dict[str, Any], words: str, rng: torch.Generator
) -> None:
    from moetor.kernels.triton.attention import paged_attention as launch

    table = torch.zeros(3, 16)
    new = NewHeads(
        key=torch.zeros(3, 2, 16), value=torch.zeros(3, 2, 16), cos=table, sin=table,
        slots=torch.zeros(3).long(), form=RotaryForm(width=16),
    )  # fmt: skip
    drawn = draw(SMALL[0], torch.float32, rng)
    with pytest.raises(InputError, match=words):
        launch(**drawn, max_query_len=longest, new=replace(new, **changes))


def test_where_the_attention_turns() -> None:
    """Widths that are powers of two and fit in registers, and not more programs than the GPU has
    multiprocessors."""
    from moetor.kernels.triton.attention import turning_refusal

    for width, dtype, words in (
        (128, torch.bfloat16, None),
        (256, torch.bfloat16, None),
        (96, torch.bfloat16, "power of two, not 96"),
        (512, torch.bfloat16, "512 bytes, not 512"),
        (256, torch.float32, "512 bytes, not 256"),
    ):
        query, table = torch.zeros(1, 4, width, dtype=dtype), torch.zeros(1, width)
        key = torch.zeros(1, 2, width, dtype=dtype)
        new = NewHeads(key=key, value=key, cos=table, sin=table, slots=torch.zeros(1),
                       form=RotaryForm(width=width))  # fmt: skip
        reason = turning_refusal(query, new)
        assert (reason is None) == (words is None)
        assert words is None or words in str(reason)


@pytest.mark.parametrize("shared", [101376, 166912, 232448])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("width", "value_width"), [(64, 64), (80, 112), (128, 128), (192, 128), (256, 256), (576, 512)]
)
def test_tiles(width: int, value_width: int, itemsize: int, shared: int) -> None:
    """Tiles fit the shared memory, hold whole groups of heads, and splits can be combined."""
    from moetor.kernels.triton.choose_attention import attention_plan, shared_bytes

    for group in (1, 5, 8, 71, 128):
        for sequences, longest in ((1, 1), (8, 1), (300, 1), (4, 7), (4, 3000)):
            plan = attention_plan(
                sequences=sequences,
                kv_heads=4,
                group=group,
                width=width,
                value_width=value_width,
                max_keys=4096,
                max_query_len=longest,
                itemsize=itemsize,
                sms=132,
                shared=shared,
                overlap=False,
            )
            assert group % plan.heads == 0
            assert plan.rows >= max(16, plan.heads)
            assert plan.rows & (plan.rows - 1) == plan.splits & (plan.splits - 1) == 0
            assert plan.splits * value_width <= 8192
            assert plan.splits == 1 or longest == 1
            size = (plan.rows, plan.keys, plan.stages)
            fits = shared_bytes(width, value_width, itemsize, *size) <= shared
            # The widest heads in float32 are refused on the smallest GPUs.
            assert fits != (width == 576 and itemsize == 4 and shared == 101376)


@needs_triton
def test_under_the_interpreter(seed: int) -> None:
    run_interpreted(HERE, str(seed))


# --- what runs in that process -------------------------------------------------------------------


def main(seed: int) -> None:
    from interpreted import allow_loop_bounds
    from moetor.kernels.triton.attention import run_attention
    from moetor.kernels.triton.choose_attention import attention_plan

    allow_loop_bounds()
    rng = torch.Generator().manual_seed(seed)
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    for case in SMALL:
        for dtype in (torch.float32, torch.float16):
            drawn = draw(case, dtype, rng)
            oracle = expected(case, drawn)
            options = dict.fromkeys(("softcap", "window", "chunk", "sinks")) | drawn
            plan = attention_plan(
                sequences=len(case.lens),
                kv_heads=case.heads[1],
                group=case.heads[0] // case.heads[1],
                width=case.widths[0],
                value_width=case.widths[1],
                max_keys=drawn["block_table"].shape[1] * case.block,
                max_query_len=max(case.new),
                itemsize=4,
                sms=1,
                shared=232448,
                overlap=False,
            )
            plans = [replace(plan, rows=16, keys=16)]
            if max(case.new) == 1:
                plans += [replace(plan, splits=4, keys=16), replace(plan, heads=1)]
                plans += [replace(plan, splits=4, keys=16, least=n) for n in (32, 4096)]
            for tried in plans:
                found = run_attention(plan=tried, decode=max(case.new) == 1, **options)
                error = largest_error(found, oracle)
                assert error < LIMITS[dtype], (case.id, dtype, tried, error)
            # Singles and the others apart, each with its own schedule, into one tensor.
            out = torch.full_like(oracle, torch.nan, dtype=dtype)
            for tried, only in ((replace(plan, rows=16, keys=16, splits=2), "singles"),
                                (replace(plan, rows=16, keys=16), "longer")):  # fmt: skip
                run_attention(plan=tried, decode=only == "singles", only=only, out=out, **options)
            assert largest_error(out, oracle) < LIMITS[dtype], (case.id, dtype)
    check_new_heads(rng)


def check_new_heads(rng: torch.Generator) -> None:
    """Every form of turning, with and without splits, and with several programs a key head."""
    from kernels.dense_cases import FORMS
    from kernels.turning_cases import CASE, check_turning
    from moetor.kernels.triton.attention import run_attention
    from moetor.kernels.triton.choose_attention import AttentionPlan

    plan = AttentionPlan(rows=16, heads=3, keys=16, splits=1, warps=4, stages=1, ahead=True)
    plans = itertools.cycle(
        [
            plan,
            replace(plan, splits=4, ahead=False),
            replace(plan, heads=1, splits=2),
            replace(plan, splits=4),
        ]
    )
    others = dict.fromkeys(("softcap", "window", "chunk", "sinks"))
    for form in FORMS:
        for norm in (None, "plain", "weighted"):
            for dtype in (torch.float32, torch.float16):
                tried = next(plans)

                def attend(tried: AttentionPlan = tried, **drawn: Any) -> Tensor:
                    return run_attention(plan=tried, decode=True, **(others | drawn))

                check_turning(attend, form, norm, dtype, rng, case=CASE)


if __name__ == "__main__":
    main(int(sys.argv[1]))
