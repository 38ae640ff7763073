"""`moetor quantize`: a checkpoint with quantised experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moetor.cli.console import print_json, print_table, progress, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.options import MODEL, OUTPUT, QuantizationName
from moetor.errors import InputError
from moetor.output_paths import check_output_folder

if TYPE_CHECKING:
    from moetor.huggingface.quantized_writing import QuantizeReport


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """Write a copy of a checkpoint whose routed experts are quantised.

    The layout is compressed-tensors', which Moetor and other engines load. Routers, shared experts
    and attention are copied. Prints how far each layer's weights were moved, by the norm.
    """

    model: str = field(
        metadata={
            "positional": True,
            "help": "folder or hub id of a Transformers model; demo ships in the package",
        }
    )
    out: Path = field(
        metadata={"positional": True, "metavar": "OUT", "help": "a new folder to write to"}
    )
    format: QuantizationName = field(default="int4", metadata={"help": "of the experts' weights"})
    revision: str | None = field(
        default=None,
        metadata={
            "group": MODEL,
            "metavar": "REV",
            "help": "branch, tag or commit of a hub model",
        },
    )
    json: bool = field(
        default=False,
        metadata={
            "group": OUTPUT,
            "help": "print one JSON object on standard output and nothing else there",
        },
    )

    def __post_init__(self) -> None:
        check_output_folder(self.out)


def run(options: QuantizeOptions) -> int:
    """Quantise, write, print, and return the exit status."""
    from moetor.huggingface.quantized_writing import quantize_checkpoint

    quiet_transformers()
    try:
        with progress(f"quantising {options.model}", "tensors") as done:
            report = quantize_checkpoint(
                options.model,
                options.out,
                options.format,
                revision=options.revision,
                progress=done,
            )
    except InputError as refusal:  # OUT, which the system would not make
        raise UsageError(str(refusal)) from refusal
    if options.json:
        print_json(_as_data(options.model, report))
    else:
        _print(options.model, report)
    return 0


def _as_data(model: str, report: QuantizeReport) -> dict[str, object]:
    return {
        "model": model,
        "out": str(report.folder),
        "quantization": report.quantization,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "layers": [
            {"name": layer.name, "experts": layer.experts, "errors": layer.errors}
            for layer in report.layers
        ],
    }


def _print(model: str, report: QuantizeReport) -> None:
    matrices = list(dict.fromkeys(name for layer in report.layers for name in layer.errors))
    rows = [
        (
            layer.name,
            str(layer.experts),
            *(f"{layer.errors[name]:.2e}" if name in layer.errors else "" for name in matrices),
        )
        for layer in report.layers
    ]
    title = f"{model}: relative error of the weights in {report.quantization}"
    print_table(title, ("experts of", "experts", *matrices), rows)
    before, after = report.bytes_before / 2**30, report.bytes_after / 2**30
    print(f"experts: {before:.3g} -> {after:.3g} GiB, written to {report.folder}")
