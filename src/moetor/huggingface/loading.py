"""From a path, a hub id or `demo` to a configuration, a tokenizer and a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from moetor.errors import CheckpointError, ConfigError, UnsupportedError
from moetor.huggingface.checkpoint import Checkpoint, CheckpointReader
from moetor.huggingface.devices import find_device, find_dtype
from moetor.huggingface.expert_mapping import ExpertNames
from moetor.huggingface.kernel_check import check_kernels
from moetor.huggingface.load_plan import make_plan
from moetor.huggingface.load_steps import LoadPlan
from moetor.huggingface.offloading import HostExperts, leave_host_experts, plan_offload
from moetor.huggingface.quantized_checkpoint import QuantizedCheckpoint
from moetor.huggingface.quantized_loading import (
    QuantizingSink,
    hold_experts,
    quantizable_experts,
)
from moetor.huggingface.quantized_reading import PackedSink, QuantizedReader, packed_experts
from moetor.huggingface.sharded_loading import WithholdingSink, leave_withheld, withhold
from moetor.huggingface.skeleton import (
    concrete_class,
    empty_model,
    finish_model,
    settle_dtype,
)
from moetor.huggingface.sources import local_folder, one_sentence, resolve
from moetor.huggingface.stored_quantization import (
    check_quantization_field,
    described,
    open_checkpoint,
    stored_settings,
)
from moetor.huggingface.streaming import LoadFigures, LoadProgress, PlainSink, stream_weights
from moetor.offload_config import CpuExperts, OffloadConfig, offload_config
from moetor.quant_config import QuantConfig
from moetor.quantization.method import QuantMethod, make_method, quant_config

_CONTEXT_ATTRIBUTES = (
    "max_position_embeddings",
    "max_sequence_length",
    "n_positions",
    "seq_length",
)
_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "tekken.json")


def load_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        CheckpointError: it cannot be found or read, its `quantization_config` is no object, or it
            asks for more experts per token than it has.
    """
    with one_sentence(model):
        stated, _ = PretrainedConfig.get_config_dict(resolve(model), revision=revision)
        check_quantization_field(stated, model)
        config = AutoConfig.from_pretrained(
            resolve(model), revision=revision, trust_remote_code=trust_remote_code
        )
        sizes = config.get_text_config().to_dict()
    experts, top_k = (_stated(sizes, names) for names in (_EXPERTS_NAMES, _TOP_K_NAMES))
    # One expert or none is how some families say that they are dense.
    if 1 < experts < top_k:
        raise CheckpointError(
            f"the config of {model!r} asks for {top_k} experts per token and has {experts}"
        )
    return config


def _stated(sizes: dict[str, Any], names: tuple[str, ...]) -> int:
    found = (sizes.get(name) for name in names)
    return next((value for value in found if isinstance(value, int)), 0)


