"""`moetor bench latency` and `moetor bench throughput`: how fast a fused model generates text."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moetor.cli.console import note, print_table, progress, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.options import (
    MODEL,
    QUANTIZATION,
    ModelSource,
    OffloadOptions,
    QuantizationName,
    ServingParallelFlags,
    check_one_gpu,
)
from moetor.engine.config import ENGINE, EngineConfig
from moetor.errors import InputError
from moetor.parallel.launch import rank_number

if TYPE_CHECKING:
    from moetor.bench.generation import TextBackend, Workload
    from moetor.huggingface import FusionReport
    from moetor.offload_config import OffloadConfig

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
    peer: Literal["none", "transformers", "continuous"] = field(
        default="none",
        metadata={
            "group": WHAT,
            "help": "also measure, in turns, the same model as Transformers runs it, unfused: by "
            "its generate, or by its continuous batching",
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
        metadata={"group": OUTPUT, "metavar": "FILE", "help": "write everything there"},
    )

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        for name in ("input_len", "output_len", "rounds"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {getattr(self, name)} must be at least 1")
        if self.quantization is not None and self.peer != "none":
            raise InputError(
                f"--peer {self.peer} runs the same weights unfused, which quantised experts have "
                "not; leave out --peer or --quantization"
            )
        if self.parallel() is not None:
            self._check_ranks()
        check_one_gpu(self, self.parallel())
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
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise InputError(f"--json {self.json}: there is no folder {self.json.parent}")

    def _check_ranks(self) -> None:
        if self.peer != "none":
            raise InputError(
                f"--peer {self.peer} runs the whole model on one device, and several ranks were "
                "asked for; leave out one of the two"
            )
        if self.fuse_dense == "on":
            raise InputError(
                "--fuse-dense on joins what several ranks split: dense parts are joined, or split "
                "by Transformers' plan, not both; leave out one of the two"
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


def run(options: LatencyOptions | ThroughputOptions) -> int:
    """Measure, print, write the file, and return the exit status."""
    quiet_transformers()
    with nullcontext() if rank_number() == 0 else redirect_stdout(StringIO()):
        return _run(options)


def _run(options: LatencyOptions | ThroughputOptions) -> int:
    config = _config(options)
    model = _load(options, config)
    backends, report = _backends(options, model)
    vocabulary = config.get_text_config().vocab_size
    if isinstance(options, LatencyOptions):
        record = _latency(options, backends, model, vocabulary)
    else:
        record = _throughput(options, backends, vocabulary)
    print(f"kernels: {', '.join(report.kernels) or 'none of ours'}")
    record |= _hot_experts(model)
    if options.json is not None and rank_number() == 0:
        _write(options, model, record | {"fusion": report.to_dict()})
    return 0


def _hot_experts(model: Any) -> dict[str, float]:
    """How often the cache had the experts that were chosen, where there is one."""
    from moetor.huggingface.offloading import offload_of

    group = offload_of(model)
    if group is None or not group.hot.choices:
        return {}
    hits = group.hot.hits / group.hot.choices
    print(f"hot experts: {group.cache_experts} of a layer, {hits:.1%} of what was chosen")
    return {"hot_expert_hits": hits}


def _config(options: TextBenchOptions) -> Any:
    """The model's configuration, long enough for the texts."""
    from moetor.huggingface import loading
    from moetor.huggingface.dummy import CONFIGS

    if options.model in CONFIGS:
        if options.load_format != "dummy":
            raise UsageError(
                f"{options.model!r} is a built-in configuration without weights; use "
                f"--load-format dummy, or a folder or hub id"
            )
        config = CONFIGS[options.model]()
    else:
        config = loading.load_config(
            options.model,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    context, length = loading.context_length(config), options.input_len + options.output_len
    if context is not None and length > context:
        raise UsageError(
            f"--input-len {options.input_len} and --output-len {options.output_len} are together "
            f"more than the {context} tokens that {options.model!r} can attend to"
        )
    return config


def _load(options: TextBenchOptions, config: Any) -> Any:
    import torch

    from moetor.huggingface import loading
    from moetor.huggingface.dummy import dummy_model
    from moetor.parallel.groups import join_ranks

    several = options.parallel() is not None
    device_name = join_ranks(options.device) if several else options.device
    offload = _offload(options, config)
    if options.load_format == "dummy":
        dtype = loading.find_dtype(options.dtype) or config.dtype or torch.bfloat16
        device = loading.find_device(device_name)
        made = loading.model_class(config)
        seed, quantization = options.seed, options.quantization
        model = dummy_model(config, made, dtype, device, seed, quantization, offload)
        note(f"drew {sum(one.numel() for one in model.parameters()) / 1e6:,.1f} million weights")
        return model
    with progress(f"loading {options.model}", "tensors") as loaded:
        return loading.load_model(
            options.model,
            dtype=options.dtype,
            device=device_name,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            quantization=options.quantization,
            kernel=options.kernel,
            for_fusing=options.peer == "none",
            sharded=several,
            cpu_experts=offload,
            progress=loaded,
        ).requires_grad_(False)


def _backends(options: TextBenchOptions, model: Any) -> tuple[list[TextBackend], FusionReport]:
    """Ours, on `model` fused in place, and the peer, on a copy that shares its weights."""
    import copy

    from moetor.bench.generation import ContinuousBackend, GenerateBackend
    from moetor.huggingface import fuse

    settings: dict[str, Any] = {"cache": options.cache, "compiled": options.compile}
    peers: list[TextBackend] = []
    if options.peer != "none":
        shared = [*model.parameters(), *model.buffers()]
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
        if options.peer == "transformers":
            peers.append(GenerateBackend("transformers", twin, **settings))
        else:
            peers.append(ContinuousBackend("transformers continuous", twin))
    with progress(f"fusing {options.model}", "blocks") as fused:
        report = fuse(
            model,
            level=options.level,
            kernel=options.kernel,
            quantization=options.quantization,
            dense=options.parallel() is None and options.fuses_dense(model.device.type),
            parallel=options.parallel(),
            cpu_experts=_offload(options, model.config),
            progress=fused,
        )
    if report.offload is not None:
        for line in report.offload.lines():
            note(line)
    if not report.blocks:
        note(f"{options.model} has no MoE blocks; nothing was fused")
    ours: TextBackend
    if options.backend == "engine":
        ours = _engine_backend(options, model)
    else:
        ours = GenerateBackend("moetor generate", model, **settings)
    return [ours, *peers], report


def _offload(options: TextBenchOptions, config: Any) -> OffloadConfig | None:
    """Which experts stay in host memory, with room for what the engine needs."""
    import torch

    from moetor.engine.reserve import settle_offload
    from moetor.huggingface import loading

    dtype = loading.find_dtype(options.dtype) or getattr(config, "dtype", None) or torch.bfloat16
    return settle_offload(
        options.offload(),
        _engine_config(options),
        config.get_text_config(decoder=True),
        dtype,
        loading.find_device(options.device),
    )


def _engine_config(options: TextBenchOptions) -> EngineConfig:
    """With room for nothing longer than the texts unless it was asked for."""
    length = options.max_model_len or options.input_len + options.output_len
    return EngineConfig.of(options, max_model_len=length, load_format="auto")


def _engine_backend(options: TextBenchOptions, model: Any) -> TextBackend:
    from moetor.bench.generation import EngineBackend
    from moetor.engine import ModelSource as EngineSource
    from moetor.engine import build_engine

    engine = build_engine(EngineSource(model=model, level="none"), _engine_config(options))
    note(f"strategy {engine.strategy}; CUDA graphs: {engine.without_graphs or 'yes'}")
    return EngineBackend("moetor", engine)


def _latency(
    options: LatencyOptions, backends: list[TextBackend], model: Any, vocabulary: int
) -> dict[str, Any]:
    from moetor.bench.ceilings import measure_ceilings
    from moetor.bench.generation import decode_bytes, host_decode_bytes, measure_latency
    from moetor.bench.generation_report import latency_dict, latency_table

    sizes = tuple(dict.fromkeys(options.batch_size))
    ceilings = measure_ceilings(model.device.type, model.dtype)
    floors = {size: decode_bytes(model, size) / ceilings.read_bytes_per_s for size in sizes}
    if any(host_decode_bytes(model, size) for size in sizes):
        # A layer's host part and the layers around it wait for each other.
        host = measure_ceilings("cpu", model.dtype)
        for size in sizes:
            floors[size] += host_decode_bytes(model, size) / host.read_bytes_per_s
    rows = []
    with progress("measuring", "batches") as measured:
        total, done = len(sizes) * len(backends) * (options.rounds + 1), 0

        def count() -> None:
            nonlocal done
            done += 1
            measured(done, total)

        for size in sizes:
            work = _workload(options, size, size, vocabulary)
            rows += measure_latency(backends, work, options.rounds, count)
    print_table("one batch; tok/s of all its prompts", *latency_table(rows, floors))
    print(f"ceilings: {ceilings.describe()}")
    return latency_dict(rows, floors) | {"ceilings": asdict(ceilings)}


def _throughput(
    options: ThroughputOptions, backends: list[TextBackend], vocabulary: int
) -> dict[str, Any]:
    from moetor.bench.generation import measure_throughput
    from moetor.bench.generation_report import throughput_dict, throughput_table

    work = _workload(options, options.batch_size, options.num_prompts, vocabulary)
    with progress("measuring", "runs") as measured:
        total, done = len(backends) * (options.rounds + 1), 0

        def count() -> None:
            nonlocal done
            done += 1
            measured(done, total)

        rows = measure_throughput(backends, work, options.rounds, count)
    print_table("all prompts", *throughput_table(rows))
    return throughput_dict(rows)


def _workload(options: TextBenchOptions, size: int, prompts: int, vocabulary: int) -> Workload:
    from moetor.bench.generation import Workload

    return Workload(
        input_length=options.input_len,
        output_length=options.output_len,
        batch_size=size,
        prompts=prompts,
        vocabulary=vocabulary,
        seed=options.seed,
    )


def _write(options: TextBenchOptions, model: Any, record: dict[str, Any]) -> None:
    import json

    import torch

    from moetor.bench.hardware import describe_run

    assert options.json is not None, "asked by the caller"
    settings = {name: str(value) for name, value in asdict(options).items()}
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    head = describe_run(model.device.type, torch.get_num_threads())
    text = json.dumps(
        head | {"settings": settings, "peak_memory_bytes": peak} | record, indent=1, default=str
    )
    options.json.write_text(text + "\n", encoding="utf-8")
    note(f"wrote {options.json}")
