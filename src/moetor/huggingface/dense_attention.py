"""Attention modules whose head norms, rotary positions and cache write become one launch.

The module keeps its place, its projections and its call of Transformers' attention interface; what
is between them is ours. Which form it has is found by trying until queries and keys are those that
the module itself gave to the interface.

Shape letters: B batch, S sequence, T = B * S tokens, Hq and Hkv heads, D width of queries and keys,
R rotated part of D.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moetor.huggingface.dense_norms import NormForward
from moetor.huggingface.dense_observe import AttentionCall, Call, bind
from moetor.huggingface.experts_form import Unrecognised
from moetor.huggingface.trial import relative_error, tolerance
from moetor.kernels import dense
from moetor.kernels.dense import CacheSlots, NewHeads, RotaryForm

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORM_NAMES = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
_CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What was recognised.

    Attributes:
        rotary: how positions turn.
        norms: of queries and keys: both or neither.
        norm_width: of one head, or of all heads together.
        constants: named arguments of the interface that do not change.
        tensors: named arguments that are the module's own, by attribute.
        passed: named arguments that are the caller's own.
        answers: how many values the module answers with.
    """

    rotary: RotaryForm
    norms: tuple[NormForward, NormForward] | None
    norm_per_head: bool
    constants: dict[str, Any]
    tensors: dict[str, str]
    passed: tuple[str, ...]
    heads: tuple[int, int]
    width: int


