"""Flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moetor.errors import ConfigError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModelOptions(ModelOptions):
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
