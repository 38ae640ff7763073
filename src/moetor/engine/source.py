"""Which model an engine runs, and how it was fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from moetor.offload_config import CpuExperts, OffloadConfig
from moetor.parallel.config import ParallelConfig
from moetor.quant_config import QuantConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Which model, and how it is loaded: the arguments of `LLM`."""

    model: Any
    tokenizer: Any = None
    processor: Any = None
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | QuantConfig | None = None
    kernel: str = "auto"
    level: Literal["auto", "block", "experts", "none"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    parallel: ParallelConfig | None = None
    cpu_experts: CpuExperts | OffloadConfig | None = None


class Fused(NamedTuple):
    """What the fusion report says, for who has no torch.

    Attributes:
        blocks: its blocks as plain data; None where the model came fused or is left as it is.
        lines: the same in short, for people.
    """

    blocks: list[dict[str, Any]] | None
    lines: list[str]
