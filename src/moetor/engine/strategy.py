"""How a family is cached: in blocks, in blocks and state slots, or in its own cache object.

The classes of the cache layers that Transformers itself would use say what is possible; a trial
then shows whether the model, called with the engine's cache, gives the logits that it gives with
its own. The first strategy that does is taken.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from moetor.engine.cache import PAGEABLE, STATEFUL, LayerShape, own_layers

StrategyName = Literal["paged", "paged and states", "own cache"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """The way in which one model is cached.

    Attributes:
        name: `paged`: keys and values in blocks, all tokens of a step in one call. `paged and
            states`: besides, states in slots; a step's single tokens in one call, each prompt in
            one of its own. `own cache`: each sequence has the model's own cache object and goes
            through the model alone.
        reason: why no better one is taken; empty for `paged`.
        chunked_prefill: whether prompts may be computed in parts.
        shapes: of the layers with keys in blocks.
        example_layers: of a cache that the model has filled, for the shapes of states.
        proved: whether a trial has shown that logits are the same.
    """

    name: StrategyName
    reason: str = ""
    chunked_prefill: bool = True
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    example_layers: list[Any] = field(default_factory=list)
    proved: bool = False

    @property
    def paged(self) -> bool:
        """Whether keys and values are in blocks."""
        return self.name != "own cache"

    @property
    def has_states(self) -> bool:
        """Whether there are states in slots."""
        return self.name == "paged and states"

    @property
    def prefix_caching(self) -> bool:
        """Whether a prompt may begin with another one's blocks: states would be missing."""
        return self.name == "paged"

    def __str__(self) -> str:
        text: str = self.name
        if not self.chunked_prefill:
            text += ", prompts in one piece"
        return f"{text} ({self.reason})" if self.reason else text


ENCODER_DECODER = Strategy(
    name="own cache", reason="it is an encoder-decoder", chunked_prefill=False
)


def expected_strategy(config: Any) -> Strategy:
    """The best strategy that a configuration allows, before any trial.

    Args:
        config: of the language model.
    """
    try:
        kinds = Counter(type(layer).__name__ for layer in own_layers(config))
    except Exception as error:  # a configuration of which Transformers itself can make no cache
        return _own_cache(f"its cache cannot be made beforehand: {error}")
    known = {*PAGEABLE, *STATEFUL, "DummyLayer"}
    others = sorted(kind for kind in kinds if kind not in known)
    if others:
        return _own_cache(f"its cache has layers of class {', '.join(others)}")
    stateful = sorted(kind for kind in kinds if kind in STATEFUL)
    if stateful:
        return Strategy(
            name="paged and states", reason=f"its cache has layers of class {', '.join(stateful)}"
        )
    return Strategy(name="paged")


def _own_cache(reason: str) -> Strategy:
    return Strategy(name="own cache", reason=reason, chunked_prefill=False)


def layer_shapes(config: Any, layers: list[Any]) -> dict[int, LayerShape]:
    """Geometry of the layers with keys.

    Args:
        config: of the language model.
        layers: of a cache of Transformers that the model has filled.
    """
    kinds = list(getattr(config, "layer_types", None) or ())
    chunk = getattr(config, "attention_chunk_size", None)
    shapes: dict[int, LayerShape] = {}
    for index, layer in enumerate(layers):
        keys: Tensor | None = getattr(layer, "keys", None)
        if keys is None or keys.dim() != 4:
            continue
        shape = LayerShape(keys.shape[1], keys.shape[3], layer.values.shape[3], keys.dtype)
        if getattr(layer, "is_sliding", False):
            kind = kinds[index] if index < len(kinds) else None
            chunked = kind == "chunked_attention" or (kind is None and chunk is not None)
            length = int((chunk or 0) if chunked else layer.sliding_window)
            shape = replace(shape, chunk=length) if chunked else replace(shape, window=length)
        shapes[index] = shape
    return shapes
