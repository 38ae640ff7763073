"""Every naming of the table, into every packed form, against packing by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.huggingface.expert_mapping import ExpertNames, looks_like_expert, map_experts
from moetor.huggingface.layout import Layout

EXPERTS, HIDDEN, INTERMEDIATE = 5, 6, 4
PATH = "model.layers.3.mlp.experts"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Bank:
    """Experts as nn.Linear keeps them."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor

    @classmethod
    def draw(cls, rng: torch.Generator) -> Bank:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(EXPERTS, *shape, generator=rng)

        return cls(
            gate=drawn(INTERMEDIATE, HIDDEN),
            up=drawn(INTERMEDIATE, HIDDEN),
            down=drawn(HIDDEN, INTERMEDIATE),
            gate_bias=drawn(INTERMEDIATE),
            up_bias=drawn(INTERMEDIATE),
            down_bias=drawn(HIDDEN),
        )

    def packed(self, form: ExpertsConfig) -> Tensors:
        """The parameters of a packed experts module."""

        def first(gate: Tensor, up: Tensor) -> Tensor:
            if not form.gated:
                return up
            if form.interleaved:
                return torch.stack([gate, up], 2).flatten(1, 2)
            return torch.cat([gate, up], 1)

        up_name = "gate_up_proj" if form.gated else "up_proj"
        made = {up_name: first(self.gate, self.up), "down_proj": self.down}
        if form.transposed:
            made = {name: tensor.transpose(1, 2) for name, tensor in made.items()}
        if form.has_bias:
            made[f"{up_name}_bias"] = first(self.gate_bias, self.up_bias)
            made["down_proj_bias"] = self.down_bias
        return made


def each(
    gate: str, up: str, down: str, prefix: str, ending: str = ".weight"
) -> Callable[..., Tensors]:
    """One tensor for each expert and part."""

    def save(bank: Bank, form: ExpertsConfig) -> Tensors:
        parts = {up: bank.up, down: bank.down} | ({gate: bank.gate} if form.gated else {})
        biases = {up: bank.up_bias, down: bank.down_bias} | (
            {gate: bank.gate_bias} if form.gated else {}
        )
        made = {
            f"{prefix}.{number}.{part}{ending}": tensor[number]
            for part, tensor in parts.items()
            for number in range(EXPERTS)
        }
        if form.has_bias:
            made |= {
                f"{prefix}.{number}.{part}.bias": tensor[number]
                for part, tensor in biases.items()
                for number in range(EXPERTS)
            }
        return made

    return save


def each_fused(bank: Bank, form: ExpertsConfig) -> Tensors:
    made = {
        f"decoder.layers.3.mlp.experts.local_experts.{n}.linear_fc1.weight": torch.cat(
            [bank.gate[n], bank.up[n]]
        )
        for n in range(EXPERTS)
    }
    return made | {
        f"decoder.layers.3.mlp.experts.local_experts.{n}.linear_fc2.weight": bank.down[n]
        for n in range(EXPERTS)
    }


def stacked(bank: Bank, form: ExpertsConfig) -> Tensors:
    return {
        "model.layers.3.block_sparse_moe.input_linear.weight": torch.cat([bank.gate, bank.up], 1),
        "model.layers.3.block_sparse_moe.output_linear.weight": bank.down,
    }


def stacked_apart(bank: Bank, form: ExpertsConfig) -> Tensors:
    return {
        "layers.3.moe.experts.w1": bank.gate,
        "layers.3.moe.experts.w3": bank.up,
        "layers.3.moe.experts.w2": bank.down,
    }


def stacked_transposed(bank: Bank, form: ExpertsConfig) -> Tensors:
    return {
        name: tensor.transpose(1, 2).contiguous() for name, tensor in stacked(bank, form).items()
    }


@dataclass(frozen=True)
class Naming:
    id: str
    save: Callable[[Bank, ExpertsConfig], Tensors]
    gated: bool = True
    biases: bool = False


NAMINGS = (
    Naming("gate-up-down", each("gate_proj", "up_proj", "down_proj", PATH), biases=True),
    Naming("mixtral", each("w1", "w3", "w2", "model.layers.3.block_sparse_moe.experts")),
    Naming("bare-names", each("w1", "w3", "w2", "layers.3.feed_forward.experts", ending="")),
    Naming("grok", each("linear", "linear_v", "linear_1", "model.layers.3.moe_block.experts")),
    Naming("ungated", each("", "fc1", "fc2", "layers.3.ffn.experts"), gated=False, biases=True),
    Naming("up-down", each("", "up_proj", "down_proj", "layers.3.ffn.experts"), gated=False),
    Naming("each-fused", each_fused),
    Naming("stacked", stacked),
    Naming("stacked-apart", stacked_apart),
    Naming("stacked-transposed", stacked_transposed),
)
FORM = ExpertsConfig(
    num_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, gated=True
)
FORMS = {
    "plain": FORM,
    "transposed": replace(FORM, transposed=True),
    "interleaved": replace(FORM, interleaved=True),
    "gpt-oss": replace(FORM, transposed=True, interleaved=True),
}


