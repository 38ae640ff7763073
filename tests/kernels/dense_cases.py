"""Checks of norms, rotary positions and products with few rows, for the CPU and the GPU.

Shape letters: T tokens, H hidden, N outputs, Hq and Hkv heads, D width of queries and keys, Dv of
values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.config import Activation
from moetor.kernels.dense import CacheSlots, Norm, RotaryForm
from moetor.kernels.triton.rows import RowsPlan

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FORMS = (
    RotaryForm(width=16),
    RotaryForm(width=8),
    RotaryForm(width=6, table="once"),
    RotaryForm(width=16, pairs=True, table="once"),
    RotaryForm(width=8, pairs=True, table="twice"),
)
T, HQ, HKV, D, DV = 3, 6, 2, 16, 12


def random(*size: int, dtype: torch.dtype, rng: torch.Generator, device: str = "cpu") -> Tensor:
    return torch.randn(size, generator=rng).to(device=device, dtype=dtype)


def assert_near(found: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """Within the dtype's rounding of each value."""
    assert found.dtype == dtype
    limit = LIMITS[dtype]
    assert torch.allclose(found.double(), oracle, rtol=limit, atol=limit), (
        (found.double() - oracle).abs().max()
    )


def normed(x: Tensor, norm: Norm) -> Tensor:
    """In float64."""
    y = x.double()
    y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return y if norm.weight is None else y * (norm.weight.double() + norm.offset)


def check_norm(
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    rng: torch.Generator,
    device: str = "cpu",
    width: int = 50,
) -> None:
    def make(*size: int) -> Tensor:
        return random(*size, dtype=dtype, rng=rng, device=device)

    wide = make(3, width + 8)
    for x in (make(3, width), wide[:, :width], make(2, 3, width), make(0, width)):
        for norm in (Norm(make(width), 1e-5), Norm(make(width), 1e-2, 1.0), Norm(None, 1e-5)):
            before = x.clone()
            assert_near(add_rms_norm(x, None, norm)[0], normed(x, norm), dtype)
            residual = make(*x.shape)
            out, total = add_rms_norm(x, residual, norm)
            assert torch.equal(total, x + residual)
            assert_near(out, normed(total, norm), dtype)
            assert torch.equal(x, before)


def turned(x: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm) -> Tensor:
    """By complex numbers, in float64."""
    half = form.width // 2
    part = x[..., : form.width].double()
    if form.pairs:
        number = torch.view_as_complex(part.unflatten(-1, (half, 2)).contiguous())
    else:
        number = torch.complex(part[..., :half], part[..., half:])
    step = 2 if form.table == "twice" else 1
    turn = torch.complex(cos.double(), sin.double())[:, : step * half : step]
    number = number * turn[:, None]
    if form.pairs:
        part = torch.view_as_real(number).flatten(-2)
    else:
        part = torch.cat([number.real, number.imag], dim=-1)
    return torch.cat([part, x[..., form.width :].double()], dim=-1)


def _slots(dtype: torch.dtype, device: str, slots: Tensor) -> CacheSlots:
    keys, values = (torch.zeros(4, 5, HKV, d, dtype=dtype, device=device) for d in (D, DV))
    return CacheSlots(keys, values, slots)


