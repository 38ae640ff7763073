"""Checks of an attention that norms, turns and writes a step's new heads itself.

Shape letters: T tokens, Hq and Hkv heads, D width of queries and keys, Dv of values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention_cases import PagedCase, draw, expected, largest_error
from kernels.dense_cases import assert_near, normed, random, turned
from moetor.kernels.dense import NewHeads, Norm, RotaryForm

# The last sequence belongs to nobody: its slot is negative.
CASE = PagedCase(id="", new=(1, 1, 1, 1), lens=(1, 37, 64, 5), heads=(6, 2), block=4)

LIMITS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tables(form: RotaryForm, tokens: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """cos and sin as `form` wants them."""
    angles = 6.3 * torch.rand((tokens, form.width // 2), generator=rng)
    if form.table == "halves":
        angles = torch.cat([angles, angles], dim=1)
    elif form.table == "twice":
        angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def check_turning(
    attend: Callable[..., Tensor],
    form: RotaryForm,
    norm: str | None,
    dtype: torch.dtype,
    rng: torch.Generator,
    device: str = "cpu",
    case: PagedCase = CASE,
) -> None:
    """What comes out, and what the cache holds then, against float64.

    Args:
        attend: takes what `attention_cases.draw` gives, and `new`.
        norm: None, "plain" or "weighted".
    """
    (heads, kv_heads), (width, value_width) = case.heads, case.widths
    tokens = len(case.new)

    def make(*size: int) -> Tensor:
        return random(*size, dtype=dtype, rng=rng, device=device)

    drawn = {
        name: x.to(device) if isinstance(x, Tensor) else x
        for name, x in draw(case, dtype, rng).items()
    }
    packed = make(tokens, (heads + kv_heads) * width + kv_heads * value_width)
    parts = packed.split([heads * width, kv_heads * width, kv_heads * value_width], dim=1)
    query, key, value = (
        x.view(tokens, count, -1)
        for x, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)
    )
    cos, sin = (x.to(device=device, dtype=dtype) for x in tables(form, tokens, rng))
    norms: list[Norm | None] = [None, None]
    if norm is not None:
        # Weights near 1: large heads would make scores of which a rounding changes everything.
        norms = [Norm(None if norm == "plain" else make(width) / 4, 1e-5, 1.0) for _ in range(2)]
    slots = torch.tensor(
        [
            int(drawn["block_table"][seq, (length - 1) // case.block]) * case.block
            + (length - 1) % case.block
            for seq, length in enumerate(case.lens)
        ]
    ).to(device)
    caches = [drawn[name].flatten(0, 1) for name in ("key_cache", "value_cache")]
    before = [cache.clone() for cache in caches]
    for cache in caches:
        cache[slots[:-1]] = torch.nan
    slots[-1] = -1
    drawn["query"] = query
    new = NewHeads(
        key=key, value=value, cos=cos, sin=sin, slots=slots, form=form,
        query_norm=norms[0], key_norm=norms[1],
    )  # fmt: skip
    found = attend(**drawn, new=new)
    wanted = [
        turned(x if n is None else normed(x, n), cos, sin, form)
        for x, n in zip((query, key), norms, strict=True)
    ]
    for cache, held, written in zip(caches, before, (wanted[1], value.double()), strict=True):
        assert_near(cache[slots[:-1]], written[:-1], dtype)
        held[slots[:-1]] = cache[slots[:-1]]
        assert torch.equal(cache.nan_to_num(7.0), held.nan_to_num(7.0))
    oracle = expected(case, drawn | {"query": wanted[0].to(dtype)})
    assert largest_error(found[:-1], oracle[:-1]) < LIMITS[dtype], (form, norm, dtype)
