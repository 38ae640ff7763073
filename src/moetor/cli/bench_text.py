"""`moetor bench latency` and `moetor bench throughput`: how fast a fused model generates text."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import TYPE_CHECKING, Any

from moetor.cli.bench_text_options import LatencyOptions, TextBenchOptions, ThroughputOptions
from moetor.cli.console import note, print_table, progress, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.engine.config import EngineConfig
from moetor.parallel.launch import rank_number

if TYPE_CHECKING:
    import torch

    from moetor.bench.ceilings import Ceilings
    from moetor.bench.generation import TextBackend, Workload
    from moetor.huggingface import FusionReport
    from moetor.offload_config import OffloadConfig


def run(options: LatencyOptions | ThroughputOptions) -> int:
    """Measure, print, write the file, and return the exit status."""
    quiet_transformers()
    with nullcontext() if rank_number() == 0 else redirect_stdout(StringIO()):
        return _run(options)


def _run(options: LatencyOptions | ThroughputOptions) -> int:
    config = _config(options)
    device = _device(options)
    # Before the model takes the memory: reading takes a gigabyte of its own.
    ceilings = _ceilings(options, device, _dtype(options, config))
    model = _load(options, config, device)
    backends, report = _backends(options, model)
    vocabulary = config.get_text_config().vocab_size
    if isinstance(options, LatencyOptions):
        record = _latency(options, backends, model, vocabulary, ceilings)
    else:
        record = _throughput(options, backends, vocabulary)
    print(f"kernels: {', '.join(report.kernels) or 'none of ours'}")
    record |= _hot_experts(model) | _host_memory()
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


def _host_memory() -> dict[str, int | None]:
    """The most memory that this process has had."""
    from moetor.bench.hardware import process_memory

    peak = process_memory("VmHWM")
    if peak is not None:
        print(f"host memory: at most {peak / 2**30:.2f} GiB")
    return {"peak_host_bytes": peak}


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
        if options.layers is not None:
            config.num_hidden_layers = options.layers
    else:
        if options.layers is not None:
            raise UsageError(f"--layers is for a built-in configuration: {', '.join(CONFIGS)}")
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


def _device(options: TextBenchOptions) -> torch.device:
    """This rank's device."""
    from moetor.huggingface.devices import find_device
    from moetor.parallel.groups import join_ranks

    several = options.parallel() is not None
    return find_device(join_ranks(options.device) if several else options.device)


def _dtype(options: TextBenchOptions, config: Any) -> torch.dtype:
    """The model's dtype."""
    import torch

    from moetor.huggingface.devices import find_dtype

    dtype: torch.dtype | None = find_dtype(options.dtype) or getattr(config, "dtype", None)
    return dtype or torch.bfloat16


def _ceilings(
    options: TextBenchOptions, device: torch.device, dtype: torch.dtype
) -> dict[str, Ceilings]:
    """What the devices that take part can do, where a floor is told; by their kind."""
    from moetor.bench.ceilings import measure_ceilings

    if not isinstance(options, LatencyOptions):
        return {}
    kinds = [device.type] if options.offload() is None else [device.type, "cpu"]
    return {kind: measure_ceilings(kind, dtype) for kind in dict.fromkeys(kinds)}


def _load(options: TextBenchOptions, config: Any, device: torch.device) -> Any:
    from moetor.huggingface import loading
    from moetor.huggingface.dummy import dummy_model

    offload = _offload(options, config)
    if options.load_format == "dummy":
        dtype = _dtype(options, config)
        made = loading.model_class(config)
        model = dummy_model(
            config,
            made,
            dtype,
            device,
            options.seed,
            quantization=options.quantization,
            cpu_experts=offload,
            kernel=options.kernel,
        )
        note(f"drew {sum(one.numel() for one in model.parameters()) / 1e6:,.1f} million weights")
        return model
    with progress(f"loading {options.model}", "tensors") as loaded:
        return loading.load_model(
            options.model,
            dtype=options.dtype,
            device=str(device),
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            quantization=options.quantization,
            kernel=options.kernel,
            for_fusing=options.peer in ("none", "vllm"),
            sharded=options.parallel() is not None,
            cpu_experts=offload,
            progress=loaded,
        ).requires_grad_(False)


def _backends(options: TextBenchOptions, model: Any) -> tuple[list[TextBackend], FusionReport]:
    """Ours, on `model` fused in place, and the peer, on a copy that shares its weights."""
    import copy

    from moetor.bench.generation_peers import ContinuousBackend, GenerateBackend
    from moetor.config import RunnerConfig
    from moetor.huggingface import fuse
    from moetor.huggingface.dense_spread import check_taken_over

    settings: dict[str, Any] = {"cache": options.cache, "compiled": options.compile}
    peers: list[TextBackend] = []
    if options.peer in ("transformers", "continuous"):
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
            runner=RunnerConfig(batch_invariant=options.batch_invariant),
            dense=options.fuses_dense(model.device.type),
            parallel=options.parallel(),
            cpu_experts=_offload(options, model.config),
            progress=fused,
        )
    if options.fuse_dense == "on":
        check_taken_over(report.dense)
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
    if options.peer == "vllm":
        peers.append(_vllm_backend(options, model))
    return [ours, *peers], report


def _vllm_backend(options: TextBenchOptions, model: Any) -> TextBackend:
    """vLLM on the same checkpoint; with random weights, on the same configuration."""
    import copy

    from moetor.bench.generation_peers import VllmBackend, VllmSettings
    from moetor.huggingface.sources import resolve

    config = _engine_config(options)
    assert config.max_model_len is not None, "the texts' length where none was asked for"
    settings = VllmSettings(
        dtype=str(model.dtype).removeprefix("torch."),
        load_format=options.load_format,
        revision=options.revision if options.load_format == "auto" else None,
        trust_remote_code=options.trust_remote_code,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enable_prefix_caching=config.enable_prefix_caching,
        enforce_eager=config.enforce_eager,
        seed=options.seed,
    )
    if options.load_format == "dummy":
        told = copy.deepcopy(model.config)
        told.architectures = [type(model).__name__]  # by which vLLM finds its own class
        return VllmBackend("vllm", told, settings)
    return VllmBackend("vllm", resolve(options.model), settings)


def _offload(options: TextBenchOptions, config: Any) -> OffloadConfig | None:
    """Which experts stay in host memory, with room for what the engine needs."""
    from moetor.engine.reserve import settle_offload
    from moetor.huggingface.devices import find_device

    return settle_offload(
        options.offload(),
        _engine_config(options),
        config.get_text_config(decoder=True),
        _dtype(options, config),
        find_device(options.device),
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
    options: LatencyOptions,
    backends: list[TextBackend],
    model: Any,
    vocabulary: int,
    ceilings: dict[str, Ceilings],
) -> dict[str, Any]:
    from moetor.bench.generation import decode_bytes, host_decode_bytes, measure_latency
    from moetor.bench.generation_report import latency_dict, latency_table

    sizes = tuple(dict.fromkeys(options.batch_size))
    own = ceilings[model.device.type]
    floors = {size: decode_bytes(model, size) / own.read_bytes_per_s for size in sizes}
    for size in sizes if "cpu" in ceilings else ():
        # A layer's host part and the layers around it wait for each other.
        floors[size] += host_decode_bytes(model, size) / ceilings["cpu"].read_bytes_per_s
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
    print(f"ceilings: {own.describe()}")
    return latency_dict(rows, floors) | {"ceilings": asdict(own)}


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
