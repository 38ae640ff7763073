"""Flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moetor.errors import ConfigError
from moetor.offload_config import CpuExperts, OffloadConfig, parse_bytes

if TYPE_CHECKING:
    from moetor.parallel.config import ParallelConfig

# `moetor.kernels.select` has the kernels themselves; it imports torch, which `--help` must not.
KernelName = Literal["auto", "native", "triton", "torch", "grouped_mm", "reference"]
QuantizationName = Literal[
    "fp8",
    "fp8_tensor",
    "fp8_block",
    "fp8_w8a16",
    "int8",
    "int8_w8a16",
    "int4",
    "int4_g64",
    "int4_g128",
    "int4_zp",
    "mxfp8",
    "mxfp4",
    "nvfp4",
]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

MODEL, OUTPUT = "model", "output"
QUANTIZATION = {
    "group": MODEL,
    "help": "quantise the routed experts' weights; routers, shared experts and attention stay as "
    "they are",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Which model, and how it is loaded and run."""

    model: str = field(
        default="demo",
        metadata={
            "positional": True,
            "help": "folder or hub id of a Transformers model; demo ships in the package",
        },
    )
    kernel: KernelName = field(
        default="auto",
        metadata={
            "group": MODEL,
            "help": "kernel of the routed experts: the one named, or an error saying why not; "
            "auto takes the fastest that can",
        },
    )
    dtype: DtypeName = field(
        default="auto",
        metadata={"group": MODEL, "help": "of the weights; auto takes the checkpoint's own"},
    )
    device: str = field(
        default="auto",
        metadata={
            "group": MODEL,
            "metavar": "DEVICE",
            "help": "cpu, cuda or cuda:N; auto takes the first GPU, else the CPU",
        },
    )
    revision: str | None = field(
        default=None,
        metadata={
            "group": MODEL,
            "metavar": "REV",
            "help": "branch, tag or commit of a hub model",
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"group": MODEL, "help": "run the Python code that a checkpoint brings along"},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions(ModelSource):
    """The same for a command that prints one result."""

    json: bool = field(
        default=False,
        metadata={
            "group": OUTPUT,
            "help": "print one JSON object on standard output and nothing else there",
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedModelOptions(ModelOptions):
    """A model that is fused."""

    level: Literal["auto", "block", "experts"] = field(
        default="auto",
        metadata={
            "group": MODEL,
            "help": "fuse whole MoE blocks or their experts alone; "
            "auto takes the deepest that each block allows",
        },
    )
    quantization: QuantizationName | None = field(default=None, metadata=QUANTIZATION)


HOST = "experts in host memory"


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """Which experts stay in host memory."""

    cpu_experts: str | None = field(
        default=None,
        metadata={
            "group": HOST,
            "metavar": "N|auto",
            "help": "keep the experts of the last N MoE layers in host memory and compute them "
            "there; auto takes as few layers as the GPU's memory allows",
        },
    )
    cpu_experts_cache: str = field(
        default="auto",
        metadata={
            "group": HOST,
            "metavar": "N|auto",
            "sets": "cache_experts",
            "help": "experts of each of these layers that are on the GPU as well, the hottest "
            "ones; auto takes as many as there is room for",
        },
    )
    cpu_experts_stream: str = field(
        default="auto",
        metadata={
            "group": HOST,
            "metavar": "N|auto",
            "sets": "stream_min_tokens",
            "help": "steps of at least N tokens copy the layer's experts to the GPU and compute "
            "there; auto measures from how many on that is faster; 0 never does",
        },
    )
    gpu_memory: str | None = field(
        default=None,
        metadata={
            "group": HOST,
            "metavar": "SIZE",
            "help": "what weights, caches and all else may take of the GPU's memory, such as "
            "24GiB; without it, most of what is free",
        },
    )

    def offload(self, **settings: Any) -> OffloadConfig | None:
        """The configuration that the flags describe; None where none is asked for.

        Args:
            settings: further fields of it.

        Raises:
            ConfigError: a value that is none, or flags that mean nothing without `--cpu-experts`.
        """
        if self.cpu_experts is None:
            given = (self.cpu_experts_cache, self.cpu_experts_stream, self.gpu_memory)
            if given != ("auto", "auto", None):
                raise ConfigError(
                    "--cpu-experts-cache, --cpu-experts-stream and --gpu-memory are about experts "
                    "in host memory; give --cpu-experts too"
                )
            return None
        gpu = None if self.gpu_memory is None else parse_bytes(self.gpu_memory, "gpu_memory")
        return OffloadConfig(
            cpu_experts=_count("--cpu-experts", self.cpu_experts),
            cache_experts=_count("--cpu-experts-cache", self.cpu_experts_cache),
            stream_min_tokens=_count("--cpu-experts-stream", self.cpu_experts_stream),
            gpu_memory=gpu,
            **settings,
        )


def check_one_gpu(options: OffloadOptions, parallel: ParallelConfig | None) -> None:
    """Refuses experts in host memory beside several ranks.

    Raises:
        ConfigError: that, or what `OffloadOptions.offload` refuses.
    """
    if options.offload() is not None and parallel is not None:
        raise ConfigError(
            "--cpu-experts keeps experts beside one GPU; leave out it or --tensor-parallel-size "
            "and --data-parallel-size"
        )


def check_batch_invariant(
    asked: bool, options: OffloadOptions, parallel: ParallelConfig | None
) -> None:
    """Refuses `--batch-invariant` where several devices compute a token.

    Raises:
        ConfigError: that, or what `OffloadOptions.offload` refuses.
    """
    if not asked:
        return
    if parallel is not None:
        raise ConfigError(
            "--batch-invariant is for one rank: what ranks add up for each other depends on the "
            "step; leave out it or --tensor-parallel-size and --data-parallel-size"
        )
    if options.offload() is not None:
        raise ConfigError(
            "--batch-invariant is for one device, and --cpu-experts lets two compute; leave out "
            "one of the two"
        )


def _count(flag: str, text: str) -> CpuExperts:
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{flag} {text!r} is neither 'auto' nor a number from 0 on")
    return int(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModelOptions(ModelOptions, OffloadOptions):
    """A model that generates text, fused or left as it is."""

    level: Literal["auto", "block", "experts", "none"] = field(
        default="auto",
        metadata={
            "group": MODEL,
            "help": "fuse whole MoE blocks, their experts alone, or nothing (plain Transformers); "
            "auto takes the deepest that each block allows",
        },
    )
    quantization: QuantizationName | None = field(default=None, metadata=QUANTIZATION)


def check_level(options: ServedModelOptions) -> None:
    """Refuses what level `none` cannot honour.

    Raises:
        ConfigError: a kernel or a quantisation was named with it.
    """
    if options.level != "none":
        return
    if options.kernel != "auto":
        raise ConfigError(
            f"--level none runs plain Transformers, which has no kernel {options.kernel!r}; leave "
            "out one of the two"
        )
    if options.quantization is not None:
        raise ConfigError(
            "--level none runs plain Transformers, which does not quantise experts; leave out one "
            "of the two"
        )
    if options.cpu_experts is not None:
        raise ConfigError(
            "--level none runs plain Transformers, which keeps no experts in host memory; leave "
            "out one of the two"
        )
