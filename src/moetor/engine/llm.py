"""`LLM`: an engine that is called with a list of prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import fields
from typing import Any, Literal

from moetor.engine.build import Engine, build_engine
from moetor.engine.chat_template import chat_tokens
from moetor.engine.config import EngineConfig
from moetor.engine.intake import Prompt
from moetor.engine.outputs import CompletionOutput, EngineStats, RequestMetrics, RequestOutput
from moetor.engine.params import SamplingParams
from moetor.engine.pictures import has_pictures, taken_out
from moetor.engine.progress import bar
from moetor.engine.source import ModelSource
from moetor.errors import ConfigError, InputError
from moetor.offload_config import CpuExperts, OffloadConfig
from moetor.parallel.config import ParallelConfig
from moetor.quant_config import QuantConfig

Message = Mapping[str, Any]


class LLM:
    """A model behind an engine with continuous batching.

    Args:
        model: a folder, a hub id, `demo`, or a live Transformers model in eval mode, which is fused
            in place unless it is fused already or `level` is `none`.
        tokenizer: of a live model, or instead of the checkpoint's own.
        processor: the same, for pictures.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quantization, kernel, level: as `moetor.fuse` takes them; level `none` does not fuse.
        revision, trust_remote_code: of a checkpoint on the hub.
        parallel: spreads the model over the ranks that a launcher has started, of which each makes
            the same `LLM` and the same calls, and gets all the results.
        cpu_experts: MoE layers, counted from the last one, whose experts stay in host memory, as
            `moetor.fuse` takes it; keys, values and activations have room beside them.
        settings: the fields of `EngineConfig`: `max_model_len`, `max_num_seqs`,
            `max_num_batched_tokens`, `block_size`, `kv_cache_blocks`, `gpu_memory_utilization`,
            `enable_prefix_caching`, `enable_return_routed_experts`, `enforce_eager`, `fuse_dense`,
            `batch_invariant`, `seed`, `load_format`.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: a setting is unknown, or does not fit the model or the memory.
        UnsupportedError: the model does not generate text token by token.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | QuantConfig | None = None,
        kernel: str = "auto",
        level: Literal["auto", "block", "experts", "none"] = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        parallel: ParallelConfig | None = None,
        cpu_experts: CpuExperts | OffloadConfig | None = None,
        **settings: Any,
    ) -> None:
        source = ModelSource(
            model=model,
            tokenizer=tokenizer,
            processor=processor,
            dtype=dtype,
            device=device,
            quantization=quantization,
            kernel=kernel,
            level=level,
            revision=revision,
            trust_remote_code=trust_remote_code,
            parallel=parallel,
            cpu_experts=cpu_experts,
        )
        self.engine: Engine = build_engine(source, engine_config(settings))
        self._numbers = itertools.count()

    @property
    def tokenizer(self) -> Any:
        """The model's, or None."""
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its continuation together, at most."""
        return self.engine.max_model_len

    def stats(self) -> EngineStats:
        """Counters since the start."""
        return self.engine.core.stats()

    def generate(
        self,
        prompts: str | Prompt | Items[Prompt],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continues prompts, all of them together.

        Args:
            prompts: text, token ids, a mapping (see `Prompt`), or a list of these.
            sampling_params: for all, or one for each.
            progress: draw a bar on standard error, where that is a terminal.

        Returns:
            One output for each prompt, in order. A prompt that is refused, or that fails, has its
            reason in `error`, and the others go on.

        Raises:
            InputError: there are not as many parameters as prompts, or they are something else.
            ConfigError: `structured_outputs` need what is not here.
        """
        listed = _listed(prompts)
        each = _params_of_each(sampling_params, len(listed))
        core = self.engine.core
        order: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, params in zip(listed, each, strict=True):
                name = f"generate-{next(self._numbers)}"
                order.append(name)
                try:
                    core.add(self.engine.intake.request(prompt, params, name))
                except InputError as refusal:
                    done[name] = refused(name, prompt, str(refusal))
            with bar("generating", wanted=progress and len(listed) > 1) as advance:
                while not core.idle:
                    for request in core.step():
                        if request.finished:
                            done[request.request_id] = core.output(request)
                            advance(len(done), len(listed))
        except BaseException:
            for name in order:
                core.abort(name)
            raise
        return [done[name] for name in order]

    def chat(
        self,
        messages: Items[Message] | Items[Items[Message]],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        progress: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers conversations.

        Args:
            messages: one conversation, or a list of them; a message is a mapping with `role` and
                `content`, which is text or a list of parts: `{"type": "text", "text": ...}`, or
                `{"type": "image", "image": ...}` with an image of Pillow.
            sampling_params, progress: as for `generate`.
            template: further arguments of the tokenizer's `apply_chat_template`.

        Raises:
            ConfigError: the tokenizer has no chat template.
            InputError: a conversation is no list of messages, or the template refuses it.
        """
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self._conversation(one, template) for one in many]
        return self.generate(prompts, sampling_params, progress)

    def _conversation(self, messages: Any, template: Mapping[str, Any]) -> Prompt:
        listed = isinstance(messages, Items) and not isinstance(messages, str)
        if not listed or not all(isinstance(message, Mapping) for message in messages):
            raise InputError(
                "a conversation is a list of messages, each a mapping with 'role' and 'content', "
                f"and not {messages!r:.80}"
            )
        if not has_pictures(messages):
            return chat_tokens(self.tokenizer, messages, **template)
        bare, images = taken_out(messages)
        return self.engine.intake.pictures.prompt(bare, images, **template)


def engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    """The settings as `EngineConfig`.

    Raises:
        ConfigError: one is unknown, or out of its range.
    """
    known = [field.name for field in fields(EngineConfig)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is no setting of the engine; there are {', '.join(known)}"
        )
    return EngineConfig(**settings)


def refused(request_id: str, prompt: Any, reason: str) -> RequestOutput:
    """The output of a request that never ran."""
    ids = list(prompt) if isinstance(prompt, list | tuple) else []
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=ids,
        outputs=[CompletionOutput(index=0, finish_reason="error")],
        finished=True,
        metrics=RequestMetrics(arrival_time=0.0),
        error=reason,
    )


def _params_of_each(given: Any, count: int) -> list[SamplingParams]:
    """One for each of `count` prompts."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    each = list(given) if isinstance(given, Items) else [given]
    wrong = [one for one in each if not isinstance(one, SamplingParams)]
    if wrong:
        raise InputError(
            "sampling_params are SamplingParams, one for all or a list with one for each prompt, "
            f"and not {wrong[0]!r:.80}"
        )
    if len(each) != count:
        raise InputError(
            f"{count} prompts were given with {len(each)} sampling_params; give one for all or one "
            "for each"
        )
    return each


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and all(isinstance(item, int) for item in listed) else listed
