"""Runners: the order in which the parts of a layer are called."""

from moetor.config import RunnerConfig
from moetor.layer.runner.base import MoERunner
from moetor.layer.runner.chunked import ChunkedRunner
from moetor.layer.runner.default import DefaultRunner
from moetor.layer.runner.dual_batch import DualBatchRunner

__all__ = ["ChunkedRunner", "DefaultRunner", "DualBatchRunner", "MoERunner", "make_runner"]


def make_runner(config: RunnerConfig) -> MoERunner:
    """The runner that `config` names."""
    if config.name == "chunked":
        return ChunkedRunner(config.workspace_bytes)
    if config.name == "dual_batch":
        return DualBatchRunner(config.dual_batch_min_tokens)
    return DefaultRunner()
