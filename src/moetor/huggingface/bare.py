"""Modules without their forward hooks: what is tried out before a model is changed must not show
to whoever watches the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def hooks_off(model: nn.Module) -> Iterator[frozenset[nn.Module]]:
    """No forward hook of the model or of a part of it fires inside the `with` block, which is given
    the modules that have some.
    """
    kept = [(m, {name: m.__dict__[name] for name in _HOOKS}) for m in model.modules()]
    try:
        for module, _ in kept:
            module.__dict__.update({name: OrderedDict() for name in _HOOKS})
        yield frozenset(module for module, hooks in kept if any(hooks.values()))
    finally:
        for module, hooks in kept:
            module.__dict__.update(hooks)


def adopt_hooks(module: nn.Module, original: nn.Module) -> None:
    """Gives a module the forward hooks of the one that it replaces; both then share them, and the
    handles that remove them stay good.
    """
    module.__dict__.update({name: original.__dict__[name] for name in _HOOKS})


def bare_copy(module: nn.Module) -> nn.Module:
    """The module and everything below it, anew, around the same tensors, without forward hooks."""
    done: dict[int, nn.Module] = {}
    return _copy(module, done)


def _copy(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    twin = module.__class__.__new__(module.__class__)
    done[id(module)] = twin
    twin.__dict__.update(module.__dict__)
    for name in _HOOKS:
        twin.__dict__[name] = OrderedDict()
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_buffers"] = dict(module._buffers)
    twin.__dict__["_modules"] = {
        name: None if child is None else _copy(child, done)
        for name, child in module._modules.items()
    }
    return twin
