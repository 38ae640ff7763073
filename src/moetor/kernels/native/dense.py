"""What stands around the experts, on a CPU: products with few rows, norms, rotary positions, and
attention of single tokens over a paged cache, by the native library.

`ready` says whether a tensor can be computed here; the functions take what it accepts.

Shape letters: T tokens, S sequences, H hidden, N outputs, I intermediate, Hq and Hkv heads, D width
of queries and keys, Dv of values, B tokens of a block, Nb blocks, M blocks of a sequence.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from moetor.errors import InputError
from moetor.kernels.native import library
from moetor.kernels.native.build import BuildError
from moetor.kernels.native.library import ACTIVATION_CODES, DTYPE_CODES

if TYPE_CHECKING:
    from moetor.config import Activation
    from moetor.kernels.dense import CacheSlots, Norm, RotaryForm

FEW_ROWS = 16
"""Rows up to which a product is bound by reading its weight; for more, torch's are faster."""
PRODUCT_DTYPES = (torch.bfloat16, torch.float16)
"""Of which products are computed here. Those in float32 are torch's, which are as quick, and have
the same bits in what a compiler traces."""
WIDEST_HEAD = 1024
_TABLES = {"halves": 0, "once": 1, "twice": 2}


def _fields(*parts: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in parts for name in names.split()]


class _Linear(ctypes.Structure):
    """`MoetorLinear` of csrc/dense.h; so are those below."""

    _fields_: ClassVar[list[tuple[str, Any]]] = _fields(
        (ctypes.c_void_p, "x weight bias out packed"),
        (ctypes.c_int64, "tokens outputs depth x_stride weight_stride"),
        (ctypes.c_int32, "dtype isa threads activation"),
    )


