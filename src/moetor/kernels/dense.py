"""What stands around attention and experts: norms, rotary positions, products with few rows.

Each function computes in float32 and rounds once. On an NVIDIA GPU it is one launch of
`moetor.kernels.triton.dense`, on a CPU with the native library one call of
`moetor.kernels.native.dense`, elsewhere torch operations, which are also the oracle of both
(`in_torch=True` asks for them anywhere).

Shape letters: T tokens, H hidden, N outputs, I intermediate, Hq and Hkv heads, D width of queries
and keys, Dv of values, R rotated part of D, B tokens of a block, Nb blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.config import Activation
from moetor.errors import InputError
from moetor.kernels import rows_apart
from moetor.kernels.activations import activate
from moetor.kernels.native import dense as native
from moetor.kernels.triton import support
from moetor.kernels.triton.rows import most_rows


@functools.cache
def _have_gpu_kernels() -> bool:
    return support.device_refusal("cuda") is None


def _launches(tensor: Tensor, in_torch: bool) -> bool:
    """Whether Triton computes it."""
    if in_torch or tensor.device.type != "cuda" or tensor.dtype not in support.DTYPES:
        return False
    # A compiler sees torch operations, which it fuses itself.
    return not torch.compiler.is_compiling() and _have_gpu_kernels()


def _native(tensor: Tensor, in_torch: bool) -> bool:
    """Whether the native library computes it."""
    return not in_torch and not torch.compiler.is_compiling() and native.ready(tensor)


def _native_rows(x: Tensor, weight: Tensor, in_torch: bool) -> bool:
    # First, as a compiler that saw the number of rows compared would compile anew for each outcome.
    if not _native(x, in_torch) or x.dtype not in native.PRODUCT_DTYPES:
        return False
    rows = x.numel() // max(1, x.shape[-1])
    plain = weight.dtype == x.dtype and weight.stride(1) == 1
    # All rows alike where none may depend on the others.
    most = rows if rows_apart.wanted() else native.FEW_ROWS
    return 0 < rows <= most and plain


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryForm:
    """How queries and keys are turned.

    Attributes:
        width: R; the rest of a head stays as it is.
        pairs: neighbours are turned with each other; else an element of the first half with that
            of the second.
        table: what cos and sin [T, ...] hold. `halves`: R values, one for each element, first
            half before second; `once`: the first R / 2 values are those of the R / 2 turns;
            `twice`: R values, each turn's twice, side by side.
    """

    width: int
    pairs: bool = False
    table: Literal["halves", "once", "twice"] = "halves"


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * (weight + offset).

    Attributes:
        weight: [H], or None for none.
        eps: inside the root.
        offset: added to the weight (1 where the weight is stored around 0).
    """

    weight: Tensor | None
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheSlots:
    """Where the new keys and values go.

    Attributes:
        keys: [Nb, B, Hkv, D].
        values: [Nb, B, Hkv, Dv].
        slots: [T], block * B + offset; negative for none.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHeads:
    """New keys and values, and how they and their queries are turned: what `rotate` is given with a
    cache, for an attention that does it itself.

    Attributes:
        key: [T, Hkv, D].
        value: [T, Hkv, Dv].
        cos, sin: [T, R] or [T, R / 2], as `form` says.
        slots: [T], as in `CacheSlots`.
        query_norm, key_norm: both or neither.
    """

    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    form: RotaryForm
    query_norm: Norm | None = None
    key_norm: Norm | None = None


def rms_norm(x: Tensor, norm: Norm, *, in_torch: bool = False) -> Tensor:
    """The norm of [..., H] over its last axis, in its dtype."""
    return add_rms_norm(x, None, norm, in_torch=in_torch)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, norm: Norm, *, in_torch: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum, rounded before it is normed; [..., H] each.

    Raises:
        InputError: a residual or a weight of another shape.
    """
    width = x.shape[-1]
    if norm.weight is not None and tuple(norm.weight.shape) != (width,):
        raise InputError(f"a norm's weight is {list(norm.weight.shape)}, it must be [{width}]")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise InputError(
            f"a residual {residual.dtype} {list(residual.shape)} cannot be added to {x.dtype} "
            f"{list(x.shape)}"
        )
    if _launches(x, in_torch):
        from moetor.kernels.triton import dense

        return dense.add_rms_norm(x, residual, norm)
    if _native(x, in_torch):
        return native.add_rms_norm(x, residual, norm)
    total = x if residual is None else x + residual
    wide = _wide(total)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        normed = normed * (norm.weight.to(wide.dtype) + norm.offset)
    return normed.to(x.dtype), total


