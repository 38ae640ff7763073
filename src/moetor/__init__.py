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
    from moetor.engine import (
        LLM,
        AsyncEngine,
        RequestOutput,
        SamplingParams,
        StructuredOutputsParams,
    )
    from moetor.huggingface import (
        BlockReport,
        ExpertNames,
        FusionReport,
        MoEForCausalLM,
        MoEForMultimodalLM,
        ParallelReport,
        VerifyReport,
        explain,
        fuse,
        parallelize,
        record_routing,
        replay_routing,
        unfuse,
        verify,
    )
    from moetor.layer import ChunkedRunner, DefaultRunner, MoELayer, MoERunner, SimulatedRouter
    from moetor.offload_config import OffloadConfig
    from moetor.parallel.config import EplbConfig, ParallelConfig
    from moetor.quant_config import QuantConfig

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
    "moetor.engine": (
        "LLM",
        "AsyncEngine",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutputsParams",
    ),
    "moetor.offload_config": ("OffloadConfig",),
    "moetor.quant_config": ("QuantConfig",),
    "moetor.huggingface": (
        "BlockReport",
        "ExpertNames",
        "FusionReport",
        "ParallelReport",
        "MoEForCausalLM",
        "MoEForMultimodalLM",
        "VerifyReport",
        "explain",
        "fuse",
        "parallelize",
        "record_routing",
        "replay_routing",
        "unfuse",
        "verify",
    ),
    "moetor.layer": ("ChunkedRunner", "DefaultRunner", "MoELayer", "MoERunner", "SimulatedRouter"),
    "moetor.parallel.config": ("EplbConfig", "ParallelConfig"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "Activation",
    "AsyncEngine",
    "BlockReport",
    "ChunkedRunner",
    "DefaultRunner",
    "EplbConfig",
    "ExpertNames",
    "ExpertsConfig",
    "FusionReport",
    "MoEConfig",
    "MoEForCausalLM",
    "MoEForMultimodalLM",
    "MoELayer",
    "MoERunner",
    "OffloadConfig",
    "ParallelConfig",
    "ParallelReport",
    "QuantConfig",
    "RequestOutput",
    "RouterConfig",
    "RunnerConfig",
    "SamplingParams",
    "SharedExpertsConfig",
    "SimulatedRouter",
    "StructuredOutputsParams",
    "VerifyReport",
    "__version__",
    "explain",
    "fuse",
    "parallelize",
    "record_routing",
    "replay_routing",
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


def _register(registry: Any, function: str) -> None:
    """Adds "moetor" to a registry of Transformers; with an unsupported release, as a refusal."""
    from moetor.errors import VersionError

    try:
        backend = importlib.import_module("moetor.huggingface.experts_backend")
    except VersionError as error:
        refusal = error

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise refusal

        registry.register("moetor", refuse)
    else:
        registry.register("moetor", getattr(backend, function))


wrapt.register_post_import_hook(
    lambda module: _register(module.ALL_EXPERTS_FUNCTIONS, "moetor_experts_forward"),
    "transformers.integrations.moe",
)
wrapt.register_post_import_hook(
    lambda module: _register(module.ALL_FP8_EXPERTS_FUNCTIONS, "moetor_fp8_experts_forward"),
    "transformers.integrations.finegrained_fp8",
)