def load_tokenizer(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The model's tokenizer.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    source = resolve(model)
    absent = CheckpointError(f"{model!r} holds no tokenizer, such as a tokenizer.json")
    folder = Path(source)
    if folder.is_dir() and not any(next(folder.glob(one), None) for one in _TOKENIZER_FILES):
        raise absent
    with one_sentence(model):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    # Without its vocabulary, some classes make a tokenizer that turns every text into nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise absent
    return tokenizer


def load_processor(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """What makes a model's inputs of text and pictures.

    Raises:
        CheckpointError: it cannot be found or read, or needs a package that is not here.
    """
    source = resolve(model)
    with one_sentence(model):
        return AutoProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | QuantConfig | None = None,
    kernel: str = "auto",
    for_fusing: bool = False,
    sharded: bool = False,
    cpu_experts: CpuExperts | OffloadConfig | None = None,
    progress: LoadProgress | None = None,
) -> PreTrainedModel:
    """The model in eval mode, not fused, with every weight streamed from safetensors files.

    Args:
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for that of the checkpoint.
        device: a torch device, or `auto`: CUDA where there is one, else the CPU.
        quantization: of the routed experts, each quantised as it is read; the model is then for
            `fuse` alone.
        kernel: that is to compute with them, refused before a weight is read.
        for_fusing: whether `fuse` is called next, which alone makes the experts of a quantised
            checkpoint usable.
        sharded: whether `fuse(parallel=...)` is called next, which then reads this rank's share of
            the experts, and quantises it; until then stand-ins are in their places. Of a quantised
            checkpoint they are read whole.
        cpu_experts: which experts are read into host memory, for `fuse` with the same argument.
        progress: called as weights are read.

    Raises:
        CheckpointError: files are missing, truncated, corrupt or pickled; tensors are missing,
            doubled or of another shape.
        ConfigError: unknown dtype or device; or the experts do not fit where `cpu_experts` says.
        KernelRefusedError: the kernel, named or for a model to be fused, does not run its experts.
        UnsupportedError: the checkpoint is quantised, and `for_fusing` is not said; or quantised
            in a way that is not read.
    """
    return stream_model(
        model,
        LoadOptions(
            dtype=find_dtype(dtype),
            device=find_device(device),
            revision=revision,
            trust_remote_code=trust_remote_code,
            quantization=quant_config(quantization),
            kernel=kernel,
            fused=for_fusing or quantization is not None,
            sharded=sharded,
            offload=offload_config(cpu_experts),
        ),
        progress=progress,
    )[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        dtype: None for that of the checkpoint.
        key_mapping: regular expressions and replacements for the checkpoint's names.
        expert_names: of a checkpoint whose experts have names that no table knows.
        quantization: of the experts' weights, as they are read.
        quantized_later: the quantisation that `fuse` is to give them, read as they are.
        kernel: that is to compute with the experts, refused before a weight is read.
        fused: whether the model will be fused, which alone makes quantised experts usable.
        sharded: leave the experts' matrices out, for `fuse` to read and quantise this rank's share
            once the model has been spread; unless they are quantised in the checkpoint.
        offload: which experts are read into host memory.
    """

    dtype: torch.dtype | None = None
    device: torch.device
    revision: str | None = None
    trust_remote_code: bool = False
    key_mapping: Mapping[str, str] | None = None
    expert_names: ExpertNames | None = None
    quantization: QuantConfig | None = None
    quantized_later: QuantConfig | None = None
    kernel: str = "auto"
    fused: bool = False
    sharded: bool = False
    offload: OffloadConfig | None = None


def stream_model(
    model: str,
    options: LoadOptions,
    *,
    maker: Callable[[Any], Any] | None = None,
    progress: LoadProgress | None = None,
) -> tuple[PreTrainedModel, LoadFigures]:
    """As `load_model`, with what the load took.

    Args:
        maker: gives the model's class for a configuration; that of the checkpoint by default.
    """
    source = resolve(model)
    config = load_config(
        model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    settings = stored_settings(Path(source), config)
    if settings is not None:
        _check_stored(model, settings, options)
    made = (maker or model_class)(config)
    with one_sentence(model):
        checkpoint = open_checkpoint(local_folder(source, options.revision), config)
        empty, plan, dtype = _planned(made, config, source, checkpoint, options)
        if options.fused or options.kernel != "auto":
            check_kernels(empty, _method(checkpoint, options), options.device, dtype)
        reader = CheckpointReader(checkpoint)
        if isinstance(checkpoint, QuantizedCheckpoint):
            reader = QuantizedReader(checkpoint)
        withheld, away = None, None
        if options.offload is not None:
            away = _plan_offload(empty, plan, checkpoint, options, dtype)
        # Stored codes are read whole by every rank, which then keeps its share of them.
        if options.sharded and settings is None:
            plan, withheld = withhold(empty, plan, reader, progress)
            sink: PlainSink = WithholdingSink(dict(empty.state_dict()), options.device, withheld)
        else:
            host = () if away is None else away.modules
            sink = _sink(empty, plan, checkpoint, options, host)
        figures = stream_weights(
            empty,
            plan,
            reader,
            sink,
            device=options.device,
            progress=progress,
        )
        finished = finish_model(
            empty,
            plan,
            source=source,
            device=options.device,
            dtype=dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    if isinstance(sink, QuantizingSink | PackedSink):
        hold_experts(finished, sink.quantized())
    if withheld is not None:
        leave_withheld(finished, withheld)
    if away is not None:
        leave_host_experts(finished, replace(away, tensors=sink.host_tensors()))
    return finished, figures


def _check_stored(model: str, settings: Mapping[str, Any], options: LoadOptions) -> None:
    """Refuses what cannot be done with a quantised checkpoint."""
    if not options.fused:
        raise UnsupportedError(
            f"{model!r} is quantised ({settings.get('quant_method')}) and only runs fused; load it "
            "with moetor.MoEForCausalLM.from_pretrained, or take a checkpoint in bfloat16, float16 "
            "or float32"
        )
    if options.quantization is not None:
        raise ConfigError(
            f"quantization={options.quantization.name!r} was asked for, and {model!r} is quantised "
            f"already ({settings.get('quant_method')}); leave it out to load it as it is"
        )


def _planned(
    made: Any, config: Any, source: str, checkpoint: Checkpoint, options: LoadOptions
) -> tuple[PreTrainedModel, LoadPlan, torch.dtype]:
    """The model without its weights, where each of them comes from, and their dtype.

    Args:
        made: the model's class, or an auto class that finds it.
    """
    concrete = concrete_class(made, config, source, revision=options.revision)
    dtype = settle_dtype(config, options.dtype, checkpoint.float_dtype())
    config.name_or_path = source
    empty = empty_model(concrete, config, dtype)
    plan = make_plan(
        empty,
        checkpoint,
        dtype,
        key_mapping=options.key_mapping,
        expert_names=options.expert_names,
    )
    return empty, plan, dtype


def _sink(
    empty: PreTrainedModel,
    plan: LoadPlan,
    checkpoint: Checkpoint,
    options: LoadOptions,
    host: Collection[str],
) -> PlainSink:
    """Where the weights go: as they are, quantised on the way, or as the checkpoint's codes."""
    shapes, device = dict(empty.state_dict()), options.device
    if isinstance(checkpoint, QuantizedCheckpoint):
        packed = packed_experts(empty, plan, checkpoint)
        return PackedSink(shapes, device, packed, checkpoint.activations, host)
    if options.quantization is None:
        return PlainSink(shapes, device, host)
    forms = quantizable_experts(empty, plan)
    return QuantizingSink(shapes, device, forms, options.quantization, host)


def _method(checkpoint: Checkpoint, options: LoadOptions) -> QuantMethod:
    """That computes with the experts once they are fused."""
    if isinstance(checkpoint, QuantizedCheckpoint):
        return described(checkpoint).method(options.kernel)
    quantization = options.quantization or options.quantized_later
    return make_method(quantization, options.kernel, batch_invariant=False)


def _plan_offload(
    empty: PreTrainedModel,
    plan: LoadPlan,
    checkpoint: Checkpoint,
    options: LoadOptions,
    dtype: torch.dtype,
) -> HostExperts:
    """Which experts are read into host memory, refused before any is read."""
    assert options.offload is not None, "asked by the caller"
    if options.sharded:
        raise ConfigError("cpu_experts and parallel cannot be had together; leave one out")
    method = _method(checkpoint, options)
    found, modules = plan_offload(empty, options.offload, options.device, method, dtype)
    computed = [module for module in modules if module not in quantizable_experts(empty, plan)]
    if computed:
        raise UnsupportedError(
            f"the experts {computed[0]!r} are computed from the checkpoint's tensors as a whole, "
            "and cannot be read into host memory one by one"
        )
    return HostExperts(found, modules, {})


def model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from, or the causal language model of its family; for
    a configuration from outside of Transformers the auto class, which knows its model.
    """
    if not type(config).__module__.startswith("transformers."):
        return transformers.AutoModelForCausalLM
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def context_length(config: Any) -> int | None:
    """Largest number of tokens that the model attends to, or None where its configuration does
    not say.
    """
    text = config.get_text_config()
    for name in _CONTEXT_ATTRIBUTES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
