"""How the routed experts' weights are to be quantised, as data. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moetor.errors import ConfigError

NumberFormat = Literal["fp8", "int8", "int4", "mxfp8", "mxfp4", "nvfp4"]
Granularity = Literal["tensor", "channel", "block", "group"]
QuantActivations = Literal["dynamic", "unquantized"]

_GRANULARITIES: dict[str, tuple[Granularity, ...]] = {
    "fp8": ("channel", "tensor", "block"),
    "int8": ("channel", "tensor", "group"),
    "int4": ("group",),
    "mxfp8": ("group",),
    "mxfp4": ("group",),
    "nvfp4": ("group",),
}
_GROUPS: dict[str, tuple[int, ...]] = {
    "int8": (32, 64, 128),
    "int4": (32, 64, 128),
    "mxfp8": (32,),
    "mxfp4": (32,),
    "nvfp4": (16,),
}
_BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """A quantisation of the routed experts' weights; the first choice of each list is the default.

    Attributes:
        format: of a weight: fp8 (e4m3), int8, int4, or OCP mxfp8, mxfp4, or nvfp4.
        granularity: which weights share a scale. fp8: an output `channel`, a projection's whole
            matrix (`tensor`), or a `block` of 128 x 128; int8: `channel`, `tensor`, or a `group` of
            the depth; the others: `group`. None: the default.
        group_size: of `group`: int8 and int4 32, 64 or 128, nvfp4 16, mxfp 32. None: the default.
        symmetric: False gives int4 a zero point for each group.
        activations: `dynamic` rounds the inputs of both products too, by token, or with
            granularity `block` by 128 values of a token (W8A8); `unquantized` leaves them in the
            model's dtype (W8A16, W4A16). None: dynamic for fp8 and int8 without groups.
    """

    format: NumberFormat
    granularity: Granularity | None = None
    group_size: int | None = None
    symmetric: bool = True
    activations: QuantActivations | None = None

    def __post_init__(self) -> None:
        if self.format not in _GRANULARITIES:
            raise ConfigError(
                f"QuantConfig: format={self.format!r} is not one of {', '.join(_GRANULARITIES)}"
            )
        possible = _GRANULARITIES[self.format]
        if self.granularity is None:
            object.__setattr__(self, "granularity", possible[0])
        elif self.granularity not in possible:
            raise ConfigError(
                f"QuantConfig: {self.format} has no granularity {self.granularity!r}; possible: "
                f"{', '.join(possible)}"
            )
        self._check_group()
        if not self.symmetric and self.format != "int4":
            raise ConfigError("QuantConfig: symmetric=False is defined for int4 alone")
        rounds = self.granularity != "group" or self.format == "mxfp8"
        if self.activations is None:
            default = rounds and self.format != "mxfp8"
            object.__setattr__(self, "activations", "dynamic" if default else "unquantized")
        elif self.activations not in ("dynamic", "unquantized"):
            raise ConfigError(
                f"QuantConfig: activations={self.activations!r} is not dynamic or unquantized"
            )
        elif self.activations == "dynamic" and not rounds:
            raise ConfigError(
                f"QuantConfig: activations of {self.format} in groups are not quantised; use "
                "activations='unquantized', or int8 or fp8 by channel"
            )

    def _check_group(self) -> None:
        if self.granularity != "group":
            if self.group_size is not None:
                raise ConfigError(
                    f"QuantConfig: group_size={self.group_size} has no meaning with granularity "
                    f"{self.granularity!r}"
                )
            return
        possible = _GROUPS[self.format]
        if self.group_size is None:
            object.__setattr__(self, "group_size", possible[0])
        elif self.group_size not in possible:
            raise ConfigError(
                f"QuantConfig: {self.format} has no group_size={self.group_size}; possible: "
                f"{', '.join(map(str, possible))}"
            )

    @property
    def weight_format(self) -> str:
        """Name of the `moetor.kernels.formats.WeightFormat`."""
        if self.granularity == "block":
            return f"fp8_block{_BLOCK}x{_BLOCK}"
        if self.granularity != "group" or self.format not in ("int8", "int4"):
            return self.format
        return f"{self.format}_g{self.group_size}{'' if self.symmetric else '_zp'}"

    @property
    def activation_format(self) -> str:
        """Name of the `moetor.kernels.formats.ActivationFormat`."""
        if self.activations == "unquantized":
            return "unquantized"
        if self.format == "mxfp8":
            return "mxfp8"
        return "fp8_group128" if self.granularity == "block" else f"{self.format}_token"

    @property
    def name(self) -> str:
        """Name of the preset, or a description where there is none."""
        for name, preset in PRESETS.items():
            if preset == self:
                return name
        scale = "" if self.granularity == "channel" else f" by {self.granularity}"
        return f"{self.weight_format}{scale}, activations {self.activations}"


PRESETS: dict[str, QuantConfig] = {
    "fp8": QuantConfig(format="fp8"),
    "fp8_tensor": QuantConfig(format="fp8", granularity="tensor"),
    "fp8_block": QuantConfig(format="fp8", granularity="block"),
    "fp8_w8a16": QuantConfig(format="fp8", activations="unquantized"),
    "int8": QuantConfig(format="int8"),
    "int8_w8a16": QuantConfig(format="int8", activations="unquantized"),
    "int4": QuantConfig(format="int4"),
    "int4_g64": QuantConfig(format="int4", group_size=64),
    "int4_g128": QuantConfig(format="int4", group_size=128),
    "int4_zp": QuantConfig(format="int4", symmetric=False),
    "mxfp8": QuantConfig(format="mxfp8"),
    "mxfp4": QuantConfig(format="mxfp4"),
    "nvfp4": QuantConfig(format="nvfp4"),
}
"""The quantisations that have a name of their own."""


def quantization_name(weight_format: str, activation_format: str) -> str:
    """What a report calls these formats: the preset that makes them, or the weight format."""
    for name, preset in PRESETS.items():
        if (preset.weight_format, preset.activation_format) == (weight_format, activation_format):
            return name
    return weight_format


# What people ask other libraries for, and what to ask for here.
_ELSEWHERE = {
    **dict.fromkeys(("bitsandbytes", "bnb", "8bit", "load_in_8bit", "llm_int8"), "int8"),
    **dict.fromkeys(("4bit", "load_in_4bit", "nf4", "fp4", "bnb_4bit", "awq", "gptq"), "int4"),
    **dict.fromkeys(("float8", "fp8_e4m3", "finegrained_fp8"), "fp8 or fp8_block"),
    **dict.fromkeys(("gguf", "q4_0", "q4_k", "q4_k_m"), "int4"),
    "q8_0": "int8_w8a16",
}


def _wish(asked: object) -> str:
    """A name in small letters, or the flag that is set in a `BitsAndBytesConfig`."""
    if isinstance(asked, str):
        return asked.lower()
    flags = ("load_in_8bit", "load_in_4bit")
    return next((flag for flag in flags if getattr(asked, flag, False) is True), "")


def find_quantization(asked: str | QuantConfig) -> QuantConfig:
    """The quantisation that a name or a configuration stands for.

    Raises:
        ConfigError: unknown name; says what to use in the place of another library's.
    """
    if isinstance(asked, QuantConfig):
        return asked
    if isinstance(asked, str) and asked in PRESETS:
        return PRESETS[asked]
    hint = _ELSEWHERE.get(_wish(asked))
    instead = "" if hint is None else f"; use {hint} in its place"
    told = repr(asked) if isinstance(asked, str | int | dict) else type(asked).__name__
    raise ConfigError(
        f"quantization={told} is not known here{instead}; possible: None, "
        f"{', '.join(PRESETS)}, or a QuantConfig"
    )
