"""What `fuse` would do, from a model's configuration alone: no weight is read, none is made but
a router's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetor.config import ExpertsConfig, RouterConfig, RunnerConfig
from moetor.errors import CheckpointError, ConfigError, FusionError, UnsupportedError
from moetor.huggingface.block_form import (
    ExpertsSource,
    beside_label,
    experts_form,
    find_blocks,
    find_left_alone,
    recognise_beside,
    recognise_block,
    router_label,
)
from moetor.huggingface.checkpoint import first_line
from moetor.huggingface.devices import find_device, find_dtype
from moetor.huggingface.experts_form import Unrecognised, recognise_experts
from moetor.huggingface.fuse_options import FuseLevel, check_request
from moetor.huggingface.loading import load_config, model_class
from moetor.huggingface.offloading import host_report, plan_offload
from moetor.huggingface.report import BlockReport, FusionReport
from moetor.huggingface.report_lines import left_alone_report, top_k_of
from moetor.huggingface.sources import resolve
from moetor.huggingface.split_experts import SplitExperts
from moetor.huggingface.stored_quantization import (
    StoredQuantization,
    stored_quantization,
    stored_settings,
)
from moetor.kernels.select import KernelChoice
from moetor.layer.offload import MemoryPlan
from moetor.offload_config import CpuExperts, OffloadConfig, offload_config
from moetor.quant_config import QuantConfig
from moetor.quantization.method import make_method, quant_config
from moetor.quantization.sink import quantized_bytes


def explain(
    model: str,
    *,
    level: FuseLevel = "auto",
    kernel: str = "auto",
    quantization: str | QuantConfig | None = None,
    dtype: str = "auto",
    device: str = "auto",
    cpu_experts: CpuExperts | OffloadConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> FusionReport:
    """The report that `fuse` would give, without the comparison with the originals.

    The model is built on the meta device. Routers are recognised as `fuse` does it, on a copy with
    random values.

    Args:
        model: a folder, a hub id, or `demo`.
        quantization: as for `fuse`; the report says what the weights would take.
        dtype, device: for which a kernel is chosen; `auto`: the checkpoint's, and CUDA where there
            is one.
        cpu_experts: as for `fuse`; the report's `offload` says what would be where. With
            `gpu_memory` of an `OffloadConfig` for a GPU that need not be here.

    Raises:
        CheckpointError: the configuration cannot be read, or no model can be built from it.
        ConfigError: experts or all else do not fit where `cpu_experts` says, with the numbers.
        FusionError: level `block` and a block is not recognised.
        KernelRefusedError: the kernel is unknown or refuses.
    """
    check_request(level, kernel, quantization)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(model, config, trust_remote_code=trust_remote_code)
    wanted = find_dtype(dtype) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    skeleton.to(wanted)
    stored = _stored(model, config, quantization)
    explainer = _Explainer(level, kernel, quantization, find_device(device), wanted)
    if stored is not None:
        explainer.method = stored.method(kernel)
    offload = offload_config(cpu_experts)
    away = None if offload is None else _away(skeleton, offload, explainer)
    lines = [explainer.line(*found) for found in find_blocks(skeleton)]
    if away is not None:
        lines = [
            host_report(one, away, explainer.device) if one.name in away.layers else one
            for one in lines
        ]
    lines += [left_alone_report(*found) for found in find_left_alone(skeleton)]
    if stored is not None:
        name = explainer.method.name
        lines = [one if one.level == "none" else replace(one, quantization=name) for one in lines]
        return FusionReport(lines, weight_bytes=stored.nbytes, offload=away)
    whole = sum(parameter.nbytes for parameter in skeleton.parameters())
    saved = sum(line.expert_bytes[0] - line.expert_bytes[1] for line in lines if line.expert_bytes)
    return FusionReport(lines, weight_bytes=whole - saved, offload=away)


def _away(model: nn.Module, config: OffloadConfig, explainer: _Explainer) -> MemoryPlan:
    device = explainer.device
    if config.gpu_memory is not None and config.accelerator == "cuda":
        device = torch.device("cuda")  # it is asked about, and need not be here
    return plan_offload(model, config, device, explainer.method, explainer.dtype)[0]


def _stored(
    model: str, config: Any, quantization: str | QuantConfig | None
) -> StoredQuantization | None:
    """How the model's own checkpoint is quantised, if it is."""
    folder = Path(resolve(model))
    settings = stored_settings(folder, config)
    if settings is None:
        return None
    kind = settings.get("quant_method")
    if quantization is not None:
        raise ConfigError(
            f"quantization={quantization!r} was asked for, and {model!r} is quantised already "
            f"({kind}); leave it out"
        )
    if not folder.is_dir():
        raise UnsupportedError(
            f"{model!r} is quantised ({kind}), which is explained from its files; give a folder"
        )
    return stored_quantization(folder, config)


