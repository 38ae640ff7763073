"""Experts of the last layers in host memory: which, whether they fit, and putting them there.

A loaded checkpoint's experts are read straight into host memory; stand-ins without memory take
their places while the model is fused and proved, as for quantised experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moetor.config import ExpertsConfig
from moetor.errors import ConfigError, FusionError, UnsupportedError
from moetor.huggingface.block_form import find_blocks
from moetor.huggingface.experts_form import Unrecognised, recognise_experts
from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.modules import FusedMoEBlock, fused_modules
from moetor.huggingface.report import BlockReport
from moetor.huggingface.report_lines import top_k_of
from moetor.huggingface.split_experts import SplitExperts
from moetor.kernels.formats import find_format
from moetor.layer.experts import Experts
from moetor.layer.offload import ExpertOffload, LayerNeed, MemoryPlan, plan_memory
from moetor.layer.offload.host import check_host
from moetor.offload_config import OffloadConfig
from moetor.quantization.method import QuantMethod

_HELD, _GROUP = "_moetor_host_experts", "_moetor_offload"
_SHARE_OF_FREE = 0.9
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class HostExperts:
    """Experts that were read into host memory.

    Attributes:
        plan: of the whole model's memory.
        modules: paths of the experts modules, in the order of the plan's layers.
        tensors: unquantised matrices by name of the parameter; quantised ones are held elsewhere.
    """

    plan: MemoryPlan
    modules: tuple[str, ...]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Found:
    """A block's packed experts."""

    path: str
    module: str
    form: ExpertsConfig
    top_k: int
    nbytes: int


def plan_offload(
    model: nn.Module,
    config: OffloadConfig,
    device: torch.device,
    method: QuantMethod,
    dtype: torch.dtype,
) -> tuple[MemoryPlan, tuple[str, ...]]:
    """Where each layer's experts go, and the paths of the experts modules in host memory; of a
    model on any device, also the meta device.

    Args:
        device: the accelerator.
        method: that will compute with the experts: it says their format.
        dtype: of unquantised weights.

    Raises:
        ConfigError: there is no such accelerator, or too few layers, or too little memory.
        KernelRefusedError: the native kernel does not have the experts' form or format.
        UnsupportedError: experts that are held apart.
    """
    check_accelerator(config, device)
    found = [_measure(*block, method, dtype) for block in find_blocks(model)]
    matrices = _matrices(model, found)
    dense = sum(
        tensor.nbytes
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name not in matrices
    )
    gpu = _gpu_memory(config, device, model)
    host = free_host_memory() if config.host_memory is None else config.host_memory
    needs = [LayerNeed(one.path, one.form.num_experts, one.nbytes) for one in found]
    plan = plan_memory(needs, dense, config, gpu_memory=gpu, host_memory=host)
    away = found[len(found) - len(plan.layers) :]
    for one in away:
        check_host(method, method.stored_form(one.form), one.top_k, dtype, one.path)
    return plan, tuple(one.module for one in away)


def check_accelerator(config: OffloadConfig, device: torch.device) -> None:
    """Refuses a device that is not the one that the experts are kept from.

    Raises:
        ConfigError: it is of another type.
    """
    if device.type != config.accelerator:
        raise ConfigError(
            f"cpu_experts={config.cpu_experts} keeps experts in host memory beside a "
            f"{config.accelerator} device, and the model is on {device.type}; leave it out on a "
            "CPU, where all experts are in host memory anyway"
        )


def _measure(
    path: str, block: nn.Module, source: Any, method: QuantMethod, dtype: torch.dtype
) -> _Found:
    if isinstance(source, SplitExperts):
        raise UnsupportedError(
            f"block {path!r} holds each expert apart; such experts cannot stay in host memory"
        )
    form = recognise_experts(block.get_submodule(source))
    if isinstance(form, Unrecognised):
        raise UnsupportedError(
            f"the experts of block {path!r} are not recognised ({form.reason}) and cannot stay in "
            "host memory"
        )
    module = f"{path}.{source}" if path else source
    nbytes = experts_bytes(form, method.weight_format, dtype)
    return _Found(path, module, form, top_k_of(block, form.num_experts), nbytes)


def experts_bytes(form: ExpertsConfig, weight_format: str, dtype: torch.dtype) -> int:
    """Of a layer's two products in a format, with biases."""
    biases = (form.up_size + form.hidden_size) * dtype.itemsize if form.has_bias else 0
    if weight_format == "unquantized":
        return form.num_experts * (form.params_per_expert * dtype.itemsize + biases)
    first, _, second = weight_format.partition("+")
    up = find_format(first).bytes_of(form.up_size, form.hidden_size)
    down = find_format(second or first).bytes_of(form.hidden_size, form.intermediate_size)
    return form.num_experts * (up + down + biases)


def _matrices(model: nn.Module, found: Sequence[_Found]) -> set[str]:
    return {
        f"{one.module}.{name}"
        for one in found
        for name in model.get_submodule(one.module)._parameters
    }


