"""How many blocks the cache has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moetor.engine.config import EngineConfig
from moetor.engine.graphs import graph_sizes
from moetor.engine.model import ServedModel
from moetor.engine.outputs import RequestMetrics
from moetor.engine.params import SamplingParams
from moetor.engine.prompt_graphs import prompt_sizes
from moetor.engine.runner import Runner
from moetor.engine.sequence import Request, Scheduled, Sequence
from moetor.engine.state import state_bytes
from moetor.engine.strategy import Strategy
from moetor.errors import ConfigError

# Of a CPU's memory that is free at the start, and at most.
_CPU_SHARE, _CPU_LIMIT = 0.25, 8 * 2**30
DEFAULT_LENGTH = 4096
# Logits in float32, their sorted copy, its indices and sums.
_SAMPLING_COPIES = 6
_GRAPH_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Size of the cache and what fits into it.

    Attributes:
        num_blocks: with the null block.
        max_model_len: tokens of a sequence.
    """

    num_blocks: int
    max_model_len: int


def plan_cache(
    config: EngineConfig, strategy: Strategy, free_bytes: int, context: int | None
) -> CachePlan:
    """Blocks for what is free, and the greatest length that they hold.

    Args:
        config: the engine's settings.
        strategy: for the bytes of a token.
        free_bytes: that the cache may take.
        context: tokens that the model can attend to, None where it does not say.

    Raises:
        ConfigError: the length that was asked for does not fit, or nothing does.
    """
    if config.max_model_len is not None and context is not None and config.max_model_len > context:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is above the {context} tokens that the model "
            "can attend to; lower it"
        )
    length = config.max_model_len or context or DEFAULT_LENGTH
    size = config.block_size
    block_bytes = size * sum(shape.token_bytes for shape in strategy.shapes.values())
    blocks = config.kv_cache_blocks
    if blocks is None:
        wanted = config.max_num_seqs * -(-length // size)
        blocks = max(0, min(wanted, free_bytes // max(1, block_bytes)))
    if blocks * size < min(length, size + 1) or (
        config.max_model_len is not None and blocks * size < length
    ):
        room = f"{blocks} blocks of {size} tokens ({blocks * block_bytes / 2**20:.0f} MiB)"
        raise ConfigError(
            f"one sequence of max_model_len {length} needs {-(-length // size)} blocks "
            f"({-(-length // size) * block_bytes / 2**20:.0f} MiB) and the cache has {room} with "
            f"{free_bytes / 2**20:.0f} MiB free for it; lower max_model_len or "
            "max_num_seqs, or raise kv_cache_blocks or gpu_memory_utilization"
        )
    return CachePlan(num_blocks=blocks + 1, max_model_len=min(length, blocks * size))


@contextmanager
def memory_errors(device: torch.device, asked: str, advice: str) -> Iterator[None]:
    """Says what was asked, what is free and what to do, where memory does not suffice.

    Raises:
        ConfigError: instead of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU has none of its own
        known = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if not known:
            raise
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            left = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU's memory are free"
        else:
            left = "the memory of this machine does not suffice"
        raise ConfigError(f"{asked} cannot be made: {left}; {advice}") from error


def free_memory(
    served: ServedModel, strategy: Strategy, config: EngineConfig, context: int | None
) -> int:
    """Bytes that the cache may take.

    On a GPU a full step is run first; free is the share `gpu_memory_utilization` of all memory,
    less what others have, less the most that torch held during that step, less what sampling and
    CUDA graphs will take.

    Raises:
        ConfigError: the full step does not fit.
    """
    states = (config.max_num_seqs + 1) * state_bytes(strategy.example_layers)
    if served.device.type == "cuda":
        return _free_on_gpu(served, strategy, config, context) - states
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = _CPU_LIMIT
    return min(_CPU_LIMIT, int(free * _CPU_SHARE)) - states


def _free_on_gpu(
    served: ServedModel, strategy: Strategy, config: EngineConfig, context: int | None
) -> int:
    device = served.device
    torch.cuda.reset_peak_memory_stats(device)
    try:
        full_step(served, strategy, config, context)
        torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"a step of {config.max_num_batched_tokens} tokens does not fit beside the weights "
            f"({free / 2**30:.1f} of {total / 2**30:.1f} GiB are free); lower "
            "max_num_batched_tokens"
        ) from error
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    reserve = step_reserve(config, served.vocab_size, graphs=strategy.paged)
    return int(total * config.gpu_memory_utilization) - outside - peak - reserve


def step_reserve(config: EngineConfig, vocab_size: int, *, graphs: bool = True) -> int:
    """Bytes that sampling and CUDA graphs take."""
    row_bytes = 4 * vocab_size
    reserve = _SAMPLING_COPIES * config.max_num_seqs * row_bytes
    if graphs and not config.enforce_eager:
        sizes = graph_sizes(config.max_num_seqs)
        reserve += len(sizes) * _GRAPH_BYTES + sum(sizes) * row_bytes
        prompts = len(prompt_sizes(config.max_num_batched_tokens))
        reserve += prompts * _GRAPH_BYTES + 2 * config.max_num_seqs * row_bytes
    return reserve


@torch.inference_mode()
def full_step(
    served: ServedModel, strategy: Strategy, config: EngineConfig, context: int | None
) -> None:
    """Computes as many tokens as a step may have, in a cache of their own."""
    length = min(config.max_num_batched_tokens, config.max_model_len or context or DEFAULT_LENGTH)
    each = -(-length // config.block_size)
    count = max(1, config.max_num_batched_tokens // length)
    runner = Runner(
        served,
        strategy,
        num_blocks=count * each + 1,
        block_size=config.block_size,
        rows=count,
        max_model_len=each * config.block_size,
    )
    parts = []
    for row in range(count):
        ids = [row % served.vocab_size] * length
        request = Request(str(row), None, ids, SamplingParams(), RequestMetrics(0.0))
        sequence = Sequence(request, 0, 0, frozenset(), 1, ids, length, row=row)
        sequence.blocks = list(range(1 + row * each, 1 + (row + 1) * each))
        parts.append(Scheduled(sequence, 0, length, True, False, 0))
    errors: dict[Sequence, Exception] = {}
    runner.forward(parts, errors)
    for error in errors.values():
        raise error
