"""Norms, rotary positions, products with few rows and attention of single tokens by the native
library, on every instruction set that this machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention_cases import SMALL, PagedCase, draw, expected, largest_error
from kernels.dense_cases import (
    FORMS,
    LIMITS,
    assert_near,
    check_few_rows,
    check_norm,
    check_rotate,
    random,
)
from moetor.config import Activation
from moetor.errors import InputError
from moetor.kernels import dense as public
from moetor.kernels.native import dense, library
from moetor.kernels.native.build import BuildError

try:
    ISAS = library.load().isas
except BuildError as error:
    pytest.skip(f"the library {error}", allow_module_level=True)

ATTENTION_LIMITS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DECODES = [case for case in SMALL if max(case.new) == 1]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The library on one instruction set, with two threads also for little work."""
    loaded = library.load()
    monkeypatch.setattr(loaded, "isas", (request.param,))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_norm_and_rotary(dtype: torch.dtype, isa: str, rng: torch.Generator) -> None:
    assert dense.ready(torch.zeros(1, dtype=dtype))
    check_norm(public.add_rms_norm, dtype, rng)
    check_norm(public.add_rms_norm, dtype, rng, width=128)
    for form in FORMS:
        for normed in (False, True):
            check_rotate(public.rotate, form, normed, dtype, rng)


@pytest.mark.parametrize("dtype", dense.PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_few_rows(rows: int, dtype: torch.dtype, isa: str, rng: torch.Generator) -> None:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None, act: Any, _: Any) -> Tensor:
        return dense.linear(x, weight, bias, act)

    for size in ((26, 40), (2, 17), (334, 600)):
        check_few_rows(call, rows, dtype, rng, size=size)


def test_rows_of_any_stride_and_shape(isa: str, rng: torch.Generator) -> None:
    whole = random(2, 3, 50, dtype=torch.bfloat16, rng=rng)
    weight = random(40, 60, dtype=torch.bfloat16, rng=rng)
    for x, w in ((whole[..., :40], weight[:, :40]), (whole.transpose(0, 1), weight[:, :50])):
        oracle = x.double() @ w.double().T
        assert_near(dense.linear(x, w) / 10, oracle / 10, torch.bfloat16)
    assert dense.linear(whole[:0], weight[:, :50]).shape == (0, 3, 40)


@pytest.mark.parametrize("dtype", dense.PRODUCT_DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(
    dtype: torch.dtype, isa: str, rng: torch.Generator
) -> None:
    x = random(16, 700, dtype=dtype, rng=rng)
    weight = random(530, 700, dtype=dtype, rng=rng)
    whole = dense.linear(x, weight)
    for rows in (slice(0, 1), slice(3, 8), slice(9, 16)):
        assert torch.equal(dense.linear(x[rows], weight), whole[rows])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", DECODES, ids=lambda case: case.id)
def test_attention(case: PagedCase, dtype: torch.dtype, isa: str, rng: torch.Generator) -> None:
    kept = [place for place, new in enumerate(case.new) if new]
    case = replace(case, new=(1,) * len(kept), lens=tuple(case.lens[at] for at in kept))
    for plain in (case, replace(case, lens=tuple(length + 300 for length in case.lens))):
        drawn = draw(plain, dtype, rng)
        wanted = expected(plain, drawn)
        keys, values = drawn.pop("key_cache"), drawn.pop("value_cache")
        drawn.pop("query_start")
        query = drawn.pop("query")
        found = dense.paged_attention(query, keys, values, **drawn)
        assert largest_error(found, wanted) < ATTENTION_LIMITS[dtype]
        strided = torch.cat([query, query], dim=-1)[..., : query.shape[-1]]
        assert torch.equal(found, dense.paged_attention(strided, keys, values, **drawn))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: dense.linear(x, w[:, 1:]),
        lambda x, w: dense.linear(x, w.half()),
        lambda x, w: dense.linear(x.float(), w.float()),
        lambda x, w: dense.linear(x, w, torch.zeros(3)),
        lambda x, w: dense.linear(x, w.T.contiguous().T),
    ],
)
def test_refused(call: Callable[[Tensor, Tensor], Tensor], rng: torch.Generator) -> None:
    with pytest.raises(InputError, match=r"does not fit|must be"):
        call(*(random(rows, 8, dtype=torch.bfloat16, rng=rng) for rows in (2, 4)))


def test_torch_is_taken_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """Also by the float32 product, on a GPU, of which this machine is made to look like one."""
    monkeypatch.setattr(public, "_launches", lambda _, in_torch: not in_torch)
    x, weight = torch.randn(2, 8, generator=rng).bfloat16(), torch.randn(4, 8, generator=rng)
    found = public.linear_float32(x, weight, in_torch=True)
    assert torch.equal(found, torch.nn.functional.linear(x.float(), weight))


def test_the_public_functions_choose(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    x = torch.randn(3, 8, generator=rng).bfloat16()
    weight = torch.randn(6, 8, generator=rng).bfloat16()
    many = torch.randn(dense.FEW_ROWS + 1, 8, generator=rng).bfloat16()
    called = []
    own = dense.linear
    monkeypatch.setattr(dense, "linear", lambda *given: called.append(given) or own(*given))
    public.linear(x, weight)
    public.gated_linear(x, weight, None, Activation())
    assert len(called) == 2
    public.linear(many, weight)
    public.linear(x, weight, in_torch=True)
    public.linear(x.double(), weight.double())
    public.linear(x.float(), weight.float())
    public.gated_linear(x, weight, None, Activation(function=torch.tanh))
    public.gated_linear(x, weight, None, Activation(limit=1.0))
    assert len(called) == 2