class AttentionForward:
    """The forward of a recognised attention module.

    Calls of another kind than the observed one (no position embeddings, gradients wanted) go to
    the module's own forward.
    """

    def __init__(self, module: nn.Module, form: AttentionForm) -> None:
        self.module, self.form = module, form

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """As the family's own."""
        given, extra = bind(self.module, args, kwargs)
        positions = given.get("position_embeddings")
        hidden = given.get("hidden_states")
        if (
            not (isinstance(positions, tuple) and len(positions) == 2)
            or not isinstance(hidden, Tensor)
            or self._wants_gradients(hidden)
        ):
            answer: tuple[Tensor, Any] = type(self.module).forward(self.module, *args, **kwargs)
            return answer
        batch, length = hidden.shape[:2]
        cache = next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)
        query, key, value, written = self.heads(hidden, positions, cache)
        states = [x.view(batch, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)]
        if cache is not None and not written:
            states[1:] = cache.update(states[1], states[2], self.module.layer_idx)
        out, weights = self._attend(states, given, extra)
        return self._project(out.reshape(batch, length, -1).contiguous()), weights

    def _wants_gradients(self, hidden: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return hidden.requires_grad or any(p.requires_grad for p in self.module.parameters())

    def _child(self, name: str) -> Any:
        return self.module._modules[name]

    def _project(self, out: Tensor) -> Tensor:
        projected: Tensor = self._child("o_proj")(out)
        return projected

    def heads(
        self, hidden: Tensor, positions: tuple[Tensor, Tensor], cache: Any
    ) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Queries [T, Hq, D], keys and values [T, Hkv, ...], and whether they are in the cache.

        A cache with a `write_target` (the engine's) gets keys and values in the same launch, or
        leaves all of it to its attention; the keys that are returned are then neither normed nor
        turned, and nobody reads them.
        """
        form = self.form
        tokens = hidden.shape[0] * hidden.shape[1]
        parts = []
        for place, name in enumerate(_PROJECTIONS[:3]):
            part = self._child(name)(hidden)
            if form.norms is not None and not form.norm_per_head and place < 2:
                part = form.norms[place](part)
            parts.append(part.view(tokens, form.heads[min(place, 1)], -1))
        query, key, value = parts
        cos, sin = (self._per_token(table, hidden) for table in positions)
        query_norm = key_norm = None
        if form.norms is not None and form.norm_per_head:
            query_norm, key_norm = form.norms[0].norm, form.norms[1].norm
        target: CacheSlots | None = None
        if hasattr(cache, "write_target"):
            target = cache.write_target(self.module.layer_idx, key, value)
        if target is not None:
            new = NewHeads(
                key=key,
                value=value,
                cos=cos,
                sin=sin,
                slots=target.slots,
                form=form.rotary,
                query_norm=query_norm,
                key_norm=key_norm,
            )
            if cache.leave_turning(query, new):
                return query, key, value, True
        query, turned = dense.rotate(
            query,
            key,
            value,
            cos,
            sin,
            form.rotary,
            query_norm=query_norm,
            key_norm=key_norm,
            cache=target,
        )
        return query, turned if target is None else key, value, target is not None

    @staticmethod
    def _per_token(table: Tensor, hidden: Tensor) -> Tensor:
        """[T, R] of a table [B or 1, S, R]."""
        expanded = table.expand(hidden.shape[0], -1, -1)
        return expanded.reshape(-1, table.shape[-1])

    def _attend(
        self, states: list[Tensor], given: dict[str, Any], extra: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        module: Any = self.module
        form = self.form
        # Wrappers of the forward live elsewhere than the family's own attention.
        own = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, own)
        named = dict(form.constants)
        named |= {name: getattr(module, attribute) for name, attribute in form.tensors.items()}
        named |= {name: given.get(name) for name in form.passed}
        out, weights = attend(module, *states, given.get("attention_mask"), **named, **extra)
        return out, weights


def recognise_attention(
    call: Call,
    seen: AttentionCall | None,
    norms: dict[str, NormForward],
    projected: Call | None,
) -> AttentionForward | Unrecognised:
    """The module's form, proved by the queries, keys, values and output of its observed call.
    Nothing is called here that communicates in a spread model.

    Args:
        call: the observed call.
        seen: its call of the attention interface.
        norms: recognised norms among the module's children, by name.
        projected: the observed call of its output projection.
    """
    if seen is None:
        return Unrecognised("it does not call Transformers' attention interface")
    module: Any = call.module
    children = dict(module.named_children())
    if any(name not in children for name in _PROJECTIONS):
        return Unrecognised(f"its projections are not {', '.join(_PROJECTIONS)}")
    positions, hidden = call.given.get("position_embeddings"), call.given.get("hidden_states")
    if not (isinstance(positions, tuple) and len(positions) == 2 and isinstance(hidden, Tensor)):
        return Unrecognised("it is not given hidden_states and position_embeddings (cos, sin)")
    if not all(isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point() for x in positions):
        return Unrecognised("its position embeddings are not two tables [B, S, R]")
    if not isinstance(call.output, tuple) or len(call.output) != 2:
        return Unrecognised("it does not answer with output and weights")
    named = _named_arguments(call, seen)
    if isinstance(named, Unrecognised):
        return named
    width = seen.query.shape[-1]
    for rotary in _rotary_forms(positions[0].shape[-1], width):
        for pair, per_head in _norm_forms(norms, width):
            form = AttentionForm(
                rotary, pair, per_head, *named, (seen.query.shape[1], seen.key.shape[1]), width
            )
            made = AttentionForward(module, form)
            if _matches(made, hidden, positions, seen):
                return _proved(made, call, seen, projected)
    return Unrecognised("no form of norms and rotary positions gives its queries and keys")


def _named_arguments(
    call: Call, seen: AttentionCall
) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]] | Unrecognised:
    """Constants, own tensors and passed arguments of the interface's call."""
    constants: dict[str, Any] = {}
    tensors: dict[str, str] = {}
    passed: list[str] = []
    own = {id(value): name for name, value in call.module._parameters.items()}
    own |= {id(value): name for name, value in call.module._buffers.items()}
    for name, value in seen.named.items():
        if name in call.extra and call.extra[name] is value:
            continue
        if name in call.given and call.given[name] is value:
            passed.append(name)
        elif id(value) in own:
            tensors[name] = own[id(value)]
        elif value is None or isinstance(value, int | float | bool | str):
            constants[name] = value
        else:
            return Unrecognised(f"it gives the attention interface a {name} that it computes")
    if seen.mask is not call.given.get("attention_mask"):
        return Unrecognised("it makes an attention mask of its own")
    return constants, tensors, tuple(passed)


def _rotary_forms(table: int, width: int) -> Iterator[RotaryForm]:
    """The likeliest first."""
    if table <= width and table % 2 == 0:
        yield RotaryForm(width=table)
        yield RotaryForm(width=table, pairs=True, table="once")
        yield RotaryForm(width=table, pairs=True, table="twice")
    if 2 * table <= width:
        yield RotaryForm(width=2 * table, table="once")
        yield RotaryForm(width=2 * table, pairs=True, table="once")


def _norm_forms(
    norms: dict[str, NormForward], width: int
) -> Iterator[tuple[tuple[NormForward, NormForward] | None, bool]]:
    for first, second in _NORM_NAMES:
        if first in norms and second in norms:
            pair = (norms[first], norms[second])
            weights = [forward.norm.weight for forward in pair]
            facts = {(forward.eps, forward.offset, forward.norm.weight is None) for forward in pair}
            same = len(facts) == 1
            sizes = {None if weight is None else weight.numel() for weight in weights}
            if same and sizes <= {None, width}:
                yield pair, True
            yield pair, False
    yield None, False


def _matches(
    made: AttentionForward, hidden: Tensor, positions: tuple[Tensor, Tensor], seen: AttentionCall
) -> bool:
    batch, length = hidden.shape[:2]
    try:
        with torch.no_grad():
            ours = made.heads(hidden, positions, None)[:3]
    except (RuntimeError, ValueError):
        return False
    for x, wanted in zip(ours, (seen.query, seen.key, seen.value), strict=True):
        shaped = x.view(batch, length, *x.shape[1:]).transpose(1, 2)
        if relative_error(shaped, wanted) > tolerance(wanted.dtype):
            return False
    return True


def _proved(
    made: AttentionForward, call: Call, seen: AttentionCall, projected: Call | None
) -> AttentionForward | Unrecognised:
    """Whether what follows attention is the output projection and nothing else."""
    out = seen.output.reshape(*call.given["hidden_states"].shape[:2], -1)
    if (
        projected is None
        or not isinstance(projected.input, Tensor)
        or projected.input.shape != out.shape
        or relative_error(projected.input, out) > tolerance(out.dtype)
        or relative_error(projected.first_output, call.output[0]) > tolerance(out.dtype)
    ):
        return Unrecognised("it does more to its output than to project it")
    return made
