"""`MoEForCausalLM` and `MoEForMultimodalLM`: a checkpoint streamed into a fused model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from moetor.errors import ConfigError, FusionError, UnsupportedError
from moetor.huggingface.devices import find_device, find_dtype
from moetor.huggingface.expert_mapping import ExpertNames
from moetor.huggingface.fuse_options import VerifyMode, check_request
from moetor.huggingface.fusing import fuse
from moetor.huggingface.loading import LoadOptions, model_class, stream_model
from moetor.offload_config import CpuExperts, OffloadConfig, offload_config
from moetor.parallel.config import ParallelConfig
from moetor.parallel.groups import make_groups
from moetor.progress import Progress, drawn_bar
from moetor.quant_config import QuantConfig
from moetor.quantization.method import quant_config

Verify = Literal["sample", "all", "off"]
_VERIFY: Mapping[str, VerifyMode] = {"sample": "sample", "all": True, "off": False}


class _Streamed:
    """What both classes share: they are entrances, not models."""

    kind: ClassVar[str]
    mappings: ClassVar[tuple[str, ...]]
    """Transformers' tables of the model classes that belong here."""
    suffix: ClassVar[str]
    """How classes end that belong here although no table lists them."""

    def __init__(self) -> None:
        raise UnsupportedError(
            f"{type(self).__name__} makes models of other classes; call "
            f"moetor.{type(self).__name__}.from_pretrained"
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        quantization: str | QuantConfig | None = None,
        parallel: ParallelConfig | None = None,
        cpu_experts: CpuExperts | OffloadConfig | None = None,
        kernel: str = "auto",
        verify: Verify = "sample",
        progress: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        expert_names: ExpertNames | None = None,
    ) -> PreTrainedModel:
        """A model of the checkpoint's own class, in eval mode and fused.

        Each tensor is read once, straight to its place: above the finished model, memory grows by
        less than one layer's experts. `model.fusion_report` says what was fused.

        Args:
            model: a folder, a hub id, or `demo`.
            dtype: `float32`, `bfloat16`, `float16` or the torch dtype; `auto` for the checkpoint's.
            device: cpu, cuda or cuda:N; `auto` for the first GPU, else the CPU.
            quantization: name of a quantisation (`moetor.quant_config.PRESETS`) or a `QuantConfig`
                for the routed experts, which are quantised one by one as they are read.
            parallel: how the model is spread over the ranks that have joined, as by
                `moetor.parallelize`; each reads the experts, or their slices, that it keeps.
            cpu_experts: MoE layers, counted from the last one, whose experts are read into host
                memory and computed there, as `moetor.fuse` takes it.
            kernel: a kernel's name, honoured or refused; `auto` chooses.
            verify: `sample` compares one fused block of each form with its original, `all` every
                one, `off` none.
            progress: show a bar on standard error, if that is a terminal.
            revision: branch, tag or commit of a hub model.
            trust_remote_code: run the Python code that a checkpoint brings along.
            key_mapping: regular expressions and replacements, applied to the checkpoint's names as
                Transformers does.
            expert_names: names of the experts' tensors, where no table knows them.

        Raises:
            CheckpointError: files or tensors are missing, corrupt, pickled, doubled or of another
                shape; the text names file and tensor. No model is made.
            ConfigError: unknown dtype, device, quantization or verify; or the experts do not fit
                where `cpu_experts` says.
            FusionError: no block of the model can be fused.
            FusionMismatchError: a fused block differs from its original.
            KernelRefusedError: the kernel is unknown or refuses.
            UnsupportedError: the model is of another kind, quantised, or not possible here.
        """
        if verify not in _VERIFY:
            raise ConfigError(f"verify={verify!r} is not one of {', '.join(_VERIFY)}")
        check_request("auto", kernel, quantization)
        where = find_device(str(device))
        if parallel is not None:
            make_groups(parallel, where)  # refuses ranks that do not fit, before anything is read
        options = LoadOptions(
            dtype=dtype if isinstance(dtype, torch.dtype) else find_dtype(dtype),
            device=where,
            revision=revision,
            trust_remote_code=trust_remote_code,
            key_mapping=key_mapping,
            expert_names=expert_names,
            quantization=quant_config(quantization),
            kernel=kernel,
            fused=True,
            sharded=parallel is not None,
            offload=offload_config(cpu_experts),
        )
        fused = partial(
            fuse,
            kernel=kernel,
            quantization=quantization,
            verify=_VERIFY[verify],
            parallel=parallel,
            cpu_experts=cpu_experts,
        )
        with _bar(f"loading {model}", "tensors", shown=progress) as shown:
            loaded, _ = stream_model(model, options, maker=cls._class_of, progress=shown)
            # Of several ranks each knows its share of the experts once the model has been spread.
            report = None if parallel is None else fused(loaded)
        if report is None:
            with _bar(f"fusing {model}", "blocks", shown=progress) as shown:
                report = fused(loaded, progress=shown)
        if not report.count("block") + report.count("experts"):
            reasons = dict.fromkeys(block.reason for block in report.blocks)
            raise FusionError(
                f"{model!r} has no MoE block that can be fused"
                + (f": {'; '.join(reasons)}" if reasons else "")
                + f". Load it with transformers.{type(loaded).__name__}"
            )
        loaded.fusion_report = report
        return loaded

    @classmethod
    def _class_of(cls, config: Any) -> Any:
        """The model's class, which must be of this kind."""
        found = model_class(config)
        names = cls._names()
        name = found.__name__
        if hasattr(found, "from_config") or name in names or name.endswith(cls.suffix):
            return found
        kinds: tuple[type[_Streamed], ...] = (MoEForCausalLM, MoEForMultimodalLM)
        other = next(kind for kind in kinds if kind is not cls)
        advice = (
            f"use moetor.{other.__name__}"
            if name in other._names()
            else "load it with Transformers and call moetor.fuse"
        )
        raise UnsupportedError(f"{name} is not {cls.kind}; {advice}")

    @classmethod
    def _names(cls) -> set[str]:
        tables = (getattr(modeling_auto, name) for name in cls.mappings)
        listed = (entry for table in tables for entry in table.values())
        return {
            name
            for entry in listed
            for name in (entry if isinstance(entry, tuple | list) else (entry,))
        }


class MoEForCausalLM(_Streamed):
    """Causal language models with MoE blocks: see `from_pretrained`."""

    kind = "a causal language model"
    suffix = "ForCausalLM"
    mappings = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",)


class MoEForMultimodalLM(_Streamed):
    """Language models with MoE blocks that also take images, video or audio: see
    `from_pretrained`.
    """

    kind = "a multimodal language model"
    suffix = "ForMultimodalLM"
    mappings = (
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    )


def _bar(label: str, unit: str, *, shown: bool) -> AbstractContextManager[Progress | None]:
    """A bar on standard error, where it is wanted and that is a terminal."""
    return drawn_bar(label, unit) if shown and sys.stderr.isatty() else nullcontext()