def _gpu_memory(config: OffloadConfig, device: torch.device, model: nn.Module) -> int | None:
    """What a model may take: this process's share, less what else lives there."""
    if config.gpu_memory is not None or device.type != "cuda":
        return config.gpu_memory
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    tensors = [*model.parameters(), *model.buffers()]
    own = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cuda")
    others = torch.cuda.memory_allocated(device) - own
    index = torch.cuda.current_device() if device.index is None else device.index
    share = torch.cuda.get_per_process_memory_fraction(index)
    return min(int((free + reserved - others) * _SHARE_OF_FREE), int(total * share) - others)


def free_host_memory() -> int | None:
    """Bytes of host memory that are free for this process; None where the system does not say."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    free *= 1024
    try:
        bound = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no group, or one without a bound
        return free
    return min(free, max(0, bound - used))


def leave_host_experts(model: nn.Module, held: HostExperts) -> None:
    """Leaves with a model what was read into host memory, for `fuse` to put into place."""
    model.__dict__[_HELD] = held


def check_host_experts(model: nn.Module, config: OffloadConfig | None) -> None:
    """Refuses to fuse a model whose experts are in host memory as if they were not.

    Raises:
        FusionError: that.
    """
    if _HELD in model.__dict__ and config is None:
        raise FusionError(
            "the model was loaded with experts in host memory; call moetor.fuse(model, "
            "cpu_experts=...) with what it was loaded with"
        )


def plan_for(
    model: nn.Module, config: OffloadConfig, method: QuantMethod
) -> tuple[MemoryPlan, tuple[str, ...]]:
    """The plan that a model was loaded by, or one for a live model."""
    held: HostExperts | None = model.__dict__.get(_HELD)
    if held is not None:
        return held.plan, held.modules
    some = next(model.parameters())
    return plan_offload(model, config, some.device, method, some.dtype)


def offload_blocks(
    model: nn.Module,
    reports: list[BlockReport],
    config: OffloadConfig,
    plan: MemoryPlan,
    modules: Sequence[str],
) -> None:
    """Moves experts of a fused model to host memory, and writes it into the reports.

    Args:
        modules: paths of their modules, in the order of the plan's layers.

    Raises:
        FusionError: some are not fused; nothing is moved.
    """
    if not modules:
        return
    fused = {_experts_path(path, module): module for path, module in fused_modules(model)}
    places = {report.name: number for number, report in enumerate(reports)}
    for name, path in zip(plan.layers, modules, strict=True):
        if path not in fused:
            reason = reports[places[name]].reason
            raise FusionError(f"the experts of {name!r} cannot stay in host memory: {reason}")
    device = _device_of(model)
    held: HostExperts | None = model.__dict__.pop(_HELD, None)
    layers = []
    for path in modules:
        experts = fused[path].routed_experts
        _to_host(experts, path, {} if held is None else held.tensors)
        fused[path].let_go_of_weights()
        own = experts if isinstance(fused[path], FusedMoEBlock) else fused[path]
        own.register_load_state_dict_pre_hook(_refuse_to_load)  # type: ignore[no-untyped-call]
        layers.append(experts)
    model.__dict__[_GROUP] = ExpertOffload(layers, device, config, plan.cache_experts)
    for name in plan.layers:
        reports[places[name]] = host_report(reports[places[name]], plan, device)


def _experts_path(path: str, module: FusedMoEBlock | FusedExperts) -> str:
    return f"{path}.{module.names.experts}" if isinstance(module, FusedMoEBlock) else path


def _to_host(experts: Experts, path: str, read: Mapping[str, Tensor]) -> None:
    for name, parameter in experts._parameters.items():
        if parameter is not None:
            kept = read.get(f"{path}.{name}", parameter.detach()).to("cpu").contiguous()
            experts._parameters[name] = nn.Parameter(kept, requires_grad=False)


def _refuse_to_load(*_: object) -> NoReturn:
    raise ConfigError(
        "experts in host memory have copies on the GPU, and no other weights can be loaded into "
        "them; load the model again"
    )


def host_report(report: BlockReport, plan: MemoryPlan, device: torch.device) -> BlockReport:
    """The line of a block whose experts are in host memory.

    Args:
        device: on which `report` names a kernel.
    """
    note = "on the host"
    if plan.cache_experts:
        by = f", by {report.kernel}" if device.type == "cuda" else ""
        note += f"; the {plan.cache_experts} hottest experts of a layer on the GPU{by}"
    return replace(report, kernel="native", kernel_note=note)


def _device_of(model: nn.Module) -> torch.device:
    experts = {
        id(parameter)
        for _, module in fused_modules(model)
        for parameter in module.routed_experts.parameters()
    }
    return next(one.device for one in model.parameters() if id(one) not in experts)


def offload_of(model: nn.Module) -> ExpertOffload | None:
    """What runs a model's experts in host memory; None where there are none."""
    group: ExpertOffload | None = model.__dict__.get(_GROUP)
    return group
