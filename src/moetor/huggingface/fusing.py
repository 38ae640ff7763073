"""`fuse`: MoE blocks of a live Transformers model become `MoELayer`s, proved against the
originals; and `unfuse`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from moetor.config import RouterConfig, RunnerConfig
from moetor.errors import (
    ConfigError,
    FusionError,
    FusionMismatchError,
    KernelRefusedError,
    UnsupportedError,
)
from moetor.huggingface.bare import adopt_hooks, hooks_off
from moetor.huggingface.block_form import (
    ExpertsSource,
    beside_label,
    compositions,
    experts_modules,
    find_blocks,
    find_left_alone,
    recognise_beside,
    recognise_block,
)
from moetor.huggingface.block_plan import BlockPlan
from moetor.huggingface.dense_fusing import fuse_dense, unfuse_dense
from moetor.huggingface.experts_form import Unrecognised, recognise_experts
from moetor.huggingface.fuse_options import (
    FuseLevel,
    FuseOptions,
    Progress,
    VerifyMode,
    check_options,
)
from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.modules import FusedMoEBlock, fused_modules, install_gate
from moetor.huggingface.offloading import check_host_experts, offload_blocks, plan_for
from moetor.huggingface.parallelism import parallelize
from moetor.huggingface.placement import hooks_aside, put_hook, take_hook
from moetor.huggingface.quantized_loading import (
    forget_held,
    has_stand_ins,
    random_weights,
    share_parameters,
)
from moetor.huggingface.quantizing import (
    RefuseToSave,
    attach_quantized,
    check_quantizable,
)
from moetor.huggingface.replacements import (
    Replacement,
    quantize_all,
    quantized_report,
    take_back,
    unquantized,
)
from moetor.huggingface.report import BlockReport, FusionReport
from moetor.huggingface.report_lines import block_report, left_alone_report, top_k_of
from moetor.huggingface.routed_keyword import offer_keyword, withdraw_keyword
from moetor.huggingface.sharded_loading import check_withheld, read_withheld
from moetor.huggingface.split_experts import SplitExperts
from moetor.huggingface.trial import try_block, try_experts
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
            alone, and the report's `dense` says why.
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
        raise ConfigError("cpu_experts and parallel cannot be had together; leave one None")
    if dense and parallel is not None:
        raise ConfigError("dense=True joins weights that `parallel` would split; choose one")
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
            for replacement, report in _prepare_all(model, found, options, hooked, progress):
                reports.append(report)
                if replacement is not None:
                    replacements.append(replacement)
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


def _prepare_all(
    model: nn.Module,
    found: list[tuple[str, nn.Module, ExpertsSource]],
    options: FuseOptions,
    hooked: frozenset[nn.Module],
    progress: Progress | None,
) -> Iterator[tuple[Replacement | None, BlockReport]]:
    """Every block of the model, with its replacement where there is one."""
    hint: RouterConfig | None = None
    for number, (path, block, source) in enumerate(found, 1):
        if options.level != "experts" and not hooked.isdisjoint(experts_modules(block, source)):
            made = _prepare_hooked(path, block, source, options)
        else:
            made = _prepare_held(path, block, source, options, hint)
        replacement, report = made
        yield replacement, report
        if replacement is not None and isinstance(replacement.module, FusedMoEBlock):
            replacement.module.release_original()
            hint = replacement.module.config.router
        if progress is not None:
            progress(number, len(found), path)
    for path, block, reason in find_left_alone(model):
        if options.level == "block":
            raise FusionError(
                f"block {path!r} ({type(block).__name__}) cannot be fused: {reason}. Use "
                "level='auto' to leave it as it is; nothing was changed"
            )
        yield None, left_alone_report(path, block, reason)


def _prepare_held(
    path: str,
    block: nn.Module,
    source: ExpertsSource,
    options: FuseOptions,
    hint: RouterConfig | None,
) -> tuple[Replacement | None, BlockReport]:
    """As `_prepare`, with the weights that were loaded for the block's experts, if any were."""
    if isinstance(source, SplitExperts):
        return _prepare(path, block, source, options, hint)
    held = options.held.get(f"{path}.{source}" if path else source)
    original = block.get_submodule(source)
    if held is None and not has_stand_ins(original):
        return _prepare(path, block, source, options, hint)
    with random_weights(original):
        replacement, report = _prepare(path, block, source, options, hint)
        if replacement is None:
            raise FusionError(
                f"block {path!r} cannot be fused: {report.reason}. Its experts can then be loaded "
                "neither quantised nor over several ranks; leave out quantization and parallel"
            )
        if held is not None:
            done = attach_quantized(replacement.module, held)
            return replacement, quantized_report(report, replacement, done)
    share_parameters(replacement.module, original)
    return replacement, report


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


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    if not path:
        raise FusionError(
            "the model itself is the MoE block; pass the model that holds it, or use "
            "moetor.MoELayer"
        )
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).add_module(name, module)


