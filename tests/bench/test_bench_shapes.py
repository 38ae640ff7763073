from __future__ import annotations

import pytest

from moetor.bench.shapes import SHAPES, check_tokens, parse_shapes
from moetor.errors import MoetorError

SIZES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "olmoe": (64, 8, 2048, 1024),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "deepseek-v3-ep8": (32, 8, 7168, 2048),
}


def test_the_named_shapes() -> None:
    found = {
        name: (
            shape.experts.num_experts,
            shape.top_k,
            shape.experts.hidden_size,
            shape.experts.intermediate_size,
        )
        for name, shape in SHAPES.items()
    }
    assert found == SIZES


def test_gpt_oss_has_its_form() -> None:
    experts = SHAPES["gpt-oss-20b"].experts
    assert experts.transposed
    assert experts.interleaved
    assert experts.has_bias
    activation = experts.activation
    assert (activation.name, activation.alpha, activation.limit, activation.up_shift) == (
        *("silu", 1.702),
        *(7.0, 1.0),
    )


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["olmoe"], ["olmoe"]),
        (["olmoe", "mixtral-8x7b"], ["olmoe", "mixtral-8x7b"]),
        (["olmoe,mixtral-8x7b"], ["olmoe", "mixtral-8x7b"]),
        (["olmoe mixtral-8x7b"], ["olmoe", "mixtral-8x7b"]),
        (["olmoe", "olmoe"], ["olmoe"]),
        (["all"], list(SIZES)),
        (["mixtral-8x7b", "all"], ["mixtral-8x7b", *(n for n in SIZES if n != "mixtral-8x7b")]),
        (["4,2,32,16"], ["4,2,32,16"]),
        (["olmoe", "4", "2", "32", "16", "8,1,64,8"], ["olmoe", "4,2,32,16", "8,1,64,8"]),
    ],
)
def test_parsing(texts: list[str], names: list[str]) -> None:
    assert [shape.name for shape in parse_shapes(texts)] == names


def test_numbers_are_e_k_h_i() -> None:
    (shape,) = parse_shapes(["4,2,32,16"])
    assert shape.top_k == 2
    assert shape.experts.gate_up_shape == (4, 32, 32)
    assert shape.experts.down_shape == (4, 32, 16)
    assert shape.parameters_per_expert == 3 * 32 * 16


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["mixtral"], ["unknown shape 'mixtral'", "qwen3-30b-a3b", "E,K,H,I"]),
        (["4,2,32"], ["'4,2,32'", "four whole numbers"]),
        (["4,2,32,x"], ["'4,2,32,x'", "four whole numbers"]),
        (["4,5,32,16"], ["top_k=5", "num_experts=4"]),
        (["4,0,32,16"], ["top_k=0"]),
        (["0,0,32,16"], ["num_experts=0"]),
        (["4,2,-32,16"], ["hidden_size=-32"]),
        ([], ["no shape"]),
        ([" , "], ["no shape"]),
    ],
)
def test_refusals_are_one_line(texts: list[str], words: list[str]) -> None:
    with pytest.raises(MoetorError) as refused:
        parse_shapes(texts)
    text = str(refused.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("tokens", [(), (0,), (1, -8)])
def test_token_counts(tokens: tuple[int, ...]) -> None:
    with pytest.raises(MoetorError, match="1,8,64,512"):
        check_tokens(tokens)
