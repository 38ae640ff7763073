"""Replacements of a model's MoE blocks, built and proved; the model is not changed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from moetor.config import RouterConfig
from moetor.errors import (
    ConfigError,
    FusionError,
    FusionMismatchError,
    KernelRefusedError,
    UnsupportedError,
)
from moetor.huggingface.block_form import (
    ExpertsSource,
    beside_label,
    compositions,
    experts_modules,
    find_left_alone,
    recognise_beside,
    recognise_block,
)
from moetor.huggingface.block_plan import BlockPlan
from moetor.huggingface.experts_form import Unrecognised, recognise_experts
from moetor.huggingface.fuse_options import (
    FuseOptions,
    Progress,
)
from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.modules import FusedMoEBlock
from moetor.huggingface.quantized_loading import (
    has_stand_ins,
    random_weights,
    share_parameters,
)
from moetor.huggingface.quantizing import attach_quantized
from moetor.huggingface.replacements import (
    Replacement,
    quantized_report,
)
from moetor.huggingface.report import BlockReport
from moetor.huggingface.report_lines import block_report, left_alone_report, top_k_of
from moetor.huggingface.split_experts import SplitExperts
from moetor.huggingface.trial import try_block, try_experts


def prepare_all(
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
