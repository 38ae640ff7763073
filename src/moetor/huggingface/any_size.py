"""Calling originals whose sizes Transformers' grouped product refuses.

`torch._grouped_mm`, which Transformers uses by default, takes rows of a multiple of 16 bytes alone.
Such a model runs in Transformers only with `experts_implementation="eager"`, and so it is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
_REFUSAL = "multiple of 16 bytes"


def call_original(module: nn.Module, call: Callable[[], T]) -> T:
    """`call()`, which runs `module`; once more with eager experts where their sizes are refused."""
    try:
        return call()
    except RuntimeError as refusal:
        if _REFUSAL not in str(refusal):
            raise
    with _eager_experts(module):
        return call()


@contextmanager
def _eager_experts(module: nn.Module) -> Iterator[None]:
    """The experts below the module run in Transformers' plain loop."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = part.__dict__.get("config")
        if getattr(config, "_experts_implementation", None) is not None:
            configs[id(config)] = config
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
