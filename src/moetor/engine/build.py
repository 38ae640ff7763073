"""From a model and settings to an engine that is ready."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moetor.engine import invariance
from moetor.engine.blocks import BlockManager
from moetor.engine.config import EngineConfig
from moetor.engine.core import EngineCore
from moetor.engine.intake import Intake
from moetor.engine.load import ExpertLoad
from moetor.engine.memory import free_memory, memory_errors, plan_cache
from moetor.engine.model import ServedModel
from moetor.engine.pictures import PictureReader
from moetor.engine.progress import bar
from moetor.engine.ranks import RankedCore
from moetor.engine.reserve import settle_offload
from moetor.engine.runner import Runner
from moetor.engine.scheduler import Scheduler
from moetor.engine.source import Fused, ModelSource
from moetor.engine.strategy import Strategy
from moetor.engine.trial import choose_strategy
from moetor.engine.vocabulary import split_vocabulary
from moetor.errors import CheckpointError, ConfigError, FusionMismatchError
from moetor.huggingface import FusionReport, fuse, loading
from moetor.huggingface.dense_fusing import fuse_dense, is_dense_fused
from moetor.huggingface.devices import find_device, find_dtype
from moetor.huggingface.dummy import CONFIGS, dummy_model
from moetor.huggingface.modules import fused_modules
from moetor.huggingface.offloading import offload_of
from moetor.huggingface.parallelism import take_balancer
from moetor.huggingface.report import DenseReport
from moetor.huggingface.tensor_parallel import spread_over
from moetor.parallel.collectives import host_agree
from moetor.parallel.groups import ParallelGroups, join_ranks

_UNCOUNTED = 2**62


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The parts of an engine.

    Attributes:
        fusion_report: None where the model was fused before, or is not to be.
        tokenizer: None where none was given with a live model.
        without_graphs: why decoding is not replayed from CUDA graphs; empty where it is.
    """

    core: EngineCore
    intake: Intake
    served: ServedModel
    strategy: Strategy
    config: EngineConfig
    tokenizer: Any
    fusion_report: FusionReport | None
    max_model_len: int
    without_graphs: str


def build_engine(source: ModelSource, config: EngineConfig) -> Engine:
    """Loads, fuses, tries the strategies, plans the memory.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: a setting does not fit the model or the memory.
        UnsupportedError: the model cannot be served.
    """
    invariance.check_request(source, config)
    on = find_device(source.device if isinstance(source.model, str) else "cpu")
    with memory_errors(
        on,
        f"the model {source.model if isinstance(source.model, str) else type(source.model)!r}",
        "take a smaller dtype or a quantization, or several devices",
    ):
        model, tokenizer, report = _load(source, config)
    served = ServedModel(model)
    strategy = choose_strategy(served)
    if config.batch_invariant:
        invariance.prove(served, strategy)
    groups = spread_over(model)
    if groups is not None and groups.config.joint and not strategy.paged:
        raise ConfigError(
            f"data-parallel ranks that share experts step together, and this model cannot: its "
            f"caching strategy is {strategy}; possible: tensor_parallel_size alone, with or "
            "without enable_expert_parallel"
        )
    if strategy.paged:
        with torch.inference_mode():
            served.vocabulary = split_vocabulary(served.model, groups)
    context = loading.context_length(model.config)
    if strategy.paged or config.kv_cache_blocks is not None:
        free = _agreed(free_memory(served, strategy, config, context), groups, served.device)
    else:
        free = _UNCOUNTED  # the model's own caches take what they take
    plan = plan_cache(config, strategy, free, context)
    with memory_errors(
        served.device,
        f"a cache of {plan.num_blocks} blocks and {config.max_num_seqs} slots for states",
        "lower kv_cache_blocks, gpu_memory_utilization, max_model_len or max_num_seqs",
    ):
        runner = Runner(
            served,
            strategy,
            num_blocks=plan.num_blocks,
            block_size=config.block_size,
            rows=config.max_num_seqs,
            max_model_len=plan.max_model_len,
            load=ExpertLoad(model, served.device) if config.record_expert_load else None,
            groups=groups,
            balancer=take_balancer(model),
            offload=offload_of(model),
            batch_invariant=config.batch_invariant,
        )
    if config.enable_return_routed_experts:
        runner.keep_routes(plan.num_blocks, config.block_size)
    without_graphs = _capture(runner, config, groups)
    if runner.balancer is not None:
        runner.balancer.forget()
    blocks = BlockManager(
        plan.num_blocks,
        config.block_size,
        prefix_caching=config.enable_prefix_caching and strategy.prefix_caching,
    )
    scheduler = Scheduler(
        blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        chunked_prefill=strategy.chunked_prefill,
    )
    intake = Intake(
        tokenizer,
        vocab_size=served.vocab_size,
        ends=end_tokens(model, tokenizer),
        max_model_len=plan.max_model_len,
        seed=config.seed,
        text_only=served.is_encoder_decoder
        or runner.lockstep is not None
        or runner.routes is not None
        or config.batch_invariant,
        separate_prompt=served.is_encoder_decoder,
        pictures=_pictures(source, served, runner),
    )
    parts = (runner, scheduler, tokenizer, intake.grammars)
    overlap = served.device.type == "cuda"
    core = (
        EngineCore(*parts, overlap=overlap)
        if groups is None
        else RankedCore(*parts, overlap=overlap, groups=groups)
    )
    return Engine(
        core=core,
        intake=intake,
        served=served,
        strategy=strategy,
        config=config,
        tokenizer=tokenizer,
        fusion_report=report,
        max_model_len=plan.max_model_len,
        without_graphs=without_graphs,
    )


