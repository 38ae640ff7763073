"""What `fuse` may be asked for, and what it refuses before anything is read or built."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from moetor.config import RunnerConfig
from moetor.errors import ConfigError, FusionError, KernelRefusedError
from moetor.huggingface.dense_fusing import is_dense_fused
from moetor.huggingface.modules import fused_modules
from moetor.huggingface.quantized_loading import held_experts
from moetor.kernels.formats import QuantizedExpertWeights
from moetor.kernels.select import kernel_names
from moetor.offload_config import CpuExperts, OffloadConfig, offload_config
from moetor.quant_config import QuantConfig
from moetor.quantization.method import METHODS, quant_config

FuseLevel = Literal["auto", "block", "experts"]
VerifyMode = bool | Literal["sample"]
Progress = Callable[[int, int, str], None]
"""`progress(done, total, name of the block)`."""


class Proofs:
    """Which replacements are compared with their originals: all, none, or one of each form."""

    def __init__(self, verify: VerifyMode) -> None:
        self.verify = verify
        self._seen: set[Hashable] = set()

    def needed(self, form: Hashable) -> bool:
        """Whether this block is compared; `form` is what blocks share that differ in weights."""
        new = form not in self._seen
        self._seen.add(form)
        return new if self.verify == "sample" else bool(self.verify)


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseOptions:
    """What `fuse` was asked for.

    Attributes:
        held: experts that were loaded quantised, by path of their module, whose own weights are
            stand-ins.
        offload: which experts stay in host memory.
    """

    level: FuseLevel
    quantization: str | QuantConfig | None
    runner: RunnerConfig
    proofs: Proofs
    offload: OffloadConfig | None = None
    held: Mapping[str, QuantizedExpertWeights] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """The quant method that blocks are built with; weights are quantised afterwards."""
        return (
            self.quantization
            if isinstance(self.quantization, str) and (self.quantization in METHODS)
            else None
        )


def check_options(
    model: nn.Module,
    level: str,
    kernel: str,
    quantization: str | QuantConfig | None,
    verify: VerifyMode,
    runner: RunnerConfig | None,
    cpu_experts: CpuExperts | OffloadConfig | None = None,
) -> FuseOptions:
    """The options of a call of `fuse`.

    Raises:
        ConfigError, KernelRefusedError: they mean nothing, or contradict one another.
        FusionError: the model is fused already or in training mode.
    """
    check_request(level, kernel, quantization)
    if verify not in (True, False, "sample"):
        raise ConfigError(f"verify={verify!r} is not one of True, False, 'sample'")
    runner = runner or RunnerConfig()
    if runner.kernel not in ("auto", kernel):
        raise ConfigError(
            f"kernel={kernel!r} and runner.kernel={runner.kernel!r} disagree; name one of them"
        )
    if runner.hidden_multiple != 1:
        raise ConfigError("fuse shares the model's weights and cannot pad them: hidden_multiple=1")
    if fused_modules(model) or is_dense_fused(model):
        raise FusionError("the model is fused already; call moetor.unfuse(model) first")
    if model.training and any(parameter.requires_grad for parameter in model.parameters()):
        raise FusionError(
            "the model is in training mode and its parameters want gradients; fused layers are "
            "for inference. Call model.eval() first"
        )
    return FuseOptions(
        level=level,  # type: ignore[arg-type]  # checked above
        quantization=quantization,
        runner=RunnerConfig(
            name=runner.name,
            workspace_bytes=runner.workspace_bytes,
            kernel=kernel,
            batch_invariant=runner.batch_invariant,
            reduce_results=runner.reduce_results,
        ),
        proofs=Proofs(verify),
        offload=offload_config(cpu_experts),
        held=held_experts(model),
    )


def check_request(level: str, kernel: str, quantization: str | QuantConfig | None) -> None:
    """Refuses names that mean nothing, before anything is read or built.

    Raises:
        ConfigError: unknown level or quantisation.
        KernelRefusedError: unknown kernel.
    """
    if level not in ("auto", "block", "experts"):
        raise ConfigError(f"level={level!r} is not one of auto, block, experts")
    if kernel not in kernel_names():
        raise KernelRefusedError(
            f"unknown kernel {kernel!r}; the kernels are {', '.join(kernel_names())}"
        )
    quant_config(quantization)
