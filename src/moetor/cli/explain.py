"""`moetor explain`: what would be fused and how, without loading any weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moetor.cli.console import print_json, print_table, quiet_transformers
from moetor.cli.options import HOST, FusedModelOptions, OffloadOptions
from moetor.errors import ConfigError
from moetor.offload_config import OffloadConfig, parse_bytes

if TYPE_CHECKING:
    from moetor.engine.reserve import Reserve
    from moetor.huggingface.report import BlockReport

COLUMNS = ("block", "class", "level", "kernel", "routing", "reason")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainOptions(FusedModelOptions, OffloadOptions):
    """Show what would be fused and how.

    One line for each kind of MoE block: at which level it would be fused, by which kernel, and why
    not deeper; then why each preferred kernel was refused, what the weights would take in memory,
    and how the engine would cache keys and states. Reads the configuration, loads no weights.
    """

    host_memory: str | None = field(
        default=None,
        metadata={
            "group": HOST,
            "metavar": "SIZE",
            "help": "what the experts may take of host memory; without it, what is free here",
        },
    )

    def __post_init__(self) -> None:
        if self.host_memory is not None and self.cpu_experts is None:
            raise ConfigError("--host-memory is about experts in host memory; give --cpu-experts")
        self.offload()


def run(options: ExplainOptions) -> int:
    """Print the plan and return the exit status."""
    from moetor.huggingface import explain, loading

    quiet_transformers()
    config = loading.load_config(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    offload, reserve = _offload(options, config)
    report = explain(
        options.model,
        kernel=options.kernel,
        level=options.level,
        quantization=options.quantization,
        dtype=options.dtype,
        device=options.device,
        cpu_experts=offload,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    engine = engine_line(config)
    if options.json:
        print_json({"model": options.model, **report.to_dict(), "engine": engine})
        return 0
    if not report.blocks:
        print(f"{options.model}: no MoE blocks, nothing to fuse")
        print(engine)
        return 0
    groups = group_blocks(report.blocks)
    rows = [
        (name, one.family_block, one.level, one.kernel or "", one.router, one.reason)
        for name, one in groups
    ]
    print_table(f"{options.model}: {len(report.blocks)} MoE blocks", COLUMNS, rows)
    for name, one in groups:
        for refusal in one.refusals:
            print(f"kernel {refusal.kernel} not used in {name}: it {refusal.reason}")
        if one.kernel_note is not None:
            print(f"kernel {one.kernel} in {name}: {one.kernel_note}")
    if report.quantized is not None:
        print(report.quantized)
    if report.weight_bytes is not None:
        print(f"memory: {report.weight_bytes / 2**30:.3g} GiB of weights")
    if report.offload is not None:
        print(*report.offload.lines(), reserve, sep="\n")
    print(engine)
    return 0


def _offload(options: ExplainOptions, config: Any) -> tuple[OffloadConfig | None, Reserve | None]:
    """What is asked for, and what the engine with its usual settings needs beside it."""
    import torch

    from moetor.engine.config import EngineConfig
    from moetor.engine.reserve import predict_reserve
    from moetor.huggingface.devices import find_dtype

    host = None if options.host_memory is None else parse_bytes(options.host_memory, "host_memory")
    asked = options.offload(host_memory=host)
    if asked is None:
        return None, None
    text = config.get_text_config(decoder=True)
    dtype = find_dtype(options.dtype) or getattr(text, "dtype", None) or torch.float32
    memory = asked.gpu_memory
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[1]
    reserve = predict_reserve(EngineConfig(), text, dtype, memory)
    return replace(asked, reserve=reserve.nbytes), reserve


def engine_line(config: Any) -> str:
    """How the engine would cache the model, as far as its configuration tells."""
    from moetor.engine.strategy import ENCODER_DECODER, expected_strategy

    strategy = ENCODER_DECODER
    if not config.is_encoder_decoder:
        strategy = expected_strategy(config.get_text_config(decoder=True))
    return f"engine: cache {strategy}; tried against the model's own when it starts"


def group_blocks(blocks: Sequence[BlockReport]) -> list[tuple[str, BlockReport]]:
    """Blocks that differ in the layer number alone, as one: `model.layers.0-47.mlp`."""
    groups: dict[tuple[object, ...], tuple[BlockReport, list[int]]] = {}
    for block in blocks:
        found = re.search(r"(?<=\.)\d+(?=\.|$)", block.name)
        template = block.name if found is None else _with_layer(block.name, found, "{}")
        same = (
            template,
            block.family_block,
            block.level,
            block.kernel,
            block.router,
            block.reason,
            block.refusals,
            block.kernel_note,
            block.quantization,
        )
        layers = groups.setdefault(same, (block, []))[1]
        if found is not None:
            layers.append(int(found.group()))
    return [
        (str(key[0]).replace("{}", ranges(layers)), block)
        for key, (block, layers) in groups.items()
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers, runs shortened: 0-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _with_layer(name: str, found: re.Match[str], layer: str) -> str:
    return name[: found.start()] + layer + name[found.end() :]
