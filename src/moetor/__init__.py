"""Moetor: Mixture-of-Experts models of Hugging Face Transformers at the speed of the hardware.

`import moetor` is light: names are loaded when they are used, and `experts_implementation="moetor"`
is registered when Transformers loads its own registry of experts functions, before or after us.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from moetor.config import (
        Activation,
        ExpertsConfig,
        MoEConfig,
        RouterConfig,
        RunnerConfig,
        SharedExpertsConfig,
    )
    from moetor.huggingface import (
        BlockReport,
        FusionReport,
        VerifyReport,
        explain,
        fuse,
        unfuse,
        verify,
    )
    from moetor.layer import ChunkedRunner, DefaultRunner, MoELayer, MoERunner, SimulatedRouter

__version__ = "0.1.0"

_HOMES = {
    "moetor.config": (
        "Activation",
        "ExpertsConfig",
        "MoEConfig",
        "RouterConfig",
        "RunnerConfig",
        "SharedExpertsConfig",
    ),
    "moetor.huggingface": (
        "BlockReport",
        "FusionReport",
        "VerifyReport",
        "explain",
        "fuse",
        "unfuse",
        "verify",
    ),
    "moetor.layer": ("ChunkedRunner", "DefaultRunner", "MoELayer", "MoERunner", "SimulatedRouter"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Activation",
    "BlockReport",
    "ChunkedRunner",
    "DefaultRunner",
    "ExpertsConfig",
    "FusionReport",
    "MoEConfig",
    "MoELayer",
    "MoERunner",
    "RouterConfig",
    "RunnerConfig",
    "SharedExpertsConfig",
    "SimulatedRouter",
    "VerifyReport",
    "__version__",
    "explain",
    "fuse",
    "unfuse",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'moetor' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_experts(_module: Any) -> None:
    importlib.import_module("moetor.huggingface.experts_backend").register()


def _register_fp8_experts(_module: Any) -> None:
    importlib.import_module("moetor.huggingface.experts_backend").register_fp8()


wrapt.register_post_import_hook(_register_experts, "transformers.integrations.moe")
wrapt.register_post_import_hook(_register_fp8_experts, "transformers.integrations.finegrained_fp8")
