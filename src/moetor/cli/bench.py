"""`moetor bench layer`: one MoE layer against Transformers and the machine's measured limits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moetor.bench.shapes import check_tokens, parse_shapes
from moetor.cli.console import note, print_table, progress, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.options import QuantizationName
from moetor.errors import InputError
from moetor.output_paths import check_output_file

if TYPE_CHECKING:
    from moetor.bench.layer import LayerReport
    from moetor.bench.request import LayerBenchRequest

WHAT, HOW, OUTPUT = "what is measured", "how it is measured", "output"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBenchOptions:
    """Time the routed experts of one layer: random weights, read from memory at every call.

    Moetor's kernel and Transformers' own implementations run in turns on the same weights, each
    with the next routing of a rotation, and medians are reported, in microseconds, beside the
    floor: the larger of reading the active experts once at the measured read bandwidth and doing
    their arithmetic at the measured rate of torch's own matrix product. The kernel's output is
    checked against float32 arithmetic first; a wrong kernel is not reported.

    Shape letters: E experts, K experts per token (top_k), H hidden, I intermediate, T tokens.
    """

    shape: tuple[str, ...] = field(
        default=("qwen3-30b-a3b",),
        metadata={
            "group": WHAT,
            "metavar": "SHAPE,...",
            "help": "qwen3-30b-a3b, mixtral-8x7b, olmoe, gpt-oss-20b, deepseek-v3-ep8 (one of 8 "
            "expert-parallel ranks), all, or four numbers E,K,H,I; several with commas",
        },
    )
    tokens: tuple[int, ...] = field(
        default=(1, 8, 64, 512),
        metadata={"group": WHAT, "metavar": "T,...", "help": "tokens in a call"},
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"group": WHAT, "help": "of weights and hidden states"}
    )
    kernel: str = field(
        default="auto",
        metadata={
            "group": WHAT,
            "metavar": "NAME",
            "help": "kernel of ours: the one named, or an error saying why not; auto takes the "
            "fastest that can",
        },
    )
    peers: tuple[
        Literal["eager", "grouped_mm", "batched_mm", "vllm", "dense", "llama.cpp", "none"], ...
    ] = field(
        default=("eager", "grouped_mm", "batched_mm"),
        metadata={
            "group": WHAT,
            "metavar": "NAME,...",
            "help": "what to compare with: Transformers' eager, grouped_mm, batched_mm; vllm, its "
            "fused_experts where it is installed; dense, torch's products of the same total size "
            "with one weight, where arithmetic bounds; llama.cpp on the CPU where "
            "llama-cpp-python is installed, each row in its type of as many bits (BF16, Q8_0, "
            "Q4_0, MXFP4); or none. One that cannot run, or would take gigabytes or far too long, "
            "is left out, and the output says why",
        },
    )
    variants: tuple[Literal["small", "large", "plans", "routing"], ...] = field(
        default=(),
        metadata={
            "group": WHAT,
            "metavar": "KIND,...",
            "help": "with --device cuda, also time the Triton kernels' small path, their large "
            "path, other plans of both, and routing with experts, from router logits on",
        },
    )
    quantization: tuple[QuantizationName, ...] = field(
        default=(),
        metadata={
            "group": WHAT,
            "metavar": "NAME,...",
            "help": "also time the same weights quantised, such as int8, int8_w8a16, int4, mxfp4; "
            "each is compared with float32 arithmetic on its codes, and its floor counts its bytes",
        },
    )
    device: Literal["cpu", "cuda"] = field(
        default="cpu", metadata={"group": HOW, "help": "where it runs"}
    )
    threads: int | None = field(
        default=None,
        metadata={"group": HOW, "metavar": "N", "help": "CPU threads; none: as torch is set"},
    )
    routing: Literal["uniform", "zipf", "fixed"] = field(
        default="uniform",
        metadata={
            "group": HOW,
            "help": "how tokens choose experts: all equally often, a few much more often (weight "
            "1/rank), or all tokens of a call the same K",
        },
    )
    seconds: float | None = field(
        default=None,
        metadata={
            "group": HOW,
            "metavar": "S",
            "help": "begin no row after so many; the output says what was not measured",
        },
    )
    seed: int = field(
        default=0, metadata={"group": HOW, "help": "of weights, hidden states and routings"}
    )
    json: Path | None = field(
        default=None,
        metadata={
            "group": OUTPUT,
            "metavar": "FILE",
            "help": "write everything there: versions, hardware, ceilings, all times",
        },
    )
    plot: Path | None = field(
        default=None,
        metadata={
            "group": OUTPUT,
            "metavar": "FILE.png",
            "help": "draw the share of the floor against T there, a panel per shape; needs "
            "matplotlib (moetor[plot])",
        },
    )

    def __post_init__(self) -> None:
        parse_shapes(self.shape)
        check_tokens(self.tokens)
        if self.threads is not None and not 1 <= self.threads <= (os.cpu_count() or 1):
            raise InputError(
                f"--threads {self.threads}: this machine has 1 to {os.cpu_count() or 1}"
            )
        if "none" in self.peers and len(self.peers) > 1:
            raise InputError("--peers none stands alone; it compares with nothing")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"--seconds {self.seconds:g} must be positive")
        if self.variants and self.device != "cuda":
            raise InputError(
                f"--variants {','.join(self.variants)}: plans of the Triton kernels, which run on "
                f"NVIDIA GPUs; they need --device cuda, not {self.device}"
            )
        check_output_file("--json", self.json)
        check_output_file("--plot", self.plot, ending=".png")


def run(options: LayerBenchOptions) -> int:
    """Measure, print, write the files, and return the exit status: 1 where our kernel failed on a
    row or was wrong, which leaves that row out."""
    request = _request(options)
    if options.plot is not None:
        from moetor.bench.plot import check_plotting

        check_plotting()
    from moetor.bench.layer import bench_layers

    quiet_transformers()
    with progress("measuring", "steps") as measured:
        report = bench_layers(request, measured, partial(_keep, options.json))
    if report.times or report.unmeasured:
        _print(report)
    if options.json is not None:
        _keep(options.json, report)
        note(f"wrote {options.json}")
    if options.plot is not None:
        from moetor.bench.plot import plot_record

        plot_record(_record(report), options.plot)
        note(f"wrote {options.plot}")
    for failure in report.failures:
        note(f"not reported: {failure}")
    return 1 if report.failures else 0


def _request(options: LayerBenchOptions) -> LayerBenchRequest:
    import torch

    from moetor.bench.request import LayerBenchRequest
    from moetor.kernels.select import kernel_names

    if options.kernel not in kernel_names():
        raise UsageError(f"--kernel {options.kernel!r} is not one of {', '.join(kernel_names())}")
    return LayerBenchRequest(
        shapes=parse_shapes(options.shape),
        tokens=tuple(dict.fromkeys(options.tokens)),
        dtype=getattr(torch, options.dtype),
        device=options.device,
        threads=options.threads,
        kernel=options.kernel,
        peers=tuple(dict.fromkeys(peer for peer in options.peers if peer != "none")),
        routing=options.routing,
        seed=options.seed,
        variants=tuple(dict.fromkeys(options.variants)),
        quantizations=tuple(dict.fromkeys(options.quantization)),
        seconds=options.seconds,
    )


def _print(report: LayerReport) -> None:
    from moetor.bench.report import notes, table

    columns, rows = table(report)
    print_table("one MoE layer; vs: how many times as long the peer takes", columns, rows)
    for line in notes(report):
        print(line)


def _keep(path: Path | None, report: LayerReport) -> None:
    """Writes what there is so far, so that a run that is cut off leaves its rows."""
    if path is None:
        return
    import json

    text = json.dumps(_record(report), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _record(report: LayerReport) -> dict[str, Any]:
    """Everything about a run as plain values."""
    from moetor.bench.hardware import describe_run
    from moetor.bench.report import to_dict

    return describe_run(report.request.device, report.threads) | to_dict(report)
