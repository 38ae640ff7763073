"""What `moetor bench layer` is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetor.bench.shapes import LayerShape, check_tokens
from moetor.layer.routing.simulator import Pattern


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBenchRequest:
    """What to measure.

    Attributes:
        tokens: each T to measure.
        device: `cpu` or `cuda`.
        threads: of the CPU; None leaves torch's setting.
        kernel: a kernel's name, or `auto`.
        peers: other implementations to compare with, by `moetor.bench.peers.PeerName`.
        variants: other plans of the Triton kernels, by `moetor.bench.plan_variants.VariantName`.
        quantizations: formats in which the same weights are measured too, as `--quantization` of
            other commands takes them.
        seconds: no row is begun after so many; None: no limit.
    """

    shapes: tuple[LayerShape, ...]
    tokens: tuple[int, ...]
    dtype: torch.dtype
    device: str
    threads: int | None
    kernel: str
    peers: tuple[str, ...]
    routing: Pattern
    seed: int
    variants: tuple[str, ...] = ()
    quantizations: tuple[str, ...] = ()
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
