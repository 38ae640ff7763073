"""Loads and fuses the model of a command, with a bar for each."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from moetor.cli.console import note, progress
from moetor.cli.parallel_options import ParallelModelOptions

if TYPE_CHECKING:
    from moetor.cli.options import ServedModelOptions
    from moetor.huggingface import FusionReport


def load_fused(options: ServedModelOptions) -> tuple[Any, FusionReport | None]:
    """The model, and what was fused; None with level `none`. Of several ranks, this one's part."""
    from moetor.config import RunnerConfig
    from moetor.huggingface import fuse, loading
    from moetor.parallel.groups import join_ranks

    name = options.model
    parallel = options.parallel() if isinstance(options, ParallelModelOptions) else None
    invariant = isinstance(options, ParallelModelOptions) and options.batch_invariant
    device = options.device
    if parallel is not None:
        device = join_ranks(device)
    # Of several ranks each knows its share of the experts, and reads it, once the model is spread.
    sharded = parallel is not None and options.level != "none"
    report: FusionReport | None = None
    offload = options.offload()
    with progress(f"loading {name}", "tensors") as loaded:
        model = loading.load_model(
            name,
            dtype=options.dtype,
            device=device,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            quantization=options.quantization,
            kernel=options.kernel,
            for_fusing=options.level != "none",
            sharded=sharded,
            cpu_experts=offload,
            progress=loaded,
        )
        if options.level == "none":
            return model, None
        fuse_it = partial(
            fuse,
            model,
            level=options.level,
            kernel=options.kernel,
            quantization=options.quantization,
            runner=RunnerConfig(batch_invariant=invariant),
            parallel=parallel,
            cpu_experts=offload,
        )
        if sharded:
            report = fuse_it()
    if report is None:
        with progress(f"fusing {name}", "blocks") as fused:
            report = fuse_it(progress=fused)
    if not report.blocks:
        note(f"{name} has no MoE blocks; nothing was fused")
    if report.quantized is not None:
        note(report.quantized)
    if report.offload is not None:
        for line in report.offload.lines():
            note(line)
    return model, report
