"""Tokens that travel as fp8: rounded as the format says, half the bytes; results as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from layer.layer_cases import build, draw_layer, make_config
from moetor.huggingface.trial import relative_error
from moetor.kernels.dequantize import round_activations
from moetor.layer.sharding import shard_layer
from moetor.parallel import allgather, alltoall
from moetor.parallel.groups import make_groups
from moetor.parallel.wire import Fp8Wire
from parallel.pool import Pool, patient

WIDTH = 320
BFLOAT16 = 0.01
DP = {"data_parallel_size": 2, "enable_expert_parallel": True}
WAYS: dict[str, dict[str, Any]] = {
    "allgather": {**DP, "dispatcher": "allgather"},
    "alltoall": {**DP, "dispatcher": "alltoall"},
    "alltoall_bound": {**DP, "dispatcher": "alltoall", "max_tokens_per_rank": 7},
    "sequence": {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "sequence_parallel": True,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 320, 7])
def test_a_token_is_rounded_as_the_format_says(
    width: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    hidden = torch.randn(9, width, generator=rng).to(dtype)
    hidden[3] = 0
    hidden[4] *= 1e4
    wire = Fp8Wire()
    message = wire.pack(hidden)
    assert message.dtype == torch.uint8
    assert message.shape == (9, width + 4 * -(-width // 128))
    back = wire.unpack(message, hidden)
    expected = round_activations(hidden.float(), "fp8_group128").to(dtype)
    torch.testing.assert_close(back, expected, rtol=1e-6, atol=0)
    largest = torch.nn.functional.pad(hidden.float(), (0, -width % 128)).view(9, -1, 128)
    bound = largest.abs().amax(-1).repeat_interleave(128, 1)[:, :width] / 16
    assert ((back.float() - hidden.float()).abs() <= bound).all()
    assert wire.unpack(wire.pack(hidden[:0]), hidden).shape == (0, width)
    assert torch.equal(wire.unpack(message[:1], hidden), back[:1])


@dataclass
class Answer:
    """Of one rank.

    Attributes:
        out: of the spread layer with tokens as fp8.
        rounded: of the whole layer whose experts are given rounded tokens.
        exact: of the whole layer.
        sent: bytes of the tokens that this rank sent, as they are and as fp8.
    """

    out: Tensor
    rounded: Tensor
    exact: Tensor
    sent: dict[str, int]


def run(rank: int, fields: dict[str, Any]) -> Answer:
    """In a worker."""
    config = make_config(
        hidden_size=WIDTH,
        experts={"intermediate_size": 32},
        router={"num_experts": 8, "top_k": 2},
    )
    tensors = draw_layer(config, torch.bfloat16, torch.Generator().manual_seed(4))
    whole = build(config, tensors)
    sent: dict[str, int] = {}
    out = {}
    for dtype in ("auto", "fp8"):
        layer = build(config, tensors)
        groups = make_groups(patient(**fields, dispatch_dtype=dtype))
        shard_layer(layer, groups)
        drawn = torch.Generator().manual_seed(20 + groups.data_rank)
        hidden = torch.randn(7 - 3 * groups.data_rank, WIDTH, generator=drawn).bfloat16()
        with pytest.MonkeyPatch.context() as patch:
            for module, name in ((allgather, "start_all_gather"), (alltoall, "start_all_to_all")):
                patch.setattr(module, name, counted(sent, dtype, getattr(module, name)))
            out[dtype] = layer(hidden)
    logits = whole.logits(hidden)
    assert logits is not None
    routing = whole.token_router.route(logits, whole.selection_bias, hidden.dtype)
    near = round_activations(hidden.float(), "fp8_group128").to(hidden.dtype)
    exact = whole.routed_experts(hidden, routing)
    assert relative_error(out["auto"], exact) < BFLOAT16
    return Answer(out["fp8"], whole.routed_experts(near, routing), exact, sent)


def counted(sent: dict[str, int], name: str, real: Any) -> Any:
    """Tokens go first."""

    def start(rows: Tensor, *rest: Any) -> Any:
        sent.setdefault(name, rows.nbytes)
        return real(rows, *rest)

    return start


@pytest.mark.parametrize("way", WAYS)
def test_half_the_bytes_and_a_bounded_error(way: str, two: Pool) -> None:
    for answer in two.run(run, WAYS[way]):
        assert relative_error(answer.out, answer.rounded) < BFLOAT16
        assert 0 < relative_error(answer.out, answer.exact) < 1 / 16
        rows, rest = divmod(answer.sent["auto"], 2 * WIDTH)
        assert rows > 0
        assert rest == 0
        assert answer.sent["fp8"] == rows * (WIDTH + 3 * 4) <= 0.52 * answer.sent["auto"]
