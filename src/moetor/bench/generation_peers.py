"""What else turns prompts into tokens: Transformers' `generate` and continuous batching, and vLLM.

Shape letters: B prompts of a batch, N prompts in all, S tokens of a prompt.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetor.bench.generation import StepTimes, TextBackend
from moetor.errors import InputError, MoetorError


class GenerateBackend(TextBackend):
    """Transformers' own `generate`.

    Args:
        model: a `PreTrainedModel`, fused or not.
        cache: of keys and values, `static` or `dynamic`. With a static one on a GPU, `generate`
            compiles the decoding step and captures it in CUDA graphs.
        compiled: False keeps it from doing so.
    """

    def __init__(self, name: str, model: Any, *, cache: str = "static", compiled: bool = True):
        self.name = name
        self._model = model
        self._settings: dict[str, Any] = {
            "do_sample": False,
            "disable_compile": not compiled,
            "cache_implementation": None if cache == "dynamic" else cache,
        }

    def generate(self, prompts_BS: Tensor, new_tokens: int) -> StepTimes:
        """See `TextBackend.generate`.

        Raises:
            MoetorError: `generate` ended early.
        """
        from transformers import GenerationConfig

        # Nothing ends a text, and no default of the checkpoint's takes part.
        self._model.generation_config = GenerationConfig(pad_token_id=0)
        ids = prompts_BS.to(self._model.device)
        clock = _Clock()
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            streamer=clock,
            **self._settings,
        )
        times = clock.times()
        if len(times.later) != new_tokens - 1:
            raise MoetorError(
                f"generate was asked for {new_tokens} tokens and made {len(times.later) + 1}"
            )
        return times


class ContinuousBackend(TextBackend):
    """Transformers' own continuous batching.

    Args:
        model: a `PreTrainedModel` that is not fused.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self._model = model
        # The manager that it keeps between calls has the size of its first one.
        self._size: tuple[int, int] | None = None
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)

    def generate(self, prompts_BS: Tensor, new_tokens: int) -> StepTimes:
        """See `TextBackend.generate`: a token counts when every prompt has as many.

        Raises:
            MoetorError: a request failed, as it does for families that it does not serve.
        """
        return self._run(prompts_BS, new_tokens, prompts_BS.shape[0])

    def generate_all(self, prompts_NS: Tensor, new_tokens: int, batch_size: int) -> float:
        """Seconds for all prompts, of which it takes at most `batch_size` at once."""
        return self._run(prompts_NS, new_tokens, batch_size).total

    def _run(self, prompts_NS: Tensor, new_tokens: int, most: int) -> StepTimes:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        page = 256
        length = prompts_NS.shape[1] + new_tokens
        settings = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=most * -(-length // page) + 1,
            max_batch_tokens=max(2048, most),
            max_requests_per_batch=most,
            allow_block_sharing=False,
        )
        if self._size not in (None, (most, length)):
            self._model.destroy_cached_continuous_batching_manager()
        self._size = (most, length)
        greedy = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        start = time.perf_counter()
        answers = self._model.generate_batch(
            prompts_NS.tolist(),
            generation_config=greedy,
            continuous_batching_config=settings,
            record_timestamps=True,
            persistent_manager=True,
        )
        marks = [answer.timestamps or [] for answer in answers.values()]
        if len(marks) != len(prompts_NS) or any(len(own) != new_tokens for own in marks):
            reasons = {str(answer.error) for answer in answers.values() if answer.error}
            raise MoetorError(
                "Transformers' continuous batching did not make the tokens that it was asked for"
                + "".join(f"; {reason}" for reason in sorted(reasons))
            )
        last = [max(times) for times in zip(*marks, strict=True)]
        later = tuple(after - before for before, after in itertools.pairwise(last))
        return StepTimes(first=last[0] - start, later=later)


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSettings:
    """What vLLM is started with, beside the model: fields of its `EngineArgs`, of their names."""

    dtype: str
    load_format: str
    revision: str | None
    trust_remote_code: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    enforce_eager: bool
    seed: int


class VllmBackend(TextBackend):
    """vLLM, with a model of its own: it shares no weights with other backends.

    Its engine answers when a text is complete. The time to the first token is therefore that of a
    call for one token, and each later token is told as an equal share of the whole call's rest.

    Args:
        source: a folder or a hub id; or a configuration of Transformers, for `load_format` dummy.

    Raises:
        InputError: it is not installed.
    """

    def __init__(self, name: str, source: str | Any, settings: VllmSettings) -> None:
        refused = vllm_refusal()
        if refused is not None:
            raise InputError(refused)
        from vllm import LLM, SamplingParams

        self.name = name
        self._params = SamplingParams
        named = {field: getattr(settings, field) for field in settings.__slots__}
        with tempfile.TemporaryDirectory(prefix="moetor-vllm-") as folder:
            if not isinstance(source, str):
                source.save_pretrained(folder)
                source = folder
            # Token ids in, token ids out: a configuration alone has no tokenizer.
            self._llm = LLM(model=source, skip_tokenizer_init=True, **named)

    def generate(self, prompts_BS: Tensor, new_tokens: int) -> StepTimes:
        """See `TextBackend.generate`.

        Raises:
            MoetorError: it ended a text early, or one token took longer than all of them.
        """
        first = self._timed(prompts_BS, 1)
        if new_tokens == 1:
            return StepTimes(first=first, later=())
        rest = self._timed(prompts_BS, new_tokens) - first
        if rest <= 0:
            raise MoetorError(
                f"vLLM took {first:.3g} s for one token and {first + rest:.3g} s for {new_tokens}: "
                "the machine is too busy to measure; give more --output-len"
            )
        steps = new_tokens - 1
        return StepTimes(first=first, later=(rest / steps,) * steps)

    def generate_all(self, prompts_NS: Tensor, new_tokens: int, batch_size: int) -> float:
        """Seconds for all prompts, which its scheduler takes as it has room."""
        return self._timed(prompts_NS, new_tokens)

    def _timed(self, prompts_NS: Tensor, new_tokens: int) -> float:
        greedy = self._params(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in prompts_NS.tolist()]
        start = time.perf_counter()
        answers = self._llm.generate(prompts, sampling_params=greedy, use_tqdm=False)
        seconds = time.perf_counter() - start
        made = {len(answer.outputs[0].token_ids) for answer in answers}
        if made != {new_tokens}:
            raise MoetorError(f"vLLM was asked for {new_tokens} tokens and made {sorted(made)}")
        return seconds


def vllm_refusal() -> str | None:
    """Why vLLM cannot be measured here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "--peer vllm needs vLLM, which is not installed here: pip install vllm"
    return None


class _Clock:
    """A streamer of `generate` that notes when tokens arrive on the host."""

    def __init__(self) -> None:
        self._marks = [time.perf_counter()]

    def put(self, tokens: Tensor) -> None:
        """Called with the prompt first, then once a step."""
        self._marks.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last step."""

    def times(self) -> StepTimes:
        start, _, *steps = self._marks
        later = tuple(after - before for before, after in itertools.pairwise(steps))
        return StepTimes(first=steps[0] - start, later=later)
