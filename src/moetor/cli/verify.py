"""`moetor verify`: the fused model against the original."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetor.cli.console import print_json, print_table, progress, quiet_transformers
from moetor.cli.options import FusedModelOptions

if TYPE_CHECKING:
    from moetor.huggingface.verifying import VerifyReport

COLUMNS = ("block", "level", "kernel", "error", "tolerance", "result", "quantised", "note")
_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions(FusedModelOptions):
    """Compare the fused model with the original.

    Every MoE block and the whole model's logits, within a tolerance that follows from the dtype;
    for the demo model also the perplexity of its held-out text. With --quantization also the error
    of each block's quantised experts, by the norm; the demo's perplexity then has a limit. The exit
    status is 1 when anything differs or when a weight is not finite.
    """


def run(options: VerifyOptions) -> int:
    """Compare, print, and return the exit status."""
    from moetor.huggingface import verify

    quiet_transformers()
    with progress(f"comparing {options.model}", "blocks") as compared:
        report = verify(
            options.model,
            level=options.level,
            kernel=options.kernel,
            quantization=options.quantization,
            dtype=options.dtype,
            device=options.device,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            progress=compared,
        )
    if options.json:
        print_json({"model": options.model, **report.to_dict()})
    else:
        _print(options.model, report)
    return 0 if report.ok else 1


def _print(model: str, report: VerifyReport) -> None:
    quantised = report.quantized is not None
    columns = [name for name in COLUMNS if name != "quantised" or quantised]
    rows = []
    for block in report.blocks:
        row = [
            block.name,
            block.level,
            block.kernel or "",
            _number(block.max_error),
            _number(block.tolerance),
            "ok" if block.ok else "DIFFERS",
        ]
        if quantised:
            row.append(_number(block.quantization_error))
        rows.append((*row, block.note))
    if not rows:
        print(f"{model}: no MoE blocks, nothing to fuse")
    else:
        print_table(f"{model}: fused against original, {len(rows)} MoE blocks", columns, rows)
    if report.quantized is not None:
        print(report.quantized)
    limit = _number(report.logits_tolerance)
    print(f"logits: error {_number(report.logits_error)}{limit and f', tolerance {limit}'}")
    if report.perplexity is not None:
        original, fused = report.perplexity
        line = f"perplexity: {original:.4f} original, {fused:.4f} fused"
        if report.perplexity_limit is not None:
            change, allowed = fused / original - 1, report.perplexity_limit - 1
            line = f"{line} and quantised ({change:+.2%}, {allowed:+.0%} allowed)"
        print(line)
    wrong = _what_is_wrong(report)
    print(f"FAILED: {'; '.join(wrong)}" if wrong else "ok")


def _what_is_wrong(report: VerifyReport) -> list[str]:
    """Each thing that fails, as half a sentence."""
    wrong = []
    differing = sum(not block.ok for block in report.blocks)
    if differing:
        wrong.append(f"{differing} of {len(report.blocks)} blocks differ")
    if not report.logits_ok:
        wrong.append("the logits differ")
    if not report.perplexity_ok:
        wrong.append("the perplexity has risen too far")
    if report.non_finite:
        names = ", ".join(report.non_finite[:_NAMES_SHOWN])
        more = len(report.non_finite) - _NAMES_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        wrong.append(f"weights that are not finite (NaN or infinity): {names}{rest}")
    return wrong


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if math.isfinite(value) else str(value)