def rotate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    form: RotaryForm,
    *,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
    cache: CacheSlots | None = None,
    in_torch: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, normed head by head where asked and turned by their positions.

    Args:
        query: [T, Hq, D].
        key: [T, Hkv, D].
        value: [T, Hkv, Dv]; read only with `cache`.
        cos, sin: [T, R] or [T, R / 2], as `form` says.
        query_norm, key_norm: both or neither.
        cache: keys and values are written there instead of being returned.

    Returns:
        Queries [T, Hq, D], and keys [T, Hkv, D]; with `cache` the cache's keys.

    Raises:
        InputError: shapes that do not fit.
    """
    check_rotate(query, key, value, cos, sin, form, query_norm, key_norm, cache)
    if _launches(query, in_torch):
        from moetor.kernels.triton import dense

        return dense.rotate(query, key, value, cos, sin, form, query_norm, key_norm, cache)
    if query.shape[-1] <= native.WIDEST_HEAD and _native(query, in_torch):
        return native.rotate(query, key, value, cos, sin, form, query_norm, key_norm, cache)
    turned = []
    for x, norm in ((query, query_norm), (key, key_norm)):
        wide = _wide(x)
        if norm is not None:
            wide = rms_norm(wide, norm, in_torch=True)
        turned.append(_turn(wide, cos, sin, form).to(x.dtype))
    if cache is None:
        return turned[0], turned[1]
    write_to_cache(turned[1], value, cache, in_torch=True)
    return turned[0], cache.keys


def attention_turns(query: Tensor, new: NewHeads) -> bool:
    """Whether `moetor.kernels.triton.attention` does for these heads and queries [T, Hq, D] what
    `rotate` does, and faster."""
    if not _launches(query, in_torch=False):
        return False
    from moetor.kernels.triton.attention import worth_turning

    return worth_turning(query, new)


def write_to_cache(
    key: Tensor, value: Tensor, cache: CacheSlots, *, in_torch: bool = False
) -> None:
    """Writes keys [T, Hkv, D] and values [T, Hkv, Dv] to their slots."""
    if _launches(key, in_torch):
        from moetor.kernels.triton import dense

        dense.write_to_cache(key, value, cache)
        return
    kept = cache.slots >= 0
    slots = cache.slots[kept].long()
    size = cache.keys.shape[1]
    cache.keys[slots // size, slots % size] = key[kept]
    cache.values[slots // size, slots % size] = value[kept]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, in_torch: bool = False
) -> Tensor:
    """`x @ weight.T + bias`, [..., H] to [..., N]: by vector sums for a few rows."""
    if weight.dtype == x.dtype and _few(x, weight.shape[0], in_torch):
        from moetor.kernels.triton import rows

        return rows.few_rows(x, weight, bias, None)
    if _native_rows(x, weight, in_torch):
        return native.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_float32(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, in_torch: bool = False
) -> Tensor:
    """The same product in float32, whatever the dtypes."""
    if _few(x, weight.shape[0], in_torch):
        from moetor.kernels.triton import rows

        return rows.few_rows(x, weight, bias, None, dtype=torch.float32)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _few(x: Tensor, outputs: int, in_torch: bool) -> bool:
    # First, as in `_native_rows`.
    if not _launches(x, in_torch) or rows_apart.wanted():
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return 0 < rows <= most_rows(outputs, x.shape[-1])


def gated_linear(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    activation: Activation,
    *,
    in_torch: bool = False,
) -> Tensor:
    """activation(gate) * up of both products in one, [..., H] to [..., I].

    Args:
        gate_up: [2 I, H], gate before up; `bias` [2 I] likewise.
        activation: a named one; a callable is called between the products.
    """
    if activation.function is None and _launches(x, in_torch):
        from moetor.kernels.triton import dense, rows

        if _few(x, gate_up.shape[0], in_torch):
            return rows.few_rows(x, gate_up, bias, activation)
        return dense.gated_activation(F.linear(x, gate_up, bias), activation)
    plain = activation == Activation(name=activation.name)
    if plain and _native_rows(x, gate_up, in_torch):
        return native.linear(x, gate_up, bias, activation)
    return activate(F.linear(x, gate_up, bias), activation)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _turn(x_THD: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm) -> Tensor:
    half = form.width // 2
    if form.table == "twice":
        tables = [(table[:, 0 : form.width : 2],) * 2 for table in (cos, sin)]
    elif form.table == "once":
        tables = [(table[:, :half],) * 2 for table in (cos, sin)]
    else:
        tables = [(table[:, :half], table[:, half : form.width]) for table in (cos, sin)]
    (c1, c2), (s1, s2) = ([_wide(part)[:, None] for part in pair] for pair in tables)
    turning, rest = x_THD[..., : form.width], x_THD[..., form.width :]
    if form.pairs:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning[..., :half], turning[..., half:]
    first, second = a * c1 - b * s1, b * c2 + a * s2
    if form.pairs:
        joined = torch.stack([first, second], dim=-1).flatten(-2)
    else:
        joined = torch.cat([first, second], dim=-1)
    return torch.cat([joined, rest], dim=-1) if rest.shape[-1] else joined


def check_rotate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    form: RotaryForm,
    query_norm: Norm | None,
    key_norm: Norm | None,
    cache: CacheSlots | None,
) -> None:
    """Refuses what `rotate` cannot take.

    Raises:
        InputError: naming what does not fit.
    """
    tokens, width = query.shape[0], query.shape[-1]
    if form.width % 2 or not 0 < form.width <= width:
        raise InputError(f"a rotary width of {form.width} does not fit heads of {width}")
    if form.pairs and form.table == "halves":
        raise InputError("turning neighbours needs one value for a pair: table 'once' or 'twice'")
    for x, name in ((key, "key"), (value, "value")):
        if x.dim() != 3 or x.shape[0] != tokens:
            raise InputError(f"{name} {list(x.shape)} does not fit query {list(query.shape)}")
    if key.shape[2] != width or key.shape[1] != value.shape[1]:
        raise InputError(
            f"key {list(key.shape)} does not fit query {list(query.shape)} or value "
            f"{list(value.shape)}"
        )
    least = form.width // 2 if form.table == "once" else form.width
    for x, name in ((cos, "cos"), (sin, "sin")):
        if x.dim() != 2 or x.shape[0] != tokens or x.shape[1] < least:
            raise InputError(f"{name} {list(x.shape)} must be [{tokens}, {least}] or wider")
    if (query_norm is None) != (key_norm is None):
        raise InputError("query_norm and key_norm: give both or neither")
    norms = {
        (norm.eps, norm.offset, norm.weight is None)
        for norm in (query_norm, key_norm)
        if norm is not None
    }
    if len(norms) == 2:
        raise InputError(
            "query_norm and key_norm must have one eps and one offset, and a weight both or neither"
        )
    if cache is not None and (
        cache.slots.shape != (tokens,)
        or cache.keys.shape[2:] != key.shape[1:]
        or cache.values.shape[2:] != value.shape[1:]
    ):
        raise InputError(
            f"slots {list(cache.slots.shape)} and caches {list(cache.keys.shape)}, "
            f"{list(cache.values.shape)} do not fit key {list(key.shape)} and value "
            f"{list(value.shape)}"
        )
