"""Torch operations under which a token's bits do not depend on the other tokens of a call.

A library chooses how a product is computed by its number of rows, and how an elementwise function
is computed by where an element stands among the others ("Defeating Nondeterminism in LLM
Inference", Thinking Machines 2025, has the same for GPUs). `RowsApart` sees every operation of a
model's own code. What is exact runs as it is; products run row by row in the native library, or in
blocks of a fixed number of rows; functions without an exact result run in whole vectors; sums over
an axis run row by row. An operation that is none of these is refused by its name.

Shape letters: R rows, X width of a row, H depth of a product, N outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from moetor.errors import UnsupportedError
from moetor.kernels.invariant import in_fixed_blocks
from moetor.kernels.native import dense as native

Handler = Callable[..., Any]
# Elements of whole vectors, of every dtype and unrolled as torch does it; and how many elements
# torch gives to one thread.
_VECTORS, _PIECE = 128, 16384
_LINE_BYTES = 64

# These move elements, or have one correct result for each: IEEE 754 arithmetic, comparisons.
_EXACT = frozenset(
    """
    _assert_async _conj _local_scalar_dense _reshape_alias _shape_as_tensor _to_copy
    _unsafe_index _unsafe_view abs add alias all amax amin any arange argmax argmin argsort
    as_strided bincount bitwise_and bitwise_not bitwise_or bitwise_xor broadcast_tensors cat
    ceil chunk clamp clamp_max clamp_min clip clone concat constant_pad_nd contiguous copy
    detach diff div embedding empty empty_like empty_strided eq expand expand_as eye fill
    flatten flip floor floor_divide full full_like gather ge gt index index_add index_copy
    index_put index_select is_nonzero is_same_size isfinite isin isinf isnan item le lift_fresh
    linspace logical_and logical_not logical_or logical_xor lt masked_fill masked_scatter max
    maximum min minimum movedim mul multiply narrow ne neg new_empty new_empty_strided new_full
    new_ones new_zeros nonzero nonzero_numpy numpy_T one_hot ones ones_like pad permute
    reciprocal relu relu6 remainder repeat repeat_interleave reshape roll round rsub
    scalar_tensor scatter searchsorted select sign slice sort split split_with_sizes sqrt square
    squeeze stack sub swapaxes swapdims t tile to topk transpose tril triu trunc type_as unbind
    unflatten unfold unique unsqueeze view view_as view_as_complex view_as_real where zero zeros
    zeros_like
    """.split()  # noqa: SIM905
)
# Of an element alone, but rounded otherwise by vector and by scalar instructions.
_FUNCTIONS = frozenset(
    """
    addcdiv addcmul cos elu erf exp exp2 expm1 gelu hardsigmoid hardswish lerp log log1p
    log_sigmoid leaky_relu mish polar pow rsqrt sigmoid silu sin softplus tanh
    """.split()  # noqa: SIM905
)
# Over one or several axes, with and without the others' shape in the result.
_REDUCTIONS = frozenset(["linalg_vector_norm", "logsumexp", "mean", "norm", "std", "sum", "var"])
_ALONG = frozenset(["_log_softmax", "_softmax", "cumsum", "log_softmax", "softmax"])
_NORMS = frozenset(["layer_norm", "rms_norm"])
_state = threading.local()


def wanted() -> bool:
    """Whether this thread is inside `RowsApart`, or in an operator that was called there."""
    return getattr(_state, "depth", 0) > 0


def watched() -> bool:
    """Whether operations that are called now pass through `RowsApart`: not in an operator of ours,
    whose own operations do not.
    """
    return wanted() and not getattr(_state, "inside", False)


@contextmanager
def rows_apart() -> Iterator[None]:
    """Torch operations of this thread as the module's text says.

    Raises:
        UnsupportedError: inside, at an operation for which it cannot be held.
    """
    inside = getattr(_state, "inside", False)
    _state.depth, _state.inside = getattr(_state, "depth", 0) + 1, False
    try:
        with RowsApart():  # type: ignore[no-untyped-call]
            yield
    finally:
        _state.depth, _state.inside = _state.depth - 1, inside


@contextmanager
def trusted() -> Iterator[None]:
    """Operations run as they are: their shapes are known to follow from one sequence alone."""
    before = getattr(_state, "trusted", False)
    _state.trusted = True
    try:
        yield
    finally:
        _state.trusted = before


class RowsApart(TorchDispatchMode):
    """The mode behind `rows_apart`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operation."""
        kwargs = kwargs or {}
        handler = _handlers.get(func)
        if handler is None:
            handler = _handlers[func] = _handler_of(func)
        if handler is _as_it_is or getattr(_state, "trusted", False):
            return func(*args, **kwargs)
        if handler is _decomposed:
            with self:
                return handler(func, *args, **kwargs)
        return handler(func, *args, **kwargs)


_handlers: dict[Any, Handler] = {}


def _handler_of(func: OpOverload) -> Handler:
    name = func._schema.name.split("::")[1]
    if func.namespace != "aten":
        if func.namespace == "moetor":
            return _ours
        return _as_it_is if func.namespace in ("prim", "profiler") else _refused
    if name in ("add", "sub", "add_", "sub_", "mul", "mul_", "div", "div_"):
        return _arithmetic
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
        if name in _FUNCTIONS:
            return _in_place
    for names, handler in _TABLE:
        if name in names:
            return handler
    return _decomposed if func._can_decompose() else _refused


def _as_it_is(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _ours(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """What a layer computes with `batch_invariant`."""
    inside, _state.inside = getattr(_state, "inside", False), True
    try:
        return func(*args, **kwargs)
    finally:
        _state.inside = inside


def _refused(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError(
        f"{func} may round a token by what stands beside it, and batch_invariant=True was asked "
        "for; leave it False for this model"
    )


def _decomposed(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """By the operations that it consists of, each of which is looked at."""
    return func.decompose(*args, **kwargs)


def _arithmetic(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Exact, unless a factor is multiplied in, or numbers are complex: the two may be fused."""
    fused = kwargs.get("alpha", 1) != 1 or any(
        isinstance(arg, Tensor) and arg.is_complex() for arg in args
    )
    if not fused:
        return func(*args, **kwargs)
    if func._schema.name.endswith("_"):
        return _in_place(func, *args, **kwargs)
    return _function(func, *args, **kwargs)