def _in_cache(cache: CacheSlots, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    """Slots 7 and 16 hold the first and the last token, all others are as they were."""
    for held, given in ((cache.keys, key), (cache.values, value)):
        flat = held.flatten(0, 1)
        assert_near(flat[7], given[0].double(), dtype)
        assert_near(flat[16], given[2].double(), dtype)
        others = torch.ones(20, dtype=torch.bool)
        others[[7, 16]] = False
        assert not flat[others.to(flat.device)].any()


def check_rotate(
    rotate: Callable[..., tuple[Tensor, Tensor]],
    form: RotaryForm,
    norm: str | None,
    dtype: torch.dtype,
    rng: torch.Generator,
    device: str = "cpu",
) -> None:
    def make(*size: int) -> Tensor:
        return random(*size, dtype=dtype, rng=rng, device=device)

    packed = make(T, HQ * D + HKV * D + HKV * DV)
    q, k, v = packed.split([HQ * D, HKV * D, HKV * DV], dim=1)
    q, k, v = q.view(T, HQ, D), k.view(T, HKV, D), v.view(T, HKV, DV)
    angles = 6.3 * torch.rand((T, form.width // 2), generator=rng)
    if form.table == "halves":
        angles = torch.cat([angles, angles], dim=1)
    elif form.table == "twice":
        angles = angles.repeat_interleave(2, dim=1)
    cos, sin = (table.to(device=device, dtype=dtype) for table in (angles.cos(), angles.sin()))
    norms: list[Norm | None] = [None, None]
    if norm is not None:
        norms = [Norm(None if norm == "plain" else make(D), 1e-5, 1.0) for _ in range(2)]
    wanted = []
    for x, norm in ((q, norms[0]), (k, norms[1])):
        wanted.append(turned(x if norm is None else normed(x, norm), cos, sin, form))
    given: list[Any] = [q, k, v, cos, sin, form]

    def call(cache: CacheSlots | None) -> tuple[Tensor, Tensor]:
        if rotate.__module__.endswith("triton.dense"):
            return rotate(*given, *norms, cache)
        return rotate(*given, query_norm=norms[0], key_norm=norms[1], cache=cache)

    before = packed.clone()
    for found, oracle in zip(call(None), wanted, strict=True):
        assert found.is_contiguous()
        assert_near(found, oracle, dtype)
    cache = _slots(dtype, device, torch.tensor([7, -1, 16], device=device))
    assert_near(call(cache)[0], wanted[0], dtype)
    _in_cache(cache, wanted[1], v, dtype)
    assert torch.equal(packed, before)


def check_cache(
    write: Callable[[Tensor, Tensor, CacheSlots], None],
    dtype: torch.dtype,
    rng: torch.Generator,
    device: str = "cpu",
) -> None:
    k, v = (random(T, HKV, d, dtype=dtype, rng=rng, device=device) for d in (D, DV))
    cache = _slots(dtype, device, torch.tensor([7, -1, 16], device=device))
    write(k, v, cache)
    _in_cache(cache, k, v, dtype)


def check_few_rows(
    few_rows: Callable[..., Tensor],
    rows: int,
    dtype: torch.dtype,
    rng: torch.Generator,
    device: str = "cpu",
    size: tuple[int, int] = (26, 40),
    plan: RowsPlan | None = None,
) -> None:
    """A product, with bias, and with gate, up and activation in one."""
    outputs, depth = size
    x = random(rows, depth, dtype=dtype, rng=rng, device=device)
    weight = random(outputs, depth, dtype=dtype, rng=rng, device=device) / depth**0.5
    bias = random(outputs, dtype=dtype, rng=rng, device=device)
    plans = [plan, RowsPlan(4, 16, 4, 1, 2)] if depth < 100 else [plan]
    for tried in plans:
        product = x.double() @ weight.double().T
        assert_near(few_rows(x, weight, None, None, tried), product, dtype)
        product = product + bias.double()
        assert_near(few_rows(x, weight, bias, None, tried), product, dtype)
        gate, up = product.chunk(2, dim=1)
        assert_near(few_rows(x, weight, bias, Activation(), tried), F.silu(gate) * up, dtype)


def check_activation(
    gated_activation: Callable[..., Tensor],
    dtype: torch.dtype,
    rng: torch.Generator,
    device: str = "cpu",
    width: int = 22,
) -> None:
    x = random(3, 2 * width, dtype=dtype, rng=rng, device=device)
    gate, up = x.double().chunk(2, dim=1)
    assert_near(gated_activation(x, Activation()), F.silu(gate) * up, dtype)