def fill(layout: Layout, store: Tensors) -> Tensor:
    out = torch.full(layout.shape, float("nan"))
    for piece in layout.pieces:
        out[piece.target] = piece.read(lambda box, key=piece.key: store[key][box])
    return out


def shapes_of(store: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in store.items()}


@pytest.mark.parametrize("form_name", FORMS)
@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.id)
def test_every_naming_into_every_form(naming: Naming, form_name: str, rng: torch.Generator) -> None:
    form = replace(FORMS[form_name], has_bias=naming.biases)
    if not naming.gated:
        form = replace(form, interleaved=False, gated=False)
    bank = Bank.draw(rng)
    store = naming.save(bank, form)
    others = {
        "model.layers.3.mlp.shared_experts.gate_proj.weight": torch.zeros(2, 2),
        "model.layers.3.mlp.gate.weight": torch.zeros(2, 2),
        "model.layers.3.self_attn.q_proj.weight": torch.zeros(2, 2),
        # the layer before, under the same names
        **{name.replace("3.", "2.", 1): torch.zeros_like(t) for name, t in store.items()},
    }
    found = map_experts(form, PATH, shapes_of(others | store))
    wanted = bank.packed(form)
    assert found.keys() == wanted.keys()
    for name, layout in found.items():
        assert torch.equal(fill(layout, store), wanted[name]), name


def test_names_of_ones_own(rng: torch.Generator) -> None:
    """Rows of gate and up that alternate cannot be seen; an entry says it."""
    bank = Bank.draw(rng)
    mixed = torch.stack([bank.gate, bank.up], 2).flatten(1, 2)
    store = {f"layers.3.x.{n}.both.weight": mixed[n] for n in range(EXPERTS)}
    store |= {f"layers.3.x.{n}.back.weight": bank.down[n] for n in range(EXPERTS)}
    assert map_experts(FORM, PATH, shapes_of(store)) == {}
    names = ExpertNames(gate_up="both", down="back", interleaved=True)
    for form in FORMS.values():
        found = map_experts(form, PATH, shapes_of(store), (names,))
        for name, tensor in bank.packed(form).items():
            assert torch.equal(fill(found[name], store), tensor), (form, name)


@dataclass(frozen=True)
class Fault:
    id: str
    change: Callable[[Tensors], object]
    text: str


def _bad_shape(store: Tensors) -> None:
    store[f"{PATH}.2.w2.weight"] = torch.zeros(HIDDEN, INTERMEDIATE + 1)


def _all_too_wide(store: Tensors) -> None:
    for number in range(EXPERTS):
        store[f"{PATH}.{number}.w2.weight"] = torch.zeros(HIDDEN, INTERMEDIATE + 1)


FAULTS = (
    Fault("missing", lambda s: s.pop(f"{PATH}.2.w3.weight"), rf"lacks.*{PATH}\.2\.w3\.weight"),
    Fault(
        "two-missing",
        lambda s: (s.pop(f"{PATH}.1.w1.weight"), s.pop(f"{PATH}.4.w1.weight")),
        rf"lacks.*{PATH}\.1\.w1\.weight and 1 more",
    ),
    Fault(
        "one-too-many",
        lambda s: s.update({f"{PATH}.5.w1.weight": torch.zeros(INTERMEDIATE, HIDDEN)}),
        rf"{PATH}\.5\.w1\.weight.*5 experts",
    ),
    Fault("one-shape", _bad_shape, rf"{PATH}\.2\.w2\.weight has shape \(6, 5\)"),
    Fault("all-shapes", _all_too_wide, r"shape \(5, 6, 5\).*ask for \(5, 6, 4\)"),
    Fault(
        "doubled",
        lambda s: s.update({f"{PATH}.local.2.w1.weight": torch.zeros(INTERMEDIATE, HIDDEN)}),
        "expert 2 .* is there twice",
    ),
    Fault(
        "stacked-too",
        lambda s: s.update({f"{PATH}.w1.weight": torch.zeros(EXPERTS, INTERMEDIATE, HIDDEN)}),
        "are there twice",
    ),
    Fault(
        "bias",
        lambda s: s.update({f"{PATH}.0.w1.bias": torch.zeros(INTERMEDIATE)}),
        r"w1\.bias is a bias",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_faults_are_named(fault: Fault, rng: torch.Generator) -> None:
    store = each("w1", "w3", "w2", PATH)(Bank.draw(rng), FORM)
    fault.change(store)
    with pytest.raises(ValueError, match=fault.text):
        map_experts(FORM, PATH, shapes_of(store))


def test_biases_that_are_missing(rng: torch.Generator) -> None:
    store = each("w1", "w3", "w2", PATH)(Bank.draw(rng), FORM)
    with pytest.raises(ValueError, match="the checkpoint has none"):
        map_experts(replace(FORM, has_bias=True), PATH, shapes_of(store))


def test_what_looks_like_an_expert() -> None:
    for name in (f"{PATH}.0.w1.weight", "experts.3.up", "l.1.shared_experts.up_proj.weight"):
        assert looks_like_expert(name)
    for name in ("model.layers.0.mlp.gate.weight", "model.embed_tokens.weight", "expertise.0"):
        assert not looks_like_expert(name)
