"""What `moetor bench latency` and `moetor bench throughput` are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moetor.cli.options import (
    MODEL,
    QUANTIZATION,
    ModelSource,
    OffloadOptions,
    QuantizationName,
    check_batch_invariant,
    check_one_gpu,
)
from moetor.cli.parallel_options import ServingParallelFlags
from moetor.engine.config import ENGINE, EngineConfig
from moetor.errors import InputError
from moetor.output_paths import check_output_file

WHAT, HOW, OUTPUT = "what is measured", "how it is measured", "output"


@dataclass(frozen=True, kw_only=True)
class TextBenchOptions(ModelSource, EngineConfig, OffloadOptions, ServingParallelFlags):
    """What both commands take.

    The prompts are random tokens, the next token is always the likeliest, and no text ends before
    its length.
    """

    load_format: Literal["auto", "dummy"] = field(
        default="auto",
        metadata={
            "group": MODEL,
            "help": "auto loads the checkpoint; dummy draws random weights on the device, from "
            "the model's configuration alone or from a built-in one: qwen3-30b-a3b",
        },
    )
    layers: int | None = field(
        default=None,
        metadata={
            "group": MODEL,
            "metavar": "N",
            "help": "layers of a built-in configuration; none: all of them",
        },
    )
    level: Literal["auto", "block", "experts"] = field(
        default="auto",
        metadata={"group": MODEL, "help": "fuse whole MoE blocks or their experts alone"},
    )
    quantization: QuantizationName | None = field(default=None, metadata=QUANTIZATION)
    backend: Literal["engine", "generate"] = field(
        default="engine",
        metadata={
            "group": WHAT,
            "help": "what generates: our engine, or Transformers' own generate on the fused model",
        },
    )
    peer: Literal["none", "transformers", "continuous", "vllm"] = field(
        default="none",
        metadata={
            "group": WHAT,
            "help": "also measure, in turns, the same model as Transformers runs it, unfused: by "
            "its generate, or by its continuous batching; or as vLLM does, where it is installed",
        },
    )
    input_len: int = field(
        default=128, metadata={"group": WHAT, "metavar": "N", "help": "tokens of each prompt"}
    )
    output_len: int = field(
        default=128, metadata={"group": WHAT, "metavar": "N", "help": "tokens generated for each"}
    )
    cache: Literal["static", "dynamic"] = field(
        default="static",
        metadata={
            "group": HOW,
            "help": "keys and values; with static ones on a GPU, generate compiles the decoding "
            "step and captures it in CUDA graphs",
        },
    )
    compile: bool = field(
        default=True, metadata={"group": HOW, "help": "let generate compile where it does"}
    )
    # the same prompts come again in every round
    enable_prefix_caching: bool = field(
        default=False,
        metadata={"group": ENGINE, "help": "let a round find the blocks of the one before"},
    )
    rounds: int = field(
        default=3, metadata={"group": HOW, "metavar": "N", "help": "timed runs; medians are told"}
    )
    seed: int = field(default=0, metadata={"group": HOW, "help": "of prompts and random weights"})
    json: Path | None = field(
        default=None,
        metadata={"group": OUTPUT, "metavar": "FILE", "help": "write all figures there, as JSON"},
    )

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        for name in ("input_len", "output_len", "rounds"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {getattr(self, name)} must be at least 1")
        if self.layers is not None and self.layers < 1:
            raise InputError(f"--layers {self.layers} must be at least 1")
        if self.quantization is not None and self.peer != "none":
            raise InputError(
                f"--peer {self.peer} runs the same weights unfused, which quantised experts have "
                "not; leave out --peer or --quantization"
            )
        if self.parallel() is not None:
            self._check_ranks()
        check_one_gpu(self, self.parallel())
        check_batch_invariant(self.batch_invariant, self, self.parallel())
        if self.offload() is not None and self.peer != "none":
            raise InputError(
                f"--peer {self.peer} runs the same weights unfused, which it cannot with experts "
                "in host memory; leave out --peer or --cpu-experts"
            )
        if self.cpu_experts is not None and self.backend == "generate" and self.compile:
            raise InputError(
                "generate compiles the step into CUDA graphs of its own, which do not let experts "
                "change their place; give --no-compile or --backend engine with --cpu-experts"
            )
        if self.batch_invariant and self.backend == "generate":
            raise InputError(
                "--backend generate has one batch from beginning to end; take --backend engine "
                "with --batch-invariant"
            )
        if self.peer == "vllm":
            self._check_vllm()
        check_output_file("--json", self.json)

    def _check_vllm(self) -> None:
        from moetor.bench.generation_peers import vllm_refusal

        refused = vllm_refusal()
        if refused is not None:
            raise InputError(refused)
        if self.gpu_memory_utilization > 0.5:
            raise InputError(
                "--peer vllm has weights and a cache of its own, and each engine would take "
                f"--gpu-memory-utilization {self.gpu_memory_utilization:g} of one GPU; give at "
                "most 0.5"
            )

    def _check_ranks(self) -> None:
        if self.peer != "none":
            raise InputError(
                f"--peer {self.peer} runs the whole model on one device, and several ranks were "
                "asked for; leave out one of the two"
            )
        if self.backend == "generate" and self.data_parallel_size > 1:
            raise InputError(
                "--backend generate has no scheduler that shares prompts out between data-parallel "
                "ranks; take --backend engine, or -tp alone"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyOptions(TextBenchOptions):
    """Time one batch of prompts: the first token (TTFT) and each one after it (TPOT).

    The floor of a token is reading every weight that it needs once, at the measured read bandwidth;
    keys and values are not counted. The prompts are random tokens, the next token is always the
    likeliest, and no text ends before its length.
    """

    batch_size: tuple[int, ...] = field(
        default=(1,), metadata={"group": WHAT, "metavar": "B,...", "help": "prompts of a batch"}
    )

    def __post_init__(self) -> None:
        TextBenchOptions.__post_init__(self)
        if not self.batch_size or min(self.batch_size) < 1:
            raise InputError("--batch-size takes numbers of at least 1, for example 1,8,32")
        if self.backend == "engine" and max(self.batch_size) > self.max_num_seqs:
            raise InputError(
                f"--batch-size {max(self.batch_size)} is above --max-num-seqs {self.max_num_seqs}, "
                "so that prompts would wait; raise the latter"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputOptions(TextBenchOptions):
    """Time many prompts: tokens per second.

    Plain generate takes them in batches, one after another. The prompts are random tokens, the next
    token is always the likeliest, and no text ends before its length.
    """

    num_prompts: int = field(
        default=64, metadata={"group": WHAT, "metavar": "N", "help": "prompts in all"}
    )
    batch_size: int = field(
        default=32, metadata={"group": WHAT, "metavar": "B", "help": "prompts at once at most"}
    )

    def __post_init__(self) -> None:
        TextBenchOptions.__post_init__(self)
        if self.num_prompts < 1 or self.batch_size < 1:
            raise InputError(
                f"--num-prompts {self.num_prompts} and --batch-size {self.batch_size} must be at "
                f"least 1"
            )
