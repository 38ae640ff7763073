"""Quantised experts as a module: every form, brought into canonical order, against the oracle on
the dequantised weights; and layers that are built quantised."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from layer.expert_cases import FORMS, ExpertsCase, draw
from moetor.config import ExpertsConfig, MoEConfig, RouterConfig
from moetor.errors import ConfigError, InputError
from moetor.kernels.base import ExpertWeights
from moetor.kernels.dequantize import dequantize_expert
from moetor.kernels.formats import QuantizedMatrix, canonical
from moetor.kernels.routing import Routing
from moetor.layer import MoELayer
from moetor.layer.quantized_experts import QuantizedExperts, make_experts
from moetor.quant_config import PRESETS, QuantConfig
from oracle import Tensors, assert_close

# Weight-only quantisations: the oracle does not round activations.
NAMES = ("int8_w8a16", "int4", "int4_zp", "fp8_block", "mxfp4", "nvfp4")


def dense(matrix: QuantizedMatrix) -> torch.Tensor:
    experts = range(matrix.values.shape[0])
    return torch.stack([dequantize_expert(matrix, e, torch.float64) for e in experts])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_every_form_is_quantised_into_canonical_order(
    case: ExpertsCase, name: str, rng: torch.Generator
) -> None:
    config = case.config
    drawn = draw(case, torch.float32, rng)
    quant = replace(PRESETS[name], activations="unquantized")
    experts = make_experts(
        config,
        quant,
        case.top_k,
        kernel="torch",
        batch_invariant=False,
        weights=ExpertWeights(**drawn.tensors._asdict()),
    )
    assert isinstance(experts, QuantizedExperts)
    weights = experts.quantized_weights
    gate_up, down = dense(weights.gate_up), dense(weights.down)
    # The rounded weights back in the form's own layout, near the originals everywhere.
    if config.interleaved:
        gate_up = torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)
    if config.transposed:
        gate_up, down = gate_up.mT, down.mT
    for rounded, original in ((gate_up, drawn.tensors.gate_up), (down, drawn.tensors.down)):
        wide = original.double()
        assert (rounded - wide).norm() < 0.2 * wide.norm()
        assert not torch.equal(rounded, wide)
    tensors: Tensors = drawn.tensors._replace(gate_up=gate_up, down=down)
    out = experts.run(drawn.hidden, Routing(drawn.topk_weights, drawn.topk_ids))
    assert_close(out, replace(drawn, tensors=tensors).expected(config))
    assert experts.config == canonical(config)


def layer_config(**changes: object) -> MoEConfig:
    experts = ExpertsConfig(num_experts=8, hidden_size=48, intermediate_size=40)
    fields = {
        "hidden_size": 48,
        "router": RouterConfig(num_experts=8, top_k=2),
        "experts": experts,
        "quantization": "int8",
    } | changes
    return MoEConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_is_built_quantised(name: str) -> None:
    layer = MoELayer(layer_config(quantization=name)).eval()
    assert layer.routed_experts.method.name in (name, PRESETS[name].name)
    out = layer(torch.randn(5, 48))
    assert out.shape == (5, 48)
    assert out.isfinite().all()
    assert out.abs().max() > 0


def test_latent_and_padded_layers() -> None:
    latent = ExpertsConfig(num_experts=8, hidden_size=24, intermediate_size=40)
    layer = MoELayer(layer_config(experts=latent, latent_size=24)).eval()
    assert layer(torch.randn(3, 48)).shape == (3, 48)
    padded = MoELayer(layer_config().with_runner(hidden_multiple=64)).eval()
    assert padded.routed_experts.config.hidden_size == 64
    assert padded(torch.randn(3, 48)).shape == (3, 48)


def test_copies_and_state_dicts_are_equal_bit_for_bit() -> None:
    layer = MoELayer(layer_config(quantization="nvfp4")).eval()
    x = torch.randn(4, 48)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    other = MoELayer(layer_config(quantization="nvfp4")).eval()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_tokens_in_chunks_and_alone_have_the_bits_of_the_batch() -> None:
    torch.manual_seed(1)
    layer = MoELayer(layer_config(quantization="fp8").with_runner(batch_invariant=True)).eval()
    x = torch.randn(9, 48)
    whole = layer(x)
    for row in range(9):
        assert torch.equal(layer(x[row : row + 1]), whole[row : row + 1])


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="'int3' is not known"):
        MoELayer(layer_config(quantization="int3"))
    experts = make_experts(layer_config().experts, "int8", 2, kernel="auto", batch_invariant=False)
    assert isinstance(experts, QuantizedExperts)
    held = experts.quantized_weights
    with pytest.raises(ConfigError, match=r"'int4' was asked for.*quantised already: int8"):
        make_experts(experts.config, "int4", 2, kernel="auto", batch_invariant=False, weights=held)
    wrong = replace(held, down=replace(held.down, scales=held.down.scales[:, :-1]))
    with pytest.raises(ConfigError, match="scales of down_proj have shape"):
        make_experts(experts.config, None, 2, kernel="auto", batch_invariant=False, weights=wrong)
    plain = ExpertWeights(gate_up=torch.randn(8, 80, 48), down=torch.randn(8, 48, 40))
    plain.down[3, 2, 1] = float("nan")
    with pytest.raises(InputError, match=r"expert 3: .*NaN"):
        make_experts(
            layer_config().experts,
            QuantConfig(format="int8"),
            2,
            kernel="auto",
            batch_invariant=False,
            weights=plain,
        )
    with pytest.raises(ConfigError, match="these experts are quantised"):
        _ = experts.weights
