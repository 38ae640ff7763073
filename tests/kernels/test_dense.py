"""Norms, rotary positions and products with few rows: the torch forms, and the Triton launches
under Triton's interpreter.

The second run in a process of their own: `TRITON_INTERPRET=1 python tests/kernels/test_dense.py
SEED`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve()
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))

from interpreted import needs_triton, run_interpreted  # noqa: E402
from kernels.dense_cases import (  # noqa: E402
    FORMS,
    LIMITS,
    check_activation,
    check_cache,
    check_few_rows,
    check_norm,
    check_rotate,
)
from moetor.errors import InputError  # noqa: E402
from moetor.kernels import dense  # noqa: E402
from moetor.kernels.dense import Norm, RotaryForm  # noqa: E402


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_torch_forms(dtype: torch.dtype, rng: torch.Generator) -> None:
    check_norm(dense.add_rms_norm, dtype, rng)
    for form in FORMS:
        for norm in (None, "plain", "weighted"):
            check_rotate(dense.rotate, form, norm, dtype, rng)
    check_cache(dense.write_to_cache, dtype, rng)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_products(rows: int, rng: torch.Generator) -> None:
    x, weight = torch.randn(rows, 6, generator=rng), torch.randn(8, 6, generator=rng)
    bias = torch.randn(8, generator=rng)
    product = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(dense.linear(x, weight, bias).double(), product, atol=1e-5)
    from moetor.config import Activation

    gated = torch.nn.functional.silu(product[:, :4]) * product[:, 4:]
    found = dense.gated_linear(x, weight, bias, Activation())
    assert torch.allclose(found.double(), gated, atol=1e-5)
    callable_gated = torch.tanh(product[:, :4]) * product[:, 4:]
    found = dense.gated_linear(x, weight, bias, Activation(function=torch.tanh))
    assert torch.allclose(found.double(), callable_gated, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        (RotaryForm(width=5), {}, "width of 5"),
        (RotaryForm(width=18), {}, "width of 18"),
        (RotaryForm(width=8, pairs=True), {}, "neighbours"),
        (RotaryForm(width=8), {"key": torch.zeros(3, 2, 8)}, "key"),
        (RotaryForm(width=8), {"value": torch.zeros(2, 2, 8)}, "value"),
        (RotaryForm(width=8), {"cos": torch.zeros(3, 4)}, "cos"),
        (RotaryForm(width=8), {"query_norm": Norm(None, 1e-5)}, "both or neither"),
        (
            RotaryForm(width=8),
            {"query_norm": Norm(None, 1e-5), "key_norm": Norm(None, 1e-6)},
            "one eps",
        ),
    ],
)
def test_rotate_refuses(form: RotaryForm, changes: dict[str, object], words: str) -> None:
    given = {
        "query": torch.zeros(3, 4, 16),
        "key": torch.zeros(3, 2, 16),
        "value": torch.zeros(3, 2, 8),
        "cos": torch.zeros(3, 8),
        "sin": torch.zeros(3, 8),
    }
    with pytest.raises(InputError, match=words):
        dense.rotate(form=form, **(given | changes))  # type: ignore[arg-type]


def test_norm_refuses() -> None:
    with pytest.raises(InputError, match="weight"):
        dense.rms_norm(torch.zeros(2, 4), Norm(torch.zeros(3), 1e-5))
    with pytest.raises(InputError, match="residual"):
        dense.add_rms_norm(torch.zeros(2, 4), torch.zeros(3, 4), Norm(None, 1e-5))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_of_few_rows(gated: bool, itemsize: int) -> None:
    """What a program sums at once stays in its registers, whatever the size."""
    from moetor.kernels.triton.rows import rows_plan

    for outputs in (8, 128, 2048, 5120, 151936):
        for depth in (64, 2048, 2880, 7168):
            for rows in (1, 2, 4, 8, 32):
                plan = rows_plan(outputs, depth, rows, itemsize, gated=gated)
                held = plan.outputs * plan.depth * plan.rows * (2 if gated else 1)
                assert held <= 8192
                assert plan.depth & (plan.depth - 1) == 0


@needs_triton
def test_under_the_interpreter(seed: int) -> None:
    run_interpreted(HERE, str(seed))


def main(seed: int) -> None:
    """What runs in that process; the interpreter does not round to bfloat16 as a GPU does."""
    from interpreted import allow_loop_bounds
    from moetor.kernels.triton import dense as launches
    from moetor.kernels.triton import rows as rows_launches

    allow_loop_bounds()
    rng = torch.Generator().manual_seed(seed)
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    for dtype in (torch.float32, torch.float16):
        check_norm(launches.add_rms_norm, dtype, rng)
        for form in FORMS:
            for norm in (None, "plain", "weighted"):
                check_rotate(launches.rotate, form, norm, dtype, rng)
        check_cache(launches.write_to_cache, dtype, rng)
        for rows in (1, 3, 8, 11):
            check_few_rows(rows_launches.few_rows, rows, dtype, rng)
        check_activation(launches.gated_activation, dtype, rng)


class Launches:
    """A kernel that notes the options of its launches."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **options: self.options.append(options)


def test_a_copy_of_a_weight_is_not_read_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read while the launch before is running, and that may be the one that copies."""
    import moetor.kernels.triton as room
    from moetor.kernels.triton import rows

    noted = Launches()
    monkeypatch.setattr(room, "rows_kernels", SimpleNamespace(few_rows=noted), raising=False)
    monkeypatch.setattr(rows.support, "overlap", lambda tensor: True)
    x, weight = torch.randn(2, 8), torch.randn(6, 8)
    for other in (weight, weight.T.contiguous().T):
        rows.few_rows(x, other, None, None)
    assert [options["PDL"] for options in noted.options] == [True, False]
    assert ["launch_pdl" in options for options in noted.options] == [True, False]


if __name__ == "__main__":
    main(int(sys.argv[1]))
