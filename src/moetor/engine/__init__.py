"""The engine: continuous batching over a Transformers model.

It owns scheduling, cache, sampling and CUDA graphs; the model's code is its own. Names are loaded
when they are used, so that settings can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetor.engine.aio import AsyncEngine
    from moetor.engine.build import Engine, build_engine
    from moetor.engine.client import EngineClient, EngineStoppedError, OutputStream
    from moetor.engine.config import EngineConfig
    from moetor.engine.llm import LLM
    from moetor.engine.outputs import (
        CompletionOutput,
        EngineStats,
        Logprob,
        RequestMetrics,
        RequestOutput,
    )
    from moetor.engine.params import SamplingParams
    from moetor.engine.process import EngineProcess
    from moetor.engine.source import ModelSource
    from moetor.engine.structured import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineClient",
    "EngineConfig",
    "EngineProcess",
    "EngineStats",
    "EngineStoppedError",
    "Logprob",
    "ModelSource",
    "OutputStream",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "build_engine",
]

_HOME_OF = {
    "AsyncEngine": "aio",
    "CompletionOutput": "outputs",
    "Engine": "build",
    "EngineClient": "client",
    "EngineConfig": "config",
    "EngineProcess": "process",
    "EngineStats": "outputs",
    "EngineStoppedError": "client",
    "LLM": "llm",
    "Logprob": "outputs",
    "ModelSource": "source",
    "OutputStream": "client",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "params",
    "StructuredOutputsParams": "structured",
    "build_engine": "build",
}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
