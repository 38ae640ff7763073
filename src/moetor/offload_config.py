"""How experts are kept in host memory and computed there; no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moetor.errors import ConfigError

CpuExperts = int | Literal["auto"]
DEFAULT_RESERVE = 2 * 2**30
_HELP = "take the number of layers, or 'auto' for those that the GPU has no room for"


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """Experts of the last layers stay in host memory, where the native CPU kernel computes them.

    Attributes:
        cpu_experts: MoE layers, counted from the last one, whose experts are there; `auto`: as few
            as the GPU's memory allows.
        cache_experts: experts of each of these layers that are on the GPU as well, those that were
            chosen most in the last steps; `auto`: as many as there is room for; 0: none. Then, and
            with a number for `stream_min_tokens`, two runs give the same bits.
        stream_min_tokens: calls with at least so many tokens compute on the GPU, to which the
            layer's experts are copied for the time of the call; `auto` measures from how many on
            that is faster; 0: never.
        moves_per_step: experts that may change their place in the cache in one step, of all layers
            together.
        decay: what a step's choices count in the next step.
        gpu_memory: bytes of the GPU that weights, caches and all else may take together; None for
            nine tenths of what is free.
        host_memory: bytes that the experts may take of host memory; None for what is free.
        reserve: bytes of the GPU's that are left for keys and values and for a step's activations;
            None: the engine works it out, all others leave `DEFAULT_RESERVE`.
        accelerator: `cpu` puts the GPU's part on the CPU too, to test without one.

    Raises:
        ConfigError: a value out of its range.
    """

    cpu_experts: CpuExperts = "auto"
    cache_experts: CpuExperts = "auto"
    stream_min_tokens: CpuExperts = "auto"
    moves_per_step: int = 8
    decay: float = 0.95
    gpu_memory: int | None = None
    host_memory: int | None = None
    reserve: int | None = None
    accelerator: Literal["cuda", "cpu"] = "cuda"

    @property
    def reserved_bytes(self) -> int:
        """The reserve, or its default."""
        return DEFAULT_RESERVE if self.reserve is None else self.reserve

    def __post_init__(self) -> None:
        for name in ("cpu_experts", "cache_experts", "stream_min_tokens"):
            value = getattr(self, name)
            if value == "auto":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name}={value!r} is neither 'auto' nor a number from 0 on")
        for name in ("moves_per_step", "reserve"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("gpu_memory", "host_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1 byte")
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay={self.decay:g} must be from 0 to below 1")
        if self.accelerator not in ("cuda", "cpu"):
            raise ConfigError(f"accelerator={self.accelerator!r} is not one of cuda, cpu")


def parse_bytes(text: str, name: str) -> int:
    """Bytes of a size such as 24GiB, 24GB, 512MiB or 1000000.

    Args:
        name: of what has this size.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text.strip())
    if found is None or (found[3] and not found[2]):
        raise ConfigError(
            f"{name}={text!r} is no size; write for example 24GiB, 24GB or a number of bytes"
        )
    power = "kMGT".find(found[2]) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def offload_config(cpu_experts: CpuExperts | OffloadConfig | None) -> OffloadConfig | None:
    """What is asked for; None where no experts stay in host memory.

    Raises:
        ConfigError: it is neither a number, nor `auto`, nor an `OffloadConfig`.
    """
    if isinstance(cpu_experts, OffloadConfig) or cpu_experts is None:
        return cpu_experts
    if cpu_experts != "auto" and (not isinstance(cpu_experts, int) or cpu_experts is True):
        raise ConfigError(f"cpu_experts={cpu_experts!r}: {_HELP}")
    return OffloadConfig(cpu_experts=cpu_experts)