def expert_forms(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> list[tuple[ExpertsConfig, int]]:
    """Sizes, form and top_k of the model's routed experts, each kind once, without weights.

    Raises:
        CheckpointError: the configuration cannot be read, or no model can be built from it.
    """
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(model, config, trust_remote_code=trust_remote_code)
    forms: dict[tuple[ExpertsConfig, int], None] = {}
    for _, block, source in find_blocks(skeleton):
        found = experts_form(block, source)
        if not isinstance(found, Unrecognised):
            forms[found, top_k_of(block, found.num_experts)] = None
    return list(forms)


def build_skeleton(model: str, config: object, *, trust_remote_code: bool) -> nn.Module:
    """The model that the configuration describes, on the meta device.

    Raises:
        CheckpointError: the configuration describes no model.
    """
    maker = model_class(config)
    try:
        with torch.device("meta"):
            if hasattr(maker, "from_config"):
                made = maker.from_config(config, trust_remote_code=trust_remote_code)
            else:
                made = maker(config)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        raise CheckpointError(
            f"no model can be built from the config of {model!r}: {first_line(error)}"
        ) from error
    skeleton: nn.Module = made.eval()
    return skeleton


class _Explainer:
    """Lines of one report; remembers the last router, which usually fits the next block."""

    def __init__(
        self,
        level: FuseLevel,
        kernel: str,
        quantization: str | QuantConfig | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.level = level
        self.kernel = kernel
        self.quant = quant_config(quantization)
        self.method = make_method(quantization, kernel, batch_invariant=False)
        self.device = device
        self.dtype = dtype
        self.hint: RouterConfig | None = None

    def line(self, path: str, block: nn.Module, source: ExpertsSource) -> BlockReport:
        """One block's line."""
        why = "asked for level 'experts'"
        if self.level != "experts":
            plan = recognise_block(
                path,
                block,
                source,
                quantization=None,
                runner=RunnerConfig(kernel=self.kernel),
                hint=self.hint,
            )
            if not isinstance(plan, Unrecognised):
                self.hint = plan.config.router
                choice = self._choice(plan.config.experts, plan.config.router.top_k)
                return BlockReport(
                    name=path,
                    family_block=type(block).__name__,
                    level="block",
                    router=router_label(plan),
                    kernel=choice.kernel.name,
                    refusals=choice.refusals,
                    **self._experts(plan.config.experts),
                    kernel_note=choice.note,
                    packed_bytes=0 if plan.split is None else plan.split.packed_bytes(block),
                )
            why = plan.reason
            if recognise_beside(block, source) is not None:
                return self._experts_line(path, block, source, "")
            if self.level == "block":
                raise FusionError(
                    f"block {path!r} ({type(block).__name__}) cannot be fused at level 'block': "
                    f"{why}. Use level='auto' to fuse its experts alone"
                )
        return self._experts_line(path, block, source, why)

    def _experts_line(
        self, path: str, block: nn.Module, source: ExpertsSource, why: str
    ) -> BlockReport:
        """The line of experts that are fused in place.

        Args:
            why: only they; empty where they and their router are the whole block.
        """
        if isinstance(source, SplitExperts):
            return left_alone_report(path, block, f"{why}; {source.only_whole}")
        config = recognise_experts(block.get_submodule(source))
        if isinstance(config, Unrecognised):
            reason = why if config.reason == why else f"{why}; {config.reason}"
            return left_alone_report(path, block, reason)
        choice = self._choice(config, top_k_of(block, config.num_experts))
        return BlockReport(
            name=path,
            family_block=type(block).__name__,
            level="experts" if why else "block",
            router="Transformers" if why else beside_label(block),
            kernel=choice.kernel.name,
            reason=why,
            refusals=choice.refusals,
            **self._experts(config),
            kernel_note=choice.note,
        )

    def _choice(self, config: ExpertsConfig, top_k: int) -> KernelChoice:
        form = self.method.stored_form(config)
        return self.method.choice(form, top_k, self.device, self.dtype)

    def _experts(self, config: ExpertsConfig) -> dict[str, Any]:
        """What the report says of a block's experts and of their quantisation."""
        said: dict[str, Any] = {"num_experts": config.num_experts}
        if self.quant is not None:
            before = config.num_experts * config.params_per_expert * self.dtype.itemsize
            said["quantization"] = self.quant.name
            said["expert_bytes"] = (before, quantized_bytes(config, self.quant))
        return said