def _in_place(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    plain = getattr(torch.ops.aten, func._schema.name.split("::")[1][:-1])
    overload = getattr(plain, func._overloadname)
    return args[0].copy_(_function(overload, *args, **kwargs))


def _function(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """A function of each element: of whole vectors, in pieces that no thread shares."""
    places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.dim()]
    if not places or args[places[0]].device.type != "cpu":
        return func(*args, **kwargs)
    if len(places) == 1 and _whole(args[places[0]]):
        return func(*args, **kwargs)
    shape = torch.broadcast_shapes(*(args[place].shape for place in places))
    flat = [args[place].expand(shape).reshape(-1) for place in places]
    count = flat[0].numel()
    flat = [
        _begin_a_line(F.pad(x, (0, -count % _VECTORS)) if count % _VECTORS else x) for x in flat
    ]
    made = []
    for pieces in zip(*(x.split(_PIECE) for x in flat), strict=True):
        given = list(args)
        for place, piece in zip(places, pieces, strict=True):
            given[place] = piece
        made.append(func(*given, **kwargs))
    whole = made[0] if len(made) == 1 else torch.cat(made)
    return whole[:count].view(shape)


def _whole(x: Tensor) -> bool:
    """Whether it is one piece of whole vectors as it stands."""
    count = x.numel()
    fits = 0 < count <= _PIECE and count % _VECTORS == 0
    return fits and x.is_contiguous() and x.data_ptr() % _LINE_BYTES == 0


def _begin_a_line(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % _LINE_BYTES else x


def _named(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names, without the tensor that comes first."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names[1:], args[1:], strict=False)) | kwargs


def _reduction(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Over some axes, one row after the other."""
    x, given = args[0], _named(func, args, kwargs)
    if not x.is_floating_point() and not x.is_complex():
        return func(*args, **kwargs)
    dims = given.pop("dim", None)
    if dims is None or isinstance(dims, bool) or (isinstance(dims, Sequence) and not dims):
        return _refused(func, *args)
    dims = [dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)]
    keepdim = given.pop("keepdim", False)
    kept = [dim for dim in range(x.dim()) if dim not in dims]
    rows = x.permute(kept + dims).reshape(*(x.shape[dim] for dim in kept), -1)
    width = rows.shape[-1]
    given["dim"] = [-1]
    out = in_fixed_blocks(lambda some: func(some, **given), rows.reshape(-1, width), width)
    out = out.view(rows.shape[:-1])
    for dim in sorted(dims) if keepdim else ():
        out = out.unsqueeze(dim)
    return out


def _along(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Along one axis, one row after the other."""
    x, given = args[0], _named(func, args, kwargs)
    if not x.is_floating_point() and not x.is_complex() and not given.get("dtype"):
        return func(*args, **kwargs)
    dim = given.pop("dim") % x.dim()
    turned = x.movedim(dim, -1)
    width = turned.shape[-1]
    given["dim"] = -1
    out = in_fixed_blocks(lambda some: func(some, **given), turned.reshape(-1, width), width)
    return out.view(turned.shape).movedim(-1, dim)


def _norm(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    x, shape = args[:2]
    if len(shape) != 1:
        return _refused(func, *args)
    rows = x.reshape(-1, shape[0])
    out = in_fixed_blocks(lambda some: func(some, *args[1:], **kwargs), rows, shape[0])
    return out.view(x.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, [..., H] to [..., N], each row by itself."""
    plain = weight.dtype == x.dtype and weight.dim() == 2 and weight.stride(1) == 1
    plain = plain and (bias is None or bias.dtype == x.dtype) and x.dtype in native.PRODUCT_DTYPES
    if x.numel() and plain and native.ready(x):
        return native.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    width = max(rows.shape[1], weight.shape[0])
    out = in_fixed_blocks(lambda some: F.linear(some, weight, bias), rows, width)
    return out.view(*x.shape[:-1], weight.shape[0])


def _linear(func: OpOverload, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias)


def _mm(func: OpOverload, rows: Tensor, weight: Tensor) -> Tensor:
    return linear(rows, weight.t())


def _bmm(func: OpOverload, rows: Tensor, weights: Tensor) -> Tensor:
    if rows.shape[2] == 1:  # one factor, no sum
        return rows * weights
    made = [linear(some, weight.t()) for some, weight in zip(rows, weights, strict=True)]
    return torch.stack(made) if made else torch.bmm(rows, weights)


def _addmm(func: OpOverload, bias: Tensor, rows: Tensor, weight: Tensor, **factors: Any) -> Tensor:
    if any(factor != 1 for factor in factors.values()):
        out: Tensor = _refused(func, bias, rows, weight)
        return out
    return linear(rows, weight.t(), bias) if bias.dim() == 1 else _mm(func, rows, weight) + bias


def _baddbmm(func: OpOverload, bias: Tensor, rows: Tensor, weights: Tensor, **factors: Any) -> Any:
    if any(factor != 1 for factor in factors.values()):
        return _refused(func, bias, rows, weights)
    return _bmm(func, rows, weights) + bias


_TABLE: tuple[tuple[frozenset[str], Handler], ...] = (
    (_EXACT, _as_it_is),
    (_FUNCTIONS, _function),
    (_REDUCTIONS, _reduction),
    (_ALONG, _along),
    (_NORMS, _norm),
    (frozenset(["linear"]), _linear),
    (frozenset(["mm"]), _mm),
    (frozenset(["bmm"]), _bmm),
    (frozenset(["addmm"]), _addmm),
    (frozenset(["baddbmm"]), _baddbmm),
)