def _prepare(
    path: str,
    block: nn.Module,
    source: ExpertsSource,
    options: FuseOptions,
    hint: RouterConfig | None,
) -> tuple[Replacement | None, BlockReport]:
    """One block's replacement, built and compared, and its line of the report."""
    why = "asked for level 'experts'"
    if options.level != "experts":
        plan = recognise_block(
            path,
            block,
            source,
            quantization=options.method,
            runner=options.runner,
            hint=hint,
        )
        made = plan if isinstance(plan, Unrecognised) else _try_plan(plan, options)
        if not isinstance(made, Unrecognised):
            fused, error = made
            return Replacement(path, fused), block_report(path, block, fused, error)
        why = made.reason
        if isinstance(plan, Unrecognised) and recognise_beside(block, source) is not None:
            return _prepare_experts(path, block, source, options, "")
        if options.level == "block":
            raise _not_whole(path, block, why)
    return _prepare_experts(path, block, source, options, why)


def _prepare_hooked(
    path: str, block: nn.Module, source: ExpertsSource, options: FuseOptions
) -> tuple[Replacement | None, BlockReport]:
    """A block with a forward hook on its experts, which are not called as a module once the block
    is fused.
    """
    why = "a forward hook on its experts would not run"
    if options.level == "block":
        raise _not_whole(path, block, why)
    return _prepare_experts(path, block, source, options, why)


def _not_whole(path: str, block: nn.Module, why: str) -> FusionError:
    return FusionError(
        f"block {path!r} ({type(block).__name__}) cannot be fused at level 'block': {why}. Use "
        "level='auto' to fuse its experts alone; nothing was changed"
    )


def _try_plan(
    plan: BlockPlan, options: FuseOptions
) -> tuple[FusedMoEBlock, float | None] | Unrecognised:
    try:
        compare = options.proofs.needed((type(plan.block), plan.config, plan.children))
        return try_block(compositions(plan), compare=compare)
    except FusionMismatchError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, KernelRefusedError | ConfigError | UnsupportedError):
            raise
        return Unrecognised(f"its block could not be tried alone: {error}")


def _prepare_experts(
    path: str, block: nn.Module, source: ExpertsSource, options: FuseOptions, why: str
) -> tuple[Replacement | None, BlockReport]:
    """The experts in their place, or a line that says why not even they.

    Args:
        why: no more than they; empty where they and their router are the whole block.
    """
    if isinstance(source, SplitExperts):
        return None, left_alone_report(path, block, f"{why}; {source.only_whole}")
    original = block.get_submodule(source)
    experts_path = f"{path}.{source}" if path else source
    config = recognise_experts(original)
    if not isinstance(config, Unrecognised) and "forward" in original.__dict__:
        config = Unrecognised("their forward is wrapped by a hook")
    if not isinstance(config, Unrecognised) and options.method is not None:
        raise ConfigError(
            f"block {path!r} can only be fused at level 'experts', which takes no quant method: "
            f"{why or 'its layer calls router and experts itself'}"
        )
    if isinstance(config, Unrecognised):
        reason = config.reason if config.reason == why else _also(why, config.reason)
        return None, left_alone_report(path, block, reason)
    top_k = top_k_of(block, config.num_experts)
    fused = FusedExperts(original, config, top_k, options.runner, experts_path)
    try:
        compare = options.proofs.needed((type(original), config, top_k))
        error = try_experts(original, fused, experts_path, compare=compare)
    except FusionMismatchError as mismatch:
        if options.level != "auto":
            raise
        return None, left_alone_report(path, block, _also(why, str(mismatch)))
    except (RuntimeError, TypeError, ValueError, IndexError) as failure:
        if isinstance(failure, KernelRefusedError):
            raise
        reason = _also(why, f"its experts are not called as (hidden, ids, weights): {failure}")
        return None, left_alone_report(path, block, reason)
    choice = fused.routed_experts.kernel_choice
    return Replacement(experts_path, fused), BlockReport(
        name=path,
        family_block=type(block).__name__,
        level="experts" if why else "block",
        router="Transformers" if why else beside_label(block),
        kernel=choice.kernel.name,
        reason=why,
        max_error=error,
        refusals=choice.refusals,
        num_experts=config.num_experts,
        kernel_note=choice.note,
    )


def _also(why: str, more: str) -> str:
    return f"{why}; {more}" if why else more
