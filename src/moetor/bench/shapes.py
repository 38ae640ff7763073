"""The layers that `moetor bench layer` can measure: named ones, and any E,K,H,I.

Shape letters: E experts, K top_k, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moetor.config import Activation, ExpertsConfig
from moetor.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Routed experts of one layer.

    Attributes:
        name: for tables; `E,K,H,I` for a shape without a name.
        top_k: K.
        experts: sizes and form.
    """

    name: str
    top_k: int
    experts: ExpertsConfig

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts.num_experts:
            raise ConfigError(
                f"shape {self.name}: top_k={self.top_k} must lie between 1 and "
                f"num_experts={self.experts.num_experts}"
            )

    @property
    def parameters(self) -> int:
        """Numbers in one set of weights, biases included."""
        return self.experts.num_experts * self.parameters_per_expert

    @property
    def parameters_per_expert(self) -> int:
        """Numbers that a call reads for each active expert, biases included."""
        biases = self.experts.up_size + self.experts.hidden_size if self.experts.has_bias else 0
        return self.experts.params_per_expert + biases


def _plain(name: str, num_experts: int, top_k: int, hidden: int, intermediate: int) -> LayerShape:
    experts = ExpertsConfig(
        num_experts=num_experts, hidden_size=hidden, intermediate_size=intermediate
    )
    return LayerShape(name=name, top_k=top_k, experts=experts)


_GPT_OSS = ExpertsConfig(
    num_experts=32,
    hidden_size=2880,
    intermediate_size=2880,
    activation=Activation(alpha=1.702, limit=7.0, up_shift=1.0),
    interleaved=True,
    transposed=True,
    has_bias=True,
)

SHAPES: dict[str, LayerShape] = {
    shape.name: shape
    for shape in (
        _plain("qwen3-30b-a3b", 128, 8, 2048, 768),
        _plain("mixtral-8x7b", 8, 2, 4096, 14336),
        _plain("olmoe", 64, 8, 2048, 1024),
        LayerShape(name="gpt-oss-20b", top_k=4, experts=_GPT_OSS),
        # One of 8 expert-parallel ranks: 256 experts / 8.
        _plain("deepseek-v3-ep8", 32, 8, 7168, 2048),
    )
}


def parse_shapes(texts: Iterable[str]) -> tuple[LayerShape, ...]:
    """The shapes named in `texts`, in order and each once.

    A text holds names, `all`, or four numbers E,K,H,I, separated by commas or spaces; four numbers
    may also be spread over neighbouring texts.

    Raises:
        InputError: an unknown name, or numbers that are not four.
        ConfigError: a size below 1, or top_k > num_experts.
    """
    words = [word for text in texts for word in text.replace(",", " ").split()]
    found: dict[str, LayerShape] = {}
    while words:
        if words[0].lstrip("-").isdigit():
            shape = _from_numbers(words[:4])
            words = words[4:]
            found[shape.name] = shape
            continue
        name = words.pop(0)
        if name == "all":
            found |= SHAPES
        elif name in SHAPES:
            found[name] = SHAPES[name]
        else:
            raise InputError(
                f"unknown shape {name!r}; possible: {', '.join(SHAPES)}, all, or four numbers "
                f"E,K,H,I (num_experts, top_k, hidden_size, intermediate_size)"
            )
    if not found:
        raise InputError(f"no shape was given; possible: {', '.join(SHAPES)}, all, or E,K,H,I")
    return tuple(found.values())


def _from_numbers(words: list[str]) -> LayerShape:
    text = ",".join(words)
    if len(words) < 4 or not all(word.lstrip("-").isdigit() for word in words):
        raise InputError(
            f"shape {text!r} needs four whole numbers E,K,H,I (num_experts, top_k, hidden_size, "
            f"intermediate_size), for example 64,8,2048,1024"
        )
    num_experts, top_k, hidden, intermediate = (int(word) for word in words)
    return _plain(text, num_experts, top_k, hidden, intermediate)


def check_tokens(tokens: Sequence[int]) -> None:
    """Refuses an empty list and counts below 1.

    Raises:
        InputError: says which.
    """
    if not tokens:
        raise InputError("no number of tokens was given; for example 1,8,64,512")
    for count in tokens:
        if count < 1:
            raise InputError(f"tokens={count} must be at least 1; for example 1,8,64,512")
