"""What has been built for a model and waits for its place, and quantising it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moetor.huggingface.fused_experts import FusedExperts
from moetor.huggingface.modules import FusedMoEBlock
from moetor.huggingface.quantizing import QuantizedBlock, quantize_module
from moetor.huggingface.report import BlockReport
from moetor.layer.quantized_experts import QuantizedExperts
from moetor.quant_config import QuantConfig


@dataclass(frozen=True, slots=True)
class Replacement:
    """A built and proved module that waits for its place."""

    path: str
    module: FusedMoEBlock | FusedExperts


def take_back(replacements: list[Replacement]) -> None:
    """Gives the originals of packed experts their tensors again."""
    for replacement in replacements:
        if isinstance(replacement.module, FusedMoEBlock) and replacement.module.split is not None:
            replacement.module.restore()


def unquantized(replacements: list[Replacement]) -> list[Replacement]:
    """Those whose experts have their weights as they were."""
    return [
        one for one in replacements if not isinstance(one.module.routed_experts, QuantizedExperts)
    ]


def quantized_report(
    report: BlockReport, replacement: Replacement, done: QuantizedBlock
) -> BlockReport:
    """The line of a block whose experts were quantised."""
    return replace(
        report,
        kernel=done.kernel,
        refusals=replacement.module.routed_experts.kernel_choice.refusals,
        quantization=done.name,
        quantization_error=done.error,
        expert_bytes=(done.bytes_before, done.bytes_after),
    )


def quantize_all(
    replacements: list[Replacement], reports: list[BlockReport], quant: QuantConfig
) -> None:
    """Quantises the experts of every replacement, and writes it into the reports."""
    lines = [number for number, report in enumerate(reports) if report.level != "none"]
    places = dict(zip((one.path for one in replacements), lines, strict=True))
    for one in unquantized(replacements):
        done = quantize_module(one.module, one.path, quant)
        place = places[one.path]
        reports[place] = quantized_report(reports[place], one, done)
