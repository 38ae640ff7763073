"""`fuse`: MoE blocks of a live Transformers model become `MoELayer`s, proved against the
originals; and `unfuse`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from moetor.config import RunnerConfig
from moetor.errors import (
    ConfigError,
    FusionError,
)
from moetor.huggingface.bare import adopt_hooks, hooks_off
from moetor.huggingface.block_form import (
    ExpertsSource,
    find_blocks,
)
from moetor.huggingface.dense_fusing import fuse_dense, unfuse_dense
from moetor.huggingface.fuse_options import (
    FuseLevel,
    FuseOptions,
    Progress,
    VerifyMode,
    check_options,
)
from moetor.huggingface.modules import FusedMoEBlock, fused_modules, install_gate
from moetor.huggingface.offloading import check_host_experts, offload_blocks, plan_for
from moetor.huggingface.parallelism import parallelize
from moetor.huggingface.placement import hooks_aside, put_hook, take_hook
from moetor.huggingface.preparing import prepare_all
from moetor.huggingface.quantized_loading import (
    forget_held,
)
from moetor.huggingface.quantizing import RefuseToSave, check_quantizable
from moetor.huggingface.replacements import (
    Replacement,
    quantize_all,
    take_back,
    unquantized,
)
from moetor.huggingface.report import BlockReport, FusionReport
from moetor.huggingface.routed_keyword import offer_keyword, withdraw_keyword
from moetor.huggingface.sharded_loading import check_withheld, read_withheld
from moetor.layer.offload import MemoryPlan
from moetor.layer.quantized_experts import QuantizedExperts, method_for
from moetor.offload_config import CpuExperts, OffloadConfig
from moetor.parallel.config import ParallelConfig
from moetor.parallel.groups import make_groups
from moetor.quant_config import QuantConfig
from moetor.quantization.method import QuantMethod, make_method, quant_config


def fuse(
    model: nn.Module,
    *,
    level: FuseLevel = "auto",
    kernel: str = "auto",
    quantization: str | QuantConfig | None = None,
    verify: VerifyMode = True,
    dense: bool = False,
    runner: RunnerConfig | None = None,
    parallel: ParallelConfig | None = None,
    cpu_experts: CpuExperts | OffloadConfig | None = None,
    progress: Progress | None = None,
) -> FusionReport:
    """Replaces the model's MoE blocks in place.

    Every replacement is built and compared first; only when all are ready is the model changed, so
    it is never left half fused. Weights are shared with the originals, not copied. A model without
    MoE is left alone: the report is empty. Of a model whose experts were loaded quantised, blocks
    are proved with random weights in the experts' places.

    Args:
        model: a Transformers model in eval mode (or one whose parameters need no gradients).
        level: `block` replaces whole blocks and refuses a block that is not recognised; `experts`
            replaces the experts alone, routing stays in Transformers; `auto` takes the block where
            it can, else the experts.
        kernel: a kernel's name, honoured or refused; `auto` chooses.
        quantization: name of a quantisation (`moetor.quant_config.PRESETS`) or of a quant method,
            a `QuantConfig`, or None. Every block is proved unquantised first; then the experts of
            one block after the other are quantised, and their originals released for good.
        verify: compare every replacement with its original on random input; `sample` compares one
            of each form, which is enough where the weights have been compared by other means.
        dense: also fuse what stands around the experts: linear modules with one input, gated MLPs,
            norms with the sums before them, rotary positions. What is not recognised is left
            alone, and the report's `dense` says why. With `parallel` these are the rank's parts.
        runner: how the layers are driven; its `kernel` must be left at `auto`, or agree with
            `kernel`.
        parallel: spread the fused model over the ranks that have joined, as
            `moetor.parallelize` does; the report's `parallel` says how.
        cpu_experts: MoE layers, counted from the last one, whose experts stay in host memory, where
            the native CPU kernel computes them; `auto` for those that the GPU has no room for, or
            an `OffloadConfig`. The report's `offload` says what is where.
        progress: called after every block.

    Raises:
        FusionError: already fused, in training mode, or (level `block`) a block is not recognised.
        FusionMismatchError: a replacement differs from its original by more than the dtype's
            tolerance.
        KernelRefusedError: the kernel is unknown or refuses.
        ConfigError: unknown level or quantisation; or the ranks or the model do not fit `parallel`,
            in which case the model may be fused, and is not spread.
        ParallelError: the ranks have different models.
    """
    options = check_options(model, level, kernel, quantization, verify, runner, cpu_experts)
    check_host_experts(model, options.offload)
    if options.offload is not None and parallel is not None:
        raise ConfigError("cpu_experts and parallel cannot be had together; leave one out")
    if parallel is not None:
        make_groups(parallel, next(model.parameters()).device)  # refuses before anything is built
    report = _fuse(model, options, parallel, progress)
    return replace(report, dense=fuse_dense(model, verify=bool(verify))) if dense else report


def _fuse(
    model: nn.Module,
    options: FuseOptions,
    parallel: ParallelConfig | None,
    progress: Progress | None,
) -> FusionReport:
    check_withheld(model, spread=parallel is not None)
    found = list(find_blocks(model))
    away: tuple[MemoryPlan, tuple[str, ...]] | None = None
    if options.offload is not None:
        away = plan_for(model, options.offload, _method_of(options))
    with hooks_aside(model, [(path, block) for path, block, _ in found]):
        report = _fuse_found(model, found, options, parallel, progress)
    if options.offload is None or away is None:
        return report
    offload_blocks(model, report.blocks, options.offload, *away)
    return replace(report, offload=away[0])


def _method_of(options: FuseOptions) -> QuantMethod:
    """That computes with the experts once they are fused."""
    kernel, invariant = options.runner.kernel, options.runner.batch_invariant
    for held in options.held.values():
        return method_for(held, kernel, batch_invariant=invariant)
    return make_method(options.quantization, kernel, batch_invariant=invariant)


def _fuse_found(
    model: nn.Module,
    found: list[tuple[str, nn.Module, ExpertsSource]],
    options: FuseOptions,
    parallel: ParallelConfig | None,
    progress: Progress | None,
) -> FusionReport:
    replacements: list[Replacement] = []
    reports: list[BlockReport] = []
    quant = quant_config(options.quantization)
    try:
        with hooks_off(model) as hooked:
            for replacement, report in prepare_all(model, found, options, hooked, progress):
                reports.append(report)
                if replacement is not None:
                    replacements.append(replacement)
        for one in replacements:
            _check_place(one.path)
        if quant is not None:
            for one in unquantized(replacements):
                check_quantizable(one.module, one.path, quant)
    except BaseException:
        take_back(replacements)
        raise
    for replacement in replacements:
        adopt_hooks(replacement.module, model.get_submodule(replacement.path))
        _put(model, replacement.path, replacement.module)
        if isinstance(replacement.module, FusedMoEBlock):
            install_gate(replacement.module)
    if replacements:
        offer_keyword(model)
    spread = None if parallel is None else parallelize(model, parallel)
    read_withheld(model)
    if quant is not None:
        quantize_all(replacements, reports, quant)
    if any(report.quantization is not None for report in reports):
        model.save_pretrained = RefuseToSave()  # type: ignore[assignment]  # its own would be wrong
    forget_held(model)
    return FusionReport(reports, spread)


def unfuse(model: nn.Module) -> int:
    """Puts the original modules back, with the tensors that the fused ones hold now.

    Returns:
        The number of blocks and experts restored; 0 for a model that is not fused.

    Raises:
        FusionError: experts were quantised, which released their originals, or are in host memory;
            nothing is changed.
    """
    fused = fused_modules(model)
    for path, module in fused:
        _check_place(path)
        if module.routed_experts.offload is not None:
            raise FusionError(
                f"the experts of {path!r} are in host memory, where the original block cannot "
                "compute; load the model again to have it unfused"
            )
        if isinstance(module.routed_experts, QuantizedExperts):
            raise FusionError(
                f"the experts of {path!r} were quantised ({module.routed_experts.method.name}) and "
                "their original weights released; load the model again to have it unfused"
            )
    withdraw_keyword(model)
    unfuse_dense(model)
    for path, module in fused:
        hook = take_hook(module)
        original = module.restore()
        _put(model, path, original)
        if hook is not None:
            put_hook(original, hook)
    return len(fused)


def _check_place(path: str) -> None:
    """Refuses a module that nothing holds, in which another could take its place."""
    if not path:
        raise FusionError(
            "the model itself is the MoE block; pass the model that holds it, or use "
            "moetor.MoELayer; nothing was changed"
        )


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).add_module(name, module)
