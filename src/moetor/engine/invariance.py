"""What `batch_invariant` needs of a model, and the proof that it holds.

Every token of a step is attended as if it were its sequence's only new one, all torch operations
run under `moetor.kernels.rows_apart`, MoE layers are fused with `batch_invariant=True`, and rows
are sampled one by one. What is left is the family's own code, which may do anything with the rows
of a step: it is run on a few random sequences, alone and together.
"""

from __future__ import annotations

import torch

from moetor.config import RunnerConfig
from moetor.engine.config import EngineConfig
from moetor.engine.model import ServedModel
from moetor.engine.source import ModelSource
from moetor.engine.strategy import Strategy
from moetor.engine.trial import CHUNKED, apart, random_tokens, run_plan
from moetor.errors import ConfigError, UnsupportedError
from moetor.huggingface.devices import find_device
from moetor.huggingface.experts_backend import NAME as BACKEND
from moetor.huggingface.modules import FusedMoEBlock, fused_modules
from moetor.huggingface.tensor_parallel import spread_over

# Each sequence by itself: its prompt in one piece, then tokens one at a time.
_ALONE = tuple(
    tuple(count if place == mine else 0 for place in range(3))
    for mine, length in enumerate(map(sum, zip(*CHUNKED, strict=True)))
    for count in (length - 2, 1, 1)
)


def check_request(source: ModelSource, config: EngineConfig) -> None:
    """Refuses what cannot be batch invariant, before anything is loaded.

    Raises:
        ConfigError: several ranks, experts in host memory, or a model that was fused without it.
        UnsupportedError: a device for which it is not proved.
    """
    if not config.batch_invariant:
        return
    live = not isinstance(source.model, str)
    device = source.model.device if live else find_device(source.device)
    if device.type != "cpu":
        raise UnsupportedError(
            f"batch_invariant=True was asked for on {device}; it is held on CPUs only so far: "
            "attention on a GPU splits a sequence's keys by how many sequences there are. Leave "
            "batch_invariant=False, or take device='cpu'"
        )
    if source.parallel is not None or (live and spread_over(source.model) is not None):
        raise ConfigError(
            "batch_invariant=True is for one rank: what ranks add up for each other depends on "
            "the step; leave out parallel, or leave batch_invariant=False"
        )
    if source.cpu_experts is not None:
        raise ConfigError(
            "batch_invariant=True and cpu_experts cannot be had together: which device computes "
            "an expert depends on the step; leave out one of the two"
        )
    if live:
        _check_fused(source)


def _check_fused(source: ModelSource) -> None:
    """Refuses a live model whose experts are ours already, and not batch invariant."""
    other = [
        path
        for path, module in fused_modules(source.model)
        if not (
            module.config.runner.batch_invariant
            if isinstance(module, FusedMoEBlock)
            else module.routed_experts.method.batch_invariant
        )
    ]
    if other:
        raise ConfigError(
            f"batch_invariant=True, and {other[0]} was fused without it; call moetor.unfuse(model) "
            "first and leave the fusing to the engine, or fuse with "
            "runner=RunnerConfig(batch_invariant=True)"
        )
    text = source.model.config.get_text_config(decoder=True)
    if source.level == "none" and getattr(text, "_experts_implementation", None) == BACKEND:
        raise ConfigError(
            f"batch_invariant=True, and level 'none' leaves experts_implementation={BACKEND!r}, "
            "which does not keep it; take another level, or experts_implementation='eager'"
        )


def runner_config(config: EngineConfig) -> RunnerConfig | None:
    """How MoE layers are to be fused; None for the default."""
    return RunnerConfig(batch_invariant=True) if config.batch_invariant else None


def prove(served: ServedModel, strategy: Strategy) -> None:
    """Shows on random tokens that logits have the same bits alone and together, in one piece and
    in parts.

    Raises:
        UnsupportedError: they have not, or the family's cache or code is not for it.
    """
    family = type(served.model).__name__
    if strategy.name != "paged":
        raise UnsupportedError(
            f"batch_invariant=True needs a family whose cache is paged, and that of {family} is "
            f"{strategy}: what it keeps of a prompt depends on the parts in which the prompt is "
            "computed. Leave batch_invariant=False for this model"
        )
    tokens = random_tokens(served)
    alone = run_plan(served, strategy, tokens, _ALONE, batch_invariant=True)
    together = run_plan(served, strategy, tokens, CHUNKED, batch_invariant=True)
    plain = run_plan(served, strategy, tokens, CHUNKED)
    failure = next((found for found in (alone, together, plain) if isinstance(found, str)), None)
    if failure is None:
        assert not isinstance(alone, str)
        assert not isinstance(together, str)
        assert not isinstance(plain, str)
        failure = apart(alone, plain)
        if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
            failure = "on random tokens its logits alone and in a batch have other bits"
    if failure is not None:
        raise UnsupportedError(
            f"batch_invariant=True cannot be held for {family}: {failure}. Leave "
            "batch_invariant=False for this model"
        )
