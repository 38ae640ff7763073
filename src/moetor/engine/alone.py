"""One sequence alone, with the model's own cache object, as `generate` would call the model.

So go families whose cache is not in blocks, prompts with pictures and the like (the model's own
masks and positions apply), and encoder-decoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.engine.model import ServedModel
from moetor.engine.sequence import Scheduled
from moetor.huggingface.composites import images_named

# Offsets of positions behind pictures, which the Qwen-VL line keeps on the model.
_OFFSETS = "rope_deltas"


@dataclass(slots=True)
class OwnState:
    """What a sequence keeps between calls.

    Attributes:
        cache: the model's own.
        offsets: of positions, where the family has them.
        encoded: what the encoder made of the prompt.
    """

    cache: Any = None
    offsets: Any = None
    encoded: Any = None


class AloneCaller:
    """Calls the model for one part of a step, and keeps the sequence's state on it."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        modules = served.composite.modules()
        self._offsets_of = next((one for one in modules if hasattr(one, _OFFSETS)), None)

    def __call__(self, part: Scheduled, ids_T: Tensor, places_T: Tensor, keep: Tensor) -> Tensor:
        """Logits [keep, V], or this rank's part of them.

        Args:
            ids_T, places_T: token ids and positions of the part.
            keep: which of the part's tokens logits are needed of.
        """
        sequence = part.sequence
        if part.start == 0:
            sequence.cache = OwnState()
        state: OwnState = sequence.cache
        if self._served.is_encoder_decoder:
            return self._decode(part, state, ids_T)
        if sequence.request.extra is not None:
            return self._with_pictures(part, state, ids_T, keep)
        logits, state.cache = self._served(ids_T[None], places_T[None], state.cache, keep)
        return logits

    def _with_pictures(
        self, part: Scheduled, state: OwnState, ids_T: Tensor, keep: Tensor
    ) -> Tensor:
        served = self._served
        inputs: dict[str, Any] = {
            "input_ids": ids_T[None],
            served.cache_name: state.cache,
            "use_cache": True,
        }
        if part.start == 0:
            prompt_len = part.sequence.prompt_len
            # Not later: nothing is padded, and some families would take its length for that of
            # the new tokens.
            inputs["attention_mask"] = torch.ones_like(ids_T[None])
            for name, value in (part.sequence.request.extra or {}).items():
                inputs[name] = self._input(value, prompt_len, part.count)
        before = getattr(self._offsets_of, _OFFSETS, None)
        if self._offsets_of is not None:
            setattr(self._offsets_of, _OFFSETS, state.offsets)
        try:
            with served.in_parts(), images_named(served.composite):
                output = served.composite(**inputs)
        finally:
            if self._offsets_of is not None:
                state.offsets = getattr(self._offsets_of, _OFFSETS)
                setattr(self._offsets_of, _OFFSETS, before)
        state.cache = getattr(output, served.cache_name)
        logits: Tensor = output.logits
        return logits[0].index_select(0, keep)

    def _input(self, value: Any, prompt_len: int, count: int) -> Any:
        """One further input on the model's device; what has an entry for each token of the prompt
        gets zeros for the generated ones that are computed again with it.
        """
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return value.to(self._served.device, self._served.model.dtype)
        if value.dim() == 2 and value.shape[1] == prompt_len:
            value = F.pad(value, (0, count - prompt_len))
        return value.to(self._served.device)

    def _decode(self, part: Scheduled, state: OwnState, ids_T: Tensor) -> Tensor:
        """The prompt goes through the encoder once; the decoder begins with its start token."""
        served, length = self._served, part.sequence.prompt_len
        model = served.model
        if part.start == 0:
            prompt = ids_T[None, :length]
            mask = torch.ones_like(prompt)
            state.encoded = model.get_encoder()(input_ids=prompt, attention_mask=mask)
            first = ids_T.new_tensor([served.decoder_start])
            ids_T = torch.cat([first, ids_T[length:]])
        mask = torch.ones((1, length), dtype=torch.int64, device=ids_T.device)
        with served.in_parts():
            output = model(
                encoder_outputs=state.encoded,
                attention_mask=mask,
                decoder_input_ids=ids_T[None],
                use_cache=True,
                **{served.cache_name: state.cache},
            )
        state.cache = getattr(output, served.cache_name)
        logits: Tensor = output.logits
        return logits[0, -1:]
