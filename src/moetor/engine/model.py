"""A Transformers model as the engine calls it, whatever its family calls its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moetor.engine.attention import NAME
from moetor.engine.vocabulary import SplitVocabulary
from moetor.errors import UnsupportedError

_CACHE_NAMES = ("cache", "past_key_values")
_PLACEHOLDERS = ("_token_id", "_token_index")


class ServedModel:
    """Calls a model with packed tokens and the cache of the engine, or with its own.

    Attributes:
        model: what generates text: the language model, or the composite that holds it.
        composite: what takes pictures and the like; often the same.
        config: of the language model.
        vocab_size: of its logits.
        cache_name: what its forward calls the cache.
        decoder_start: token with which an encoder-decoder's decoder begins.
        vocabulary: where each rank makes a part of the logits, from then on.

    Raises:
        UnsupportedError: the model does not generate text token by token.
    """

    def __init__(self, model: Any) -> None:
        self.composite = getattr(model, "thinker", model)
        inner = getattr(self.composite, "language_model", None)
        self.model: Any = self.composite
        if isinstance(inner, PreTrainedModel) and inner.can_generate():
            self.model = inner
        self.config = self.model.config.get_text_config(decoder=True)
        names = inspect.signature(self.model.forward).parameters
        found = [name for name in _CACHE_NAMES if name in names]
        if not found or not self.model.can_generate():
            raise UnsupportedError(
                f"{type(model).__name__} does not generate text token by token; the engine serves "
                "models with generate() only"
            )
        self.is_encoder_decoder = bool(self.model.config.is_encoder_decoder)
        self.decoder_start = self._decoder_start() if self.is_encoder_decoder else None
        self.cache_name = found[0]
        self._takes_rows = "logits_to_keep" in names
        self.vocab_size = int(self.config.vocab_size)
        self.vocabulary: SplitVocabulary | None = None

    def _decoder_start(self) -> int:
        for settings in (getattr(self.model, "generation_config", None), self.model.config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                token = getattr(settings, name, None)
                if isinstance(token, int):
                    return token
        raise UnsupportedError(
            f"{type(self.model).__name__} is an encoder-decoder without a decoder_start_token_id"
        )

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return torch.device(self.model.device)

    def placeholders(self) -> frozenset[int]:
        """Tokens that stand for images, video or audio."""
        config = self.model.config
        text_ends = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
        return frozenset(
            value
            for name, value in config.to_dict().items()
            if name.endswith(_PLACEHOLDERS) and name not in text_ends and isinstance(value, int)
        )

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: Any,
        rows: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """Logits of some tokens, or this rank's part of them, and the cache.

        Args:
            input_ids: [S, T].
            position_ids: [S, T].
            cache: with which the model is called; None lets it make its own.
            rows: int64, of the S * T tokens; None for all of them.

        Returns:
            [rows, V], and the cache with these tokens.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            self.cache_name: cache,
            "use_cache": True,
        }
        one_row = input_ids.shape[0] == 1
        if rows is not None and self._takes_rows and one_row:
            inputs["logits_to_keep"] = rows
        with self.in_parts():
            output = self.model(**inputs)
        logits: Tensor = output.logits.flatten(0, 1)
        if rows is not None and not (self._takes_rows and one_row):
            logits = logits.index_select(0, rows)
        return logits, getattr(output, self.cache_name)

    def in_parts(self) -> AbstractContextManager[None]:
        """The model gives this rank's part of the logits inside, where the vocabulary is split."""
        return nullcontext() if self.vocabulary is None else self.vocabulary.in_parts()

    def whole(self, logits_SN: Tensor) -> Tensor:
        """Logits [S, V] of what a call gave; every rank of a tensor-parallel group asks."""
        return logits_SN if self.vocabulary is None else self.vocabulary.whole(logits_SN)

    def likeliest(self, logits_SN: Tensor) -> Tensor:
        """The likeliest tokens [S] of what a call gave; likewise."""
        if self.vocabulary is None:
            return logits_SN.argmax(-1)
        return self.vocabulary.likeliest(logits_SN)

    @contextmanager
    def paged_attention(self) -> Iterator[None]:
        """The language model attends over the engine's blocks for the time of a call."""
        before = self.config._attn_implementation_internal
        self.config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            self.config._attn_implementation_internal = before