class _Norm(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = _fields(
        (ctypes.c_void_p, "x residual weight out total"),
        (ctypes.c_int64, "rows width"),
        (ctypes.c_int32, "dtype isa threads"),
        (ctypes.c_float, "eps offset"),
    )


class _Rotate(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = _fields(
        (ctypes.c_void_p, "query key value cos sin query_weight key_weight slots"),
        (ctypes.c_void_p, "query_out key_out value_out"),
        (ctypes.c_int64, "tokens heads kv_heads width value_width rotated"),
        (ctypes.c_int64, "query_stride query_head_stride key_stride key_head_stride"),
        (ctypes.c_int64, "value_stride value_head_stride table_stride block_size"),
        (ctypes.c_int64, "key_block_stride key_slot_stride key_cache_head_stride"),
        (ctypes.c_int64, "value_block_stride value_slot_stride value_cache_head_stride"),
        (ctypes.c_int32, "dtype table_dtype isa threads pairs table norms"),
        (ctypes.c_float, "eps offset"),
    )


class _Attention(ctypes.Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = _fields(
        (ctypes.c_void_p, "query keys values out table lens sinks"),
        (ctypes.c_int64, "sequences heads kv_heads width value_width block_size table_stride"),
        (ctypes.c_int64, "query_stride query_head_stride"),
        (ctypes.c_int64, "key_block_stride key_slot_stride key_head_stride"),
        (ctypes.c_int64, "value_block_stride value_slot_stride value_head_stride"),
        (ctypes.c_int64, "window chunk"),
        (ctypes.c_int32, "dtype isa threads"),
        (ctypes.c_float, "scale softcap"),
    )


@functools.cache
def available() -> bool:
    """Whether the library can be had here; it is built at the first question."""
    try:
        library.load()
    except BuildError:
        return False
    return True


def ready(tensor: Tensor) -> bool:
    """Whether the library computes with such a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPE_CODES and available()


def _run(name: str, arguments: ctypes.Structure) -> None:
    status = library.load().call(name, arguments)
    if status != 0:
        raise RuntimeError(
            f"the native {name} answered {status}: its Python side and its C++ side disagree"
        )


def _how(tensor: Tensor) -> tuple[int, int, int]:
    """dtype, isa, threads."""
    isa = library.load().isa_code(None)
    return DTYPE_CODES[tensor.dtype], isa, torch.get_num_threads()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """`x @ weight.T + bias`, [..., H] to [..., N]; with an activation, which must have a name and
    no parameter of its own, activation(gate) * up of a product [..., 2 I], to [..., I].

    Sums are float32, and rounded once, behind the activation. A row's bits do not depend on the
    other rows.

    Raises:
        InputError: a dtype that is not of `PRODUCT_DTYPES`, or a weight or bias that does not fit.
    """
    if x.dtype not in PRODUCT_DTYPES:
        raise InputError(f"products in {x.dtype} must be torch's")
    depth, outputs = x.shape[-1], weight.shape[0]
    if weight.shape != (outputs, depth) or weight.dtype != x.dtype or weight.stride(1) != 1:
        raise InputError(
            f"a weight {weight.dtype} {list(weight.shape)} of strides {list(weight.stride())} does "
            f"not fit {x.dtype} {list(x.shape)}"
        )
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != x.dtype):
        raise InputError(f"a bias {bias.dtype} {list(bias.shape)} must be {x.dtype} [{outputs}]")
    rows = x.reshape(-1, depth)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    width, code = outputs, -1
    if activation is not None:
        width, code = outputs // 2, ACTIVATION_CODES[activation.name]
    tokens = rows.shape[0]
    out = x.new_empty((*x.shape[:-1], width))
    packed = library.workspace(4 * tokens * (depth + 32))
    arguments = _Linear(
        *(rows.data_ptr(), weight.data_ptr(), _at(bias), out.data_ptr(), packed.data_ptr()),
        *(tokens, outputs, depth, rows.stride(0), weight.stride(0)),
        *(*_how(x), code),
    )
    _run("linear", arguments)
    return out


def add_rms_norm(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """See `moetor.kernels.dense.add_rms_norm`."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight = None if norm.weight is None else norm.weight.to(x.dtype).contiguous()
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    width = x.shape[-1]
    arguments = _Norm(
        *(x.data_ptr(), _at(residual), _at(weight), out.data_ptr(), total.data_ptr()),
        *(x.numel() // max(1, width), width),
        *(*_how(x), norm.eps, norm.offset),
    )
    _run("norm", arguments)
    return out, total


def _innermost(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rotate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    form: RotaryForm,
    query_norm: Norm | None,
    key_norm: Norm | None,
    cache: CacheSlots | None,
) -> tuple[Tensor, Tensor]:
    """See `moetor.kernels.dense.rotate`; shapes are checked there."""
    query, key, value = (_innermost(x) for x in (query, key, value))
    dtype = query.dtype
    table = dtype if cos.dtype == sin.dtype == dtype else torch.float32
    cos, sin = (_innermost(x.to(table)) for x in (cos, sin))
    if sin.stride(0) != cos.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    norms = [
        None if norm is None or norm.weight is None else norm.weight.to(dtype).contiguous()
        for norm in (query_norm, key_norm)
    ]
    query_out = query.new_empty(query.shape)
    slots: Tensor | None = None
    key_out, value_out = key, value
    if cache is None:
        key_out = key.new_empty(key.shape)
    else:
        key_out, value_out = cache.keys, cache.values
        slots = cache.slots.long().contiguous()
    size = (0, 0, 0) if cache is None else key_out.stride()[:3]
    value_size = (0, 0, 0) if cache is None else value_out.stride()[:3]
    tokens, heads, width = query.shape
    arguments = _Rotate(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), cos.data_ptr(), sin.data_ptr()),
        *(_at(norms[0]), _at(norms[1]), _at(slots)),
        *(query_out.data_ptr(), key_out.data_ptr(), value_out.data_ptr()),
        *(tokens, heads, key.shape[1], width, value.shape[2], form.width),
        *(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        *(cos.stride(0), 1 if cache is None else cache.keys.shape[1], *size, *value_size),
        *(DTYPE_CODES[dtype], DTYPE_CODES[table], *_how(query)[1:]),
        *(form.pairs, _TABLES[form.table], query_norm is not None),
        *((0.0, 0.0) if query_norm is None else (query_norm.eps, query_norm.offset)),
    )
    _run("rotate", arguments)
    return query_out, key_out


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention [S, Hq, Dv] of one query [S, Hq, D] for each sequence, its last token's.

    Args:
        query: in the dtype of the cache.
        keys: [Nb, B, Hkv, D].
        values: [Nb, B, Hkv, Dv].
        block_table: int32 [S, M].
        seq_lens: int32 [S], at least 1.
        scale: of the products.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        window, chunk: as in `LayerShape` of the engine.
        sinks: [Hq], a further logit for each head, whose weight goes to no value (gpt-oss).
    """
    query = _innermost(query)
    sequences, heads, width = query.shape
    sinks = None if sinks is None else sinks.float().contiguous()
    out = query.new_empty((sequences, heads, values.shape[3]))
    arguments = _Attention(
        *(query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr()),
        *(block_table.data_ptr(), seq_lens.data_ptr(), _at(sinks)),
        *(sequences, heads, keys.shape[2], width, values.shape[3]),
        *(keys.shape[1], block_table.stride(0), *query.stride()[:2]),
        *(*keys.stride()[:3], *values.stride()[:3]),
        *(window or 0, chunk or 0, *_how(query), scale, softcap or 0.0),
    )
    _run("attention", arguments)
    return out
