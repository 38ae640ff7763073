"""How many layers' experts stay in host memory, and how many of these the GPU caches: from sizes
alone, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetor.errors import ConfigError
from moetor.layer.offload.store import CHUNK_BYTES
from moetor.offload_config import OffloadConfig


@dataclass(frozen=True, slots=True)
class LayerNeed:
    """One layer's routed experts.

    Attributes:
        nbytes: of all their weights.
    """

    name: str
    num_experts: int
    nbytes: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return -(-self.nbytes // self.num_experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What goes where, in bytes.

    Attributes:
        layers: names of those whose experts stay in host memory, in the model's order.
        cache_experts: of each of these layers, at a time on the GPU.
        dense_bytes: of all other weights, on the GPU.
        resident_bytes: of the experts that are on the GPU for good.
        cache_bytes: of the cache.
        staging_bytes: of the chunks in which experts come for long prompts.
        reserve: left for keys and values and for activations.
        gpu_memory: what all of it may take; None where nothing bounds it.
        host_bytes: of the experts in host memory.
        host_memory: what is free there; None where nobody looked.
    """

    layers: tuple[str, ...]
    cache_experts: int
    dense_bytes: int
    resident_bytes: int
    cache_bytes: int
    staging_bytes: int
    reserve: int
    gpu_memory: int | None
    host_bytes: int
    host_memory: int | None

    @property
    def gpu_bytes(self) -> int:
        """Of everything on the GPU."""
        weights = self.dense_bytes + self.resident_bytes
        return weights + self.cache_bytes + self.staging_bytes + self.reserve

    def lines(self) -> list[str]:
        """For people."""
        if not self.layers:
            return [f"experts in host memory: none; GPU {_gib(self.gpu_bytes)}"]
        count = len(self.layers)
        host = "" if self.host_memory is None else f" of {_gib(self.host_memory)} free"
        bound = "" if self.gpu_memory is None else f" of {_gib(self.gpu_memory)}"
        return [
            f"experts in host memory: {count} layers, {self.layers[0]} to {self.layers[-1]}: "
            f"{_gib(self.host_bytes)}{host}",
            f"on the GPU: {_gib(self.gpu_bytes)}{bound}: experts {_gib(self.resident_bytes)}, "
            f"other weights {_gib(self.dense_bytes)}, {self.cache_experts} hot experts of each of "
            f"these layers {_gib(self.cache_bytes)}, chunks for long prompts "
            f"{_gib(self.staging_bytes)}, for keys, values and activations {_gib(self.reserve)}",
        ]


def plan_memory(
    needs: Sequence[LayerNeed],
    dense_bytes: int,
    config: OffloadConfig,
    *,
    gpu_memory: int | None,
    host_memory: int | None,
) -> MemoryPlan:
    """Where each layer's experts go.

    Args:
        needs: every MoE layer, in the model's order.
        dense_bytes: of all other weights.
        gpu_memory: that all of it may take; None: nothing bounds it.
        host_memory: that is free; None: not to be looked at.

    Raises:
        ConfigError: more layers than there are, or too little memory, with the numbers.
    """
    count = _layers_on_host(needs, dense_bytes, config, gpu_memory)
    away = needs[len(needs) - count :]
    host_bytes = sum(need.nbytes for need in away)
    if host_memory is not None and host_bytes > host_memory:
        raise ConfigError(
            f"the experts of {count} layers take {_gib(host_bytes)} of host memory, of which "
            f"{_gib(host_memory)} are free; quantise the experts, or leave more layers on the GPU"
        )
    fixed = _fixed_bytes(needs, dense_bytes, config, count)
    each = sum(need.expert_bytes for need in away)
    most = max((need.num_experts for need in away), default=0)
    if config.cache_experts != "auto":
        slots = min(config.cache_experts, most)
        if gpu_memory is not None and fixed + slots * each > gpu_memory:
            raise ConfigError(
                f"cache_experts={config.cache_experts} takes {_gib(slots * each)} and "
                f"{_gib(gpu_memory - fixed)} of the GPU's memory are left for it; possible: up to "
                f"{max(0, gpu_memory - fixed) // each}"
            )
    else:
        free = 0 if gpu_memory is None else gpu_memory - fixed
        slots = min(most, max(0, free) // each) if away else 0
    return MemoryPlan(
        layers=tuple(need.name for need in away),
        cache_experts=slots,
        dense_bytes=dense_bytes,
        resident_bytes=sum(need.nbytes for need in needs) - host_bytes,
        cache_bytes=slots * each,
        staging_bytes=_staging_bytes(away),
        reserve=config.reserved_bytes,
        gpu_memory=gpu_memory,
        host_bytes=host_bytes,
        host_memory=host_memory,
    )


def _layers_on_host(
    needs: Sequence[LayerNeed], dense_bytes: int, config: OffloadConfig, gpu_memory: int | None
) -> int:
    if config.cpu_experts != "auto":
        if config.cpu_experts > len(needs):
            raise ConfigError(
                f"cpu_experts={config.cpu_experts} is above the {len(needs)} MoE layers that there "
                "are"
            )
        wanted = range(config.cpu_experts, config.cpu_experts + 1)
    elif gpu_memory is None:
        raise ConfigError("cpu_experts='auto' needs to know the GPU's memory; give gpu_memory")
    else:
        wanted = range(len(needs) + 1)
    if gpu_memory is None:
        return wanted[0]
    for count in wanted:
        if _fixed_bytes(needs, dense_bytes, config, count) <= gpu_memory:
            return count
    every = _fixed_bytes(needs, dense_bytes, config, len(needs))
    asked = _fixed_bytes(needs, dense_bytes, config, wanted[-1])
    advice = "lower the reserve, quantise, or take a larger GPU"
    if every <= gpu_memory:
        fits = (n for n in range(len(needs) + 1) if n > wanted[-1])
        least = next(n for n in fits if _fixed_bytes(needs, dense_bytes, config, n) <= gpu_memory)
        advice = f"possible: cpu_experts from {least} on, or 'auto'"
    raise ConfigError(
        f"with the experts of {wanted[-1]} of {len(needs)} MoE layers in host memory the GPU needs "
        f"{_gib(asked)} and {_gib(gpu_memory)} are there ({_gib(dense_bytes)} of weights other "
        f"than experts, {_gib(config.reserved_bytes)} in reserve); {advice}"
    )


def _fixed_bytes(
    needs: Sequence[LayerNeed], dense_bytes: int, config: OffloadConfig, count: int
) -> int:
    """On the GPU, without the cache, with the last `count` layers' experts elsewhere."""
    here, away = needs[: len(needs) - count], needs[len(needs) - count :]
    resident = sum(need.nbytes for need in here)
    return dense_bytes + resident + _staging_bytes(away) + config.reserved_bytes


def _staging_bytes(away: Sequence[LayerNeed]) -> int:
    """Two chunks for each size of experts."""
    sizes = {(need.num_experts, need.expert_bytes) for need in away}
    return sum(2 * min(max(CHUNK_BYTES, one), number * one) for number, one in sizes)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"
