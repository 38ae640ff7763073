"""The engine's settings, from which the flags of commands are generated."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from moetor.errors import ConfigError

ENGINE = "engine"
LoadFormat = Literal["auto", "dummy"]
FuseDense = Literal["auto", "on", "off"]


def _flag(help_text: str, metavar: str | None = None) -> dict[str, str]:
    named = {} if metavar is None else {"metavar": metavar}
    return {"group": ENGINE, "help": help_text, **named}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How requests are batched and how much memory the cache takes.

    With `batch_invariant` a request's tokens and log-probabilities are, bit for bit, the same alone
    and in any batch, with or without the prefix cache, in whatever chunks its prompt is computed,
    and after preemption: on one machine, with the same dtype, kernels and number of threads. It is
    for a CPU and for families whose cache is paged; anything else is refused (docs/engine.md).

    Options of a command may inherit from it: its fields become flags, and `of` picks them out.

    Raises:
        ConfigError: a value is out of its range, or two contradict each other.
    """

    max_model_len: int | None = field(
        default=None,
        metadata=_flag(
            "tokens of a prompt and its continuation together, at most; without it, what the model "
            "and the cache allow",
            "N",
        ),
    )
    max_num_seqs: int = field(
        default=256, metadata=_flag("sequences that are computed at the same time, at most", "N")
    )
    max_num_batched_tokens: int = field(
        default=2048,
        metadata=_flag("tokens of one step, at most; longer prompts are computed in chunks", "N"),
    )
    block_size: int = field(default=16, metadata=_flag("tokens of one block of the cache", "N"))
    kv_cache_blocks: int | None = field(
        default=None,
        metadata=_flag("blocks of the cache; without it, as many as the memory allows", "N"),
    )
    gpu_memory_utilization: float = field(
        default=0.9,
        metadata=_flag(
            "share of the GPU's memory that weights, graphs and cache may take together", "X"
        ),
    )
    enable_prefix_caching: bool = field(
        default=True,
        metadata=_flag("requests with the same beginning share its blocks of the cache"),
    )
    enforce_eager: bool = field(default=False, metadata=_flag("do not capture CUDA graphs"))
    fuse_dense: FuseDense = field(
        default="auto",
        metadata=_flag(
            "also fuse what stands around the experts: norms with sums, products with one input, "
            "rotary positions with the cache's write; auto does so on a GPU, and on a CPU that has "
            "the native kernel"
        ),
    )
    batch_invariant: bool = field(
        default=False,
        metadata=_flag(
            "a request's tokens and log-probabilities have the same bits alone and in any batch; "
            "slower, on a CPU, and not for every family"
        ),
    )
    seed: int = field(default=0, metadata=_flag("of the requests that bring no seed", "N"))
    record_expert_load: bool = field(
        default=False, metadata=_flag("count how many tokens each expert gets")
    )
    enable_return_routed_experts: bool = field(
        default=False,
        metadata=_flag("give back which experts each token of a sequence went to"),
    )
    load_format: LoadFormat = field(
        default="auto",
        metadata=_flag("dummy makes random weights of the model's shapes instead of reading them"),
    )

    @classmethod
    def of(cls, options: EngineConfig, **changed: Any) -> EngineConfig:
        """The engine's part of a command's options, with some fields changed."""
        own = {one.name: getattr(options, one.name) for one in fields(EngineConfig)}
        return EngineConfig(**(own | changed))

    def fuses_dense(self, device_type: str) -> bool:
        """Whether dense parts are to be fused on such a device."""
        if self.fuse_dense != "auto":
            return self.fuse_dense == "on"
        from moetor.kernels.native import dense as native  # with torch, which flags need not

        return device_type == "cuda" or (device_type == "cpu" and native.available())

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_model_len", "kv_cache_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs="
                f"{self.max_num_seqs}: a step has one token of each sequence; lower max_num_seqs"
            )
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size={self.block_size} must be a power of two")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization:g} must be above 0 and at "
                "most 1"
            )
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2^64")
        if self.fuse_dense not in ("auto", "on", "off"):
            raise ConfigError(f"fuse_dense={self.fuse_dense!r} is not one of auto, on, off")
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format={self.load_format!r} is not one of auto, dummy")
