"""Loads and fuses the model of a command, with a bar for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moetor.cli.console import note, progress

if TYPE_CHECKING:
    from moetor.cli.options import ServedModelOptions
    from moetor.huggingface import FusionReport


def load_fused(options: ServedModelOptions) -> tuple[Any, FusionReport | None]:
    """The model, and what was fused; None with level `none`."""
    from moetor import huggingface
    from moetor.huggingface import loading

    name = options.model
    with progress(f"loading {name}", "tensors") as loaded:
        model = loading.load_model(
            name,
            dtype=options.dtype,
            device=options.device,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            quantization=options.quantization,
            kernel=options.kernel,
            for_fusing=options.level != "none",
            progress=loaded,
        )
    if options.level == "none":
        return model, None
    with progress(f"fusing {name}", "blocks") as fused:
        report = huggingface.fuse(
            model,
            level=options.level,
            kernel=options.kernel,
            quantization=options.quantization,
            progress=fused,
        )
    if not report.blocks:
        note(f"{name} has no MoE blocks; nothing was fused")
    if report.quantized is not None:
        note(report.quantized)
    return model, report
