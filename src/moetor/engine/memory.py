"""How many blocks the cache has."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from moetor.engine.config import EngineConfig
from moetor.engine.strategy import Strategy
from moetor.errors import ConfigError

# Of a CPU's memory that is free at the start, and at most.
_CPU_SHARE, _CPU_LIMIT = 0.25, 8 * 2**30
_DEFAULT_LENGTH = 4096


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
    length = config.max_model_len or context or _DEFAULT_LENGTH
    size = config.block_size
    block_bytes = size * sum(shape.token_bytes for shape in strategy.shapes.values())
    blocks = config.kv_cache_blocks
    if blocks is None:
        wanted = config.max_num_seqs * -(-length // size)
        blocks = min(wanted, free_bytes // max(1, block_bytes))
    if blocks * size < min(length, size + 1) or (
        config.max_model_len is not None and blocks * size < length
    ):
        room = f"{blocks} blocks of {size} tokens ({blocks * block_bytes / 2**20:.0f} MiB)"
        raise ConfigError(
            f"one sequence of max_model_len {length} needs {-(-length // size)} blocks "
            f"({-(-length // size) * block_bytes / 2**20:.0f} MiB) and the cache has {room} with "
            f"{free_bytes / 2**20:.0f} MiB free for it; lower max_model_len, or raise "
            "kv_cache_blocks or gpu_memory_utilization"
        )
    return CachePlan(num_blocks=blocks + 1, max_model_len=min(length, blocks * size))


def free_memory(device: torch.device, utilization: float) -> int:
    """Bytes that the cache may take once the weights are there and a full step has been run.

    On a GPU this is the share `utilization` of all memory, less what is in use (by anyone) and
    less the most that torch held during that step.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.memory_reserved(device)
        outside = total - free - reserved
        return int(total * utilization) - outside - peak
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = _CPU_LIMIT
    return min(_CPU_LIMIT, int(free * _CPU_SHARE))
