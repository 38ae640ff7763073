"""The engine: continuous batching over a Transformers model.

It owns scheduling, cache, sampling and CUDA graphs; the model's code is its own.
"""

from moetor.engine.aio import AsyncEngine, EngineStoppedError, OutputStream
from moetor.engine.build import Engine, ModelSource, build_engine
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

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "EngineStoppedError",
    "Logprob",
    "ModelSource",
    "OutputStream",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "build_engine",
]
