"""Finding a layer by its name from inside a custom op, which can be given only tensors and
strings.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from moetor.errors import InputError
from moetor.layer.recording import RoutingRecorder, RoutingReplay

if TYPE_CHECKING:
    from moetor.layer.runner.base import ExpertsOwner

_names_lock = threading.Lock()
_layers: weakref.WeakValueDictionary[str, ExpertsOwner] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a forward pass knows besides its tensors.

    Attributes:
        layers: the layers it may find by name.
        recorder: notes which experts every layer chose.
        replay: ids that layers are to use instead of their own choice.
        tokens: bool [T], which rows of a call are tokens; None for all. The others fill up a
            captured graph: they are computed, and no choice of theirs is noted or counted.
    """

    layers: Mapping[str, ExpertsOwner] = field(default_factory=lambda: _layers)
    recorder: RoutingRecorder | None = None
    replay: RoutingReplay | None = None
    tokens: Tensor | None = None


_DEFAULT = ForwardContext()
_current: ContextVar[ForwardContext] = ContextVar("moetor_forward_context", default=_DEFAULT)


def register_layer(layer: ExpertsOwner, wanted: str) -> str:
    """Files a layer under `wanted`, or under `wanted#2`, `#3`, ... while another living layer
    has that name.
    """
    with _names_lock:
        for number in itertools.count(1):
            name = wanted if number == 1 else f"{wanted}#{number}"
            if _layers.get(name) in (None, layer):
                _layers[name] = layer
                return name
    raise AssertionError("itertools.count does not end")


def get_forward_context() -> ForwardContext:
    """The context of the forward pass in progress; outside of any, one that knows every living
    layer.
    """
    return _current.get()


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Makes `context` current inside the `with` block."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


@contextmanager
def only_tokens(tokens_T: Tensor) -> Iterator[None]:
    """Inside the `with` block only these rows of each call, bool [T], are tokens."""
    with forward_context(replace(get_forward_context(), tokens=tokens_T)):
        yield


def find_layer(name: str) -> ExpertsOwner:
    """The layer called `name` in the current context.

    Raises:
        InputError: there is none.
    """
    layer = get_forward_context().layers.get(name)
    if layer is None:
        raise InputError(f"no MoE layer called {name!r} is alive in this forward context")
    return layer