def _pictures(source: ModelSource, served: ServedModel, runner: Runner) -> PictureReader | str:
    """What makes prompts of conversations with pictures, or why nothing does."""
    if served.is_encoder_decoder or getattr(served.composite.config, "vision_config", None) is None:
        return "the model takes text alone"
    if runner.lockstep is not None:
        return "data-parallel ranks that share experts take text alone"
    if runner.routes is not None:
        return "routed experts are given back for prompts of text alone"
    if runner.batch_invariant:
        return "batch_invariant is for text alone"
    if source.processor is not None:
        return PictureReader(source.processor)
    if not isinstance(source.model, str):
        return "a live model came without its processor"
    try:
        found = loading.load_processor(
            source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except CheckpointError as error:
        return f"the model's processor cannot be loaded ({error})"
    if getattr(found, "image_processor", None) is None:
        return "the model comes without an image processor"
    return PictureReader(found)


def described(engine: Engine) -> Fused:
    """What the fusion report says, as plain data."""
    report = engine.fusion_report
    if report is None:
        return Fused(None, [])
    kernels = ", ".join(report.kernels) or "none"
    lines = [f"{len(report.blocks)} MoE blocks, experts by {kernels}"]
    lines += [] if report.offload is None else report.offload.lines()
    return Fused([asdict(block) for block in report.blocks], lines)


def _agreed(free: int, groups: ParallelGroups | None, device: torch.device) -> int:
    """The least of the ranks' memory: they must plan, and so schedule, alike."""
    if groups is None:
        return free
    return host_agree(free, torch.distributed.ReduceOp.MIN, groups.world, device)


def _capture(runner: Runner, config: EngineConfig, groups: ParallelGroups | None) -> str:
    """Captures the decoding step; why it is not replayed, or nothing."""
    if runner.device.type != "cuda":
        return "there are none on a CPU"
    if config.enforce_eager:
        return "enforce_eager was asked for"
    if not runner.strategy.paged:
        return "each sequence has a cache of its own"
    if not runner.graphs.sizes:
        return f"steps of {runner.graphs.stream_min_tokens} tokens copy experts to the GPU"
    reason = ""
    try:
        with bar("capturing CUDA graphs") as progress:
            runner.graphs.capture(progress)
        with bar("capturing CUDA graphs of prompts") as progress:
            runner.graphs.capture_prompts(config.max_num_batched_tokens, progress)
    except Exception as error:  # whatever code of the family's is not for graphs
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"the model cannot be captured: {lines[0]}"
    if not _agreed(int(not reason), groups, runner.device):
        runner.graphs.drop()
        reason = reason or "another rank's model cannot be captured"
    if reason:
        warnings.warn(
            f"decoding runs without CUDA graphs, which is much slower: {reason}", stacklevel=2
        )
    return reason


def _settings(source: ModelSource) -> Any:
    """The configuration of a model that is named or lies in a folder."""
    if source.model in CONFIGS:
        return CONFIGS[source.model]()
    return loading.load_config(
        source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
    )


def _settled(source: ModelSource, config: EngineConfig) -> ModelSource:
    if source.cpu_experts is None:
        return source
    if isinstance(source.model, str):
        settings = _settings(source)
        device = find_device(source.device)
        dtype = find_dtype(source.dtype) or getattr(settings, "dtype", None)
    else:
        settings, device, dtype = source.model.config, source.model.device, source.model.dtype
    offload = settle_offload(
        source.cpu_experts,
        config,
        settings.get_text_config(decoder=True),
        dtype or torch.bfloat16,
        device,
    )
    return replace(source, cpu_experts=offload)


def _load(source: ModelSource, config: EngineConfig) -> tuple[Any, Any, FusionReport | None]:
    """The model, its tokenizer and what was fused."""
    source = _settled(source, config)
    if source.parallel is not None and (
        not isinstance(source.model, str) or source.level == "none"
    ):
        raise ConfigError(
            "parallel is for a path whose model is fused; spread a live model yourself: "
            "moetor.fuse(model, parallel=...)"
        )
    if not isinstance(source.model, str):
        asked = [n for n in ("dtype", "device") if getattr(source, n) != "auto"]
        if config.load_format != "auto":
            asked.append("load_format")
        if asked:
            raise ConfigError(
                f"{' and '.join(asked)} cannot be chosen for a model that is loaded already; move "
                "or cast the model first, or give its path"
            )
        return source.model.eval(), source.tokenizer, _fused(source.model, source, config)
    options: dict[str, Any] = {
        "revision": source.revision,
        "trust_remote_code": source.trust_remote_code,
    }
    if config.load_format == "dummy":
        model = _dummy(source, config)
    else:
        model = loading.load_model(
            source.model,
            dtype=source.dtype,
            device=_device(source),
            quantization=source.quantization,
            kernel=source.kernel,
            for_fusing=source.level != "none",
            sharded=source.parallel is not None,
            cpu_experts=source.cpu_experts,
            **options,
        )
    tokenizer = source.tokenizer
    if tokenizer is None:
        try:
            tokenizer = loading.load_tokenizer(source.model, **options)
        except CheckpointError:
            if config.load_format != "dummy":
                raise
    return model, tokenizer, _fused(model, source, config)


def _device(source: ModelSource) -> str:
    return source.device if source.parallel is None else join_ranks(source.device)


def _dummy(source: ModelSource, config: EngineConfig) -> Any:
    settings = _settings(source)
    dtype = find_dtype(source.dtype)
    if dtype is None:
        dtype = getattr(settings, "dtype", None) or torch.bfloat16
    device = find_device(_device(source))
    made = loading.model_class(settings)
    quantization = None if source.level == "none" else source.quantization
    offload = source.cpu_experts if source.level != "none" else None
    kernel = source.kernel if source.level != "none" else None
    return dummy_model(settings, made, dtype, device, config.seed, quantization, offload, kernel)


def _fused(model: Any, source: ModelSource, config: EngineConfig) -> FusionReport | None:
    if source.level != "none" and not fused_modules(model):
        report = fuse(
            model,
            level=source.level,
            kernel=source.kernel,
            quantization=source.quantization,
            runner=invariance.runner_config(config),
            parallel=source.parallel,
            cpu_experts=source.cpu_experts,
        )
        dense = _dense_asked(model, source, config)
        return replace(report, dense=_fuse_dense(model, config)) if dense else report
    asked = (source.quantization, source.cpu_experts)
    if any(one is not None for one in asked) or source.kernel != "auto":
        raise ConfigError(
            "quantization, cpu_experts and kernel are those of fusing, and this model is "
            + ("not fused with level 'none'" if source.level == "none" else "fused already")
            + "; leave them out"
        )
    if _dense_asked(model, source, config):
        return FusionReport([], dense=_fuse_dense(model, config))
    return None


def _dense_asked(model: Any, source: ModelSource, config: EngineConfig) -> bool:
    """Whether dense parts are to be fused now."""
    if is_dense_fused(model):
        return False
    by_itself = config.fuse_dense == "auto"
    return config.fuses_dense(model.device.type) and not (by_itself and source.level == "none")


def _fuse_dense(model: Any, config: EngineConfig) -> list[DenseReport]:
    """Fuses them. What nobody asked for may fail: the model is then as it was.

    Raises:
        FusionError: with fuse_dense='on'.
    """
    try:
        return fuse_dense(model, whole_plan=config.fuse_dense == "on")
    except FusionMismatchError as error:
        if config.fuse_dense == "on":
            raise
        warnings.warn(f"dense parts are not fused: {error}", stacklevel=2)
        return [DenseReport(name="", kind="model", done=False, reason=str(error))]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: those of the model's generation settings, else the tokenizer's."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])
