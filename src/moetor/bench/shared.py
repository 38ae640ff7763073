"""What a second stream for the shared experts gains: whole layers, in both orders.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetor.bench.hardware import available_memory
from moetor.bench.timing import CudaSampler, Timing, measure
from moetor.config import (
    ExpertsConfig,
    MoEConfig,
    RouterConfig,
    SharedExpertsConfig,
    SharedExpertsOrder,
)
from moetor.errors import InputError, MoetorError, UnsupportedError
from moetor.layer import MoELayer

ORDERS = (SharedExpertsOrder.NO_OVERLAP, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED)
# Layers in turn, so that no call finds its weights in the cache.
_LAYERS = 4
_GRAPH_CALLS = 16


def _layer(
    sizes: tuple[int, int, int, int], shared: int, *, gate: bool, **router: Any
) -> MoEConfig:
    experts, top_k, hidden, intermediate = sizes
    return MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k, **router),
        experts=ExpertsConfig(
            num_experts=experts, hidden_size=hidden, intermediate_size=intermediate
        ),
        shared=SharedExpertsConfig(intermediate_size=shared, sigmoid_gate=gate),
    )


LAYERS: dict[str, MoEConfig] = {
    "qwen1.5-moe-a2.7b": _layer((60, 4, 2048, 1408), 5632, gate=True),
    "qwen2-57b-a14b": _layer((64, 8, 3584, 2560), 20480, gate=True),
    # One of 8 expert-parallel ranks: 256 experts / 8, without the group limit.
    "deepseek-v3-ep8": _layer(
        (32, 8, 7168, 2048),
        2048,
        gate=False,
        scoring="sigmoid",
        renormalize=True,
        scaling_factor=2.5,
    ),
    "qwen3-next-80b-a3b": _layer((512, 10, 2048, 512), 512, gate=True, renormalize=True),
}
"""Layers with shared experts, by the name that the command takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedRow:
    """Both orders of one layer at one T."""

    layer: str
    tokens: int
    one_stream: Timing
    two_streams: Timing

    @property
    def gain(self) -> float:
        """How many times as long one stream takes."""
        return self.one_stream.median / self.two_streams.median


def find_layers(names: tuple[str, ...]) -> dict[str, MoEConfig]:
    """The layers called so; `all` is every one.

    Raises:
        InputError: an unknown name.
    """
    if names == ("all",):
        return LAYERS
    for name in names:
        if name not in LAYERS:
            raise InputError(f"unknown layer {name!r}; possible: {', '.join(LAYERS)}, all")
    return {name: LAYERS[name] for name in names}


def bench_shared(
    layers: dict[str, MoEConfig],
    tokens: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[SharedRow]:
    """Times each layer at each T, from CUDA graphs, both orders in turns.

    Raises:
        UnsupportedError: no GPU, or not enough memory.
        MoetorError: the orders disagree.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "a second stream needs an NVIDIA GPU, and torch sees none; shared experts run before "
            "the routed ones here"
        )
    done, total = 0, len(layers) * len(tokens)
    progress(done, total)
    for name, config in layers.items():
        made = _make(name, config, dtype, seed)
        for count in tokens:
            with torch.inference_mode():
                row = _row(name, made, count, dtype, seed)
            done += 1
            progress(done, total)
            yield row
        del made
        torch.cuda.empty_cache()


def _make(
    name: str, config: MoEConfig, dtype: torch.dtype, seed: int, device: str = "cuda"
) -> dict[SharedExpertsOrder, list[MoELayer]]:
    """Several layers in both orders; the two orders of one layer have one set of weights."""
    experts, shared = config.experts, config.shared
    assert shared is not None, "these layers have shared experts"
    size = experts.num_experts * experts.params_per_expert
    size += 3 * shared.intermediate_size * config.hidden_size
    needed, free = _LAYERS * size * dtype.itemsize, available_memory(device)
    if needed > 0.8 * free:
        raise UnsupportedError(
            f"layer {name}: {_LAYERS} sets of weights take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of {device} memory are free"
        )
    torch.manual_seed(seed)
    made: dict[SharedExpertsOrder, list[MoELayer]] = {order: [] for order in ORDERS}
    for _ in range(_LAYERS):
        state: dict[str, Tensor] | None = None
        for order, layers in made.items():
            ordered = replace(config, shared=replace(shared, order=order))
            layer = _drawn(ordered, dtype, device) if state is None else _empty(ordered, dtype)
            if state is not None:
                layer.load_state_dict(state, assign=True)
            state = dict(layer.state_dict())
            layers.append(layer.eval().requires_grad_(False))
    return made


def _drawn(config: MoEConfig, dtype: torch.dtype, device: str) -> MoELayer:
    return MoELayer(config, device=device, dtype=dtype)


def _empty(config: MoEConfig, dtype: torch.dtype) -> MoELayer:
    """Without weights, so that they need not be held twice; the order is checked by `config`."""
    plain = replace(config, shared=replace(_shared_of(config), order=SharedExpertsOrder.AUTO))
    layer = MoELayer(plain, device="meta", dtype=dtype)
    assert layer.shared is not None, "of a layer with shared experts"
    layer.config, layer.shared.config = config, _shared_of(config)
    return layer


def _shared_of(config: MoEConfig) -> SharedExpertsConfig:
    assert config.shared is not None, "these layers have shared experts"
    return config.shared


def _row(
    name: str,
    made: dict[SharedExpertsOrder, list[MoELayer]],
    tokens: int,
    dtype: torch.dtype,
    seed: int,
) -> SharedRow:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (tokens, made[ORDERS[0]][0].config.hidden_size)
    calls = [
        (number % _LAYERS, torch.randn(size, generator=generator, device="cuda").to(dtype))
        for number in range(_GRAPH_CALLS)
    ]
    samplers: dict[str, CudaSampler[tuple[int, Tensor]]] = {}
    for order, layers in made.items():

        def call(item: tuple[int, Tensor], layers: list[MoELayer] = layers) -> Tensor:
            out: Tensor = layers[item[0]](item[1])
            return out

        samplers[order] = CudaSampler(call, calls)
    one, two = (layers[0](calls[0][1]) for layers in made.values())
    if not torch.equal(one, two):
        raise MoetorError(f"layer {name} at {tokens} tokens: the two orders disagree")
    timings = measure(samplers, {order: sampler.warm_up() for order, sampler in samplers.items()})
    return SharedRow(
        layer=name,
        tokens=tokens,
        one_stream=timings[ORDERS[0]],
        two_streams=timings[ORDERS[1]],
    )


def threshold(rows: list[SharedRow]) -> int:
    """The largest T up to which two streams are never slower in any layer; 0 for none."""
    best = 0
    for tokens in sorted({row.tokens for row in rows}):
        if min(row.gain for row in rows if row.tokens == tokens) < 1.0:
            break
        best = tokens
    return best
