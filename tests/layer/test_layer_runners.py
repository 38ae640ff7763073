"""How a layer is driven: in chunks, with its shared experts in order, batch-invariant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from layer.layer_cases import (
    DEEPSEEK_V3,
    GPT_OSS,
    IDENTITY,
    PLAIN_SHARED,
    build,
    draw_input,
    draw_layer,
    make_config,
)
from moetor.config import MoEConfig, SharedExpertsConfig
from moetor.errors import ConfigError, KernelRefusedError, UnsupportedError
from moetor.kernels.routing import Routing
from moetor.layer import ChunkedRunner, DefaultRunner, MoELayer, SimulatedRouter
from moetor.parallel.dispatch import Dispatcher

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deepseek_v3": {"router": DEEPSEEK_V3, "shared": PLAIN_SHARED},
    "gpt_oss": {"router": {"score_order": "after_topk"}, "experts": GPT_OSS},
    "identity": {"router": IDENTITY, "shared": PLAIN_SHARED},
    "latent": {"latent_size": 5, "shared": PLAIN_SHARED},
    "monolithic": {"quantization": "unquantized_monolithic"},
    "monolithic_sigmoid": {"router": DEEPSEEK_V3, "quantization": "unquantized_monolithic"},
}


def by_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_dtype)
@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", ["native", "torch", "reference"])
def test_chunked_equals_unchunked_bitwise(
    kernel: str, form: str, chunk: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    config = make_config(**FORMS[form])
    config = config.with_runner(kernel=kernel, batch_invariant=kernel != "native")
    tensors = draw_layer(config, dtype, rng)
    try:
        whole = build(config, tensors)
    except KernelRefusedError as refusal:
        pytest.skip(str(refusal))
    budget = chunk * whole.routed_experts.workspace_bytes_per_token()
    chunked = build(config.with_runner(name="chunked", workspace_bytes=budget), tensors)
    assert isinstance(chunked.runner, ChunkedRunner)
    assert chunked.runner.chunk_tokens(chunked) == chunk
    given = draw_input(whole, 11, rng)
    assert torch.equal(chunked(given.hidden), whole(given.hidden))


def test_the_chunk_length_follows_from_the_budget() -> None:
    layer = MoELayer(make_config())
    per_token = layer.routed_experts.workspace_bytes_per_token()
    for budget, tokens in [
        (1, 1),
        (per_token - 1, 1),
        (2 * per_token - 1, 1),
        (2 * per_token, 2),
        (77 * per_token + 3, 77),
    ]:
        assert ChunkedRunner(budget).chunk_tokens(layer) == tokens
    with pytest.raises(ConfigError, match="workspace_bytes=0"):
        ChunkedRunner(0)


def test_the_kernel_sees_the_chunks(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    config = make_config()
    tensors = draw_layer(config, torch.float32, rng)
    budget = 4 * build(config, tensors).routed_experts.workspace_bytes_per_token()
    layer = build(config.with_runner(name="chunked", workspace_bytes=budget), tensors)
    seen: list[int] = []
    run = layer.routed_experts.run

    def spy(hidden_TH: Tensor, routing: Routing) -> Tensor:
        seen.append(hidden_TH.shape[0])
        return run(hidden_TH, routing)

    monkeypatch.setattr(layer.routed_experts, "run", spy)
    layer(torch.randn(11, 12))
    assert seen == [4, 4, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_dtype)
@pytest.mark.parametrize("router", [{}, DEEPSEEK_V3, {"score_order": "after_topk"}])
def test_monolithic_equals_modular_bitwise(
    router: dict[str, Any], dtype: torch.dtype, rng: torch.Generator
) -> None:
    config = make_config(router=router, shared=PLAIN_SHARED)
    tensors = draw_layer(config, dtype, rng)
    modular = build(config, tensors)
    monolithic = build(replace(config, quantization="unquantized_monolithic"), tensors)
    assert type(modular.routed_experts.method) is not type(monolithic.routed_experts.method)
    given = draw_input(modular, 9, rng)
    assert torch.equal(monolithic(given.hidden), modular(given.hidden))


def test_a_monolithic_method_takes_no_routing(rng: torch.Generator) -> None:
    config = make_config(quantization="unquantized_monolithic")
    layer = build(config, draw_layer(config, torch.float32, rng))
    routing = Routing(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"monolithic.*use a modular method"):
        layer.routed_experts(torch.randn(2, 12), routing)


# --- a token's bits and its batch ----------------------------------------------------------------


def rows_alone_and_together(
    config: MoEConfig, dtype: torch.dtype, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    layer = build(config, draw_layer(config, dtype, rng))
    given = draw_input(layer, 17, rng)
    rows = [
        layer(given.hidden[row : row + 1], None if given.logits is None else given.logits[[row]])
        for row in range(17)
    ]
    return torch.cat(rows), layer(given.hidden, given.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_dtype)
@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize(
    "fields",
    [
        {"internal_gate": False},
        {"internal_gate": False, "router": {"num_experts": 7, "scoring": "sigmoid"}},
        {"internal_gate": False, "router": {"num_experts": 7, "scoring": "sqrt_softplus"}},
        {"hidden_size": 64},
        {"hidden_size": 64, "shared": SharedExpertsConfig(intermediate_size=33, sigmoid_gate=True)},
        {"hidden_size": 64, "latent_size": 32},
        {"hidden_size": 13, "router": IDENTITY, "experts": GPT_OSS, "shared": PLAIN_SHARED},
        {"router": DEEPSEEK_V3, "quantization": "unquantized_monolithic"},
    ],
    ids=["softmax", "sigmoid", "softplus", "gate", "shared", "latent", "identity", "monolithic"],
)
def test_batch_invariant_layers(
    fields: dict[str, Any], kernel: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    config = make_config(runner={"batch_invariant": True, "kernel": kernel}, **fields)
    alone, together = rows_alone_and_together(config, dtype, rng)
    assert torch.equal(alone, together)


# --- the order of the shared experts -------------------------------------------------------------


class Courier(Dispatcher):
    """A dispatcher that says it communicates, and notes what happens between its two steps."""

    communicates = True

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def dispatch(self, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        self.log.append("dispatch")
        return hidden_TH, routing

    def combine(self, out_TH: Tensor) -> Tensor:
        self.log.append("combine")
        return out_TH


def ordered(order: Any) -> SharedExpertsConfig:
    return SharedExpertsConfig(intermediate_size=7, order=order)


def test_a_second_stream_needs_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match=r"need a CUDA device, not cpu; use 'no_overlap'"):
        MoELayer(make_config(shared=ordered("multi_stream_overlapped")))


def test_a_callable_router_takes_the_plain_order_alone() -> None:
    config = make_config(shared=ordered("internal_overlapped"))
    with pytest.raises(ConfigError, match=r"a callable routes outside of it\. Use 'no_overlap'"):
        MoELayer(config, router=SimulatedRouter(6, 2), dispatcher=Courier([]))


@pytest.mark.parametrize(
    ("device", "tokens", "limit", "wanted"),
    [
        ("cpu", 4, 256, "no_overlap"),
        ("cuda", 1, 256, "multi_stream_overlapped"),
        ("cuda", 256, 256, "multi_stream_overlapped"),
        ("cuda", 257, 256, "no_overlap"),
        ("cuda", 1, 0, "no_overlap"),
        ("cuda", 0, 256, "no_overlap"),
    ],
)
def test_the_automatic_order_looks_at_the_call(
    device: str, tokens: int, limit: int, wanted: str
) -> None:
    config = SharedExpertsConfig(intermediate_size=7, overlap_max_tokens=limit)
    shared = MoELayer(make_config(shared=config)).shared
    assert shared is not None
    with FakeTensorMode():
        assert shared.order_for(torch.empty(tokens, 12, device=device)) == wanted


def test_the_automatic_order_goes_with_a_callable_router() -> None:
    config = make_config(shared=ordered("auto"))
    layer = MoELayer(config, router=SimulatedRouter(6, 2)).eval()
    assert layer(torch.randn(3, 12)).shape == (3, 12)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlap_max_tokens=-1"):
        SharedExpertsConfig(intermediate_size=7, overlap_max_tokens=-1)


def test_an_internal_overlap_needs_a_communication() -> None:
    with pytest.raises(UnsupportedError, match=r"this layer has none; use 'no_overlap'"):
        MoELayer(make_config(shared=ordered("internal_overlapped")))


def test_an_internal_overlap_is_kept_or_refused(rng: torch.Generator) -> None:
    config = make_config(shared=ordered("internal_overlapped"))
    log: list[str] = []
    try:
        layer = build(config, draw_layer(config, torch.float32, rng), dispatcher=Courier(log))
    except UnsupportedError:
        return
    layer.shared_experts.register_forward_hook(lambda *_: log.append("shared"))
    layer(torch.randn(3, 12))
    assert log == ["dispatch", "shared", "combine"]


def test_a_dispatcher_is_asked_before_and_after_the_experts(rng: torch.Generator) -> None:
    config = make_config(router=IDENTITY, shared=PLAIN_SHARED)
    log: list[str] = []
    tensors = draw_layer(config, torch.float32, rng)
    layer = build(config, tensors, dispatcher=Courier(log))
    assert isinstance(layer.runner, DefaultRunner)
    given = draw_input(layer, 3, rng)
    assert torch.equal(layer(given.hidden), build(config, tensors)(given.hidden))
    assert log == ["dispatch", "combine"]


def test_a_monolithic_method_cannot_be_dispatched() -> None:
    config = make_config(quantization="unquantized_monolithic")
    with pytest.raises(ConfigError, match="cannot be dispatched over ranks"):
        MoELayer(config, dispatcher=Courier([]))


@pytest.mark.parametrize("part", ["gate", "shared_experts", "shared_expert_gate"])
def test_a_replaced_part_is_the_one_that_runs(part: str, rng: torch.Generator) -> None:
    """Quantisers and adapters replace modules by assignment."""
    config = make_config(shared=SharedExpertsConfig(intermediate_size=7, sigmoid_gate=True))
    layer = build(config, draw_layer(config, torch.float32, rng))
    called: list[str] = []

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Tensor:
            called.append(part)
            out: Tensor = self.inner(hidden)
            return out

    setattr(layer, part, Wrapped(getattr(layer, part)))
    layer(torch.randn(3, 12))
    assert called == [part]
