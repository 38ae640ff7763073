"""What composites of some releases of Transformers need to run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def images_named(composite: nn.Module) -> AbstractContextManager[Any]:
    """Lets Llama 4's composite run, for the time of a context or, without one, for good.

    In Transformers 5.24.0 it reads a field of its language model's output that is not there, and
    so fails on every input. Other models are left as they are.
    """
    config = getattr(composite, "config", None)
    if getattr(config, "model_type", None) != "llama4":
        return nullcontext()
    return composite.get_submodule("language_model").register_forward_hook(_name_images)


def _name_images(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None
