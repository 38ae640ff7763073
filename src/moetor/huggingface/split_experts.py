"""Experts that a block does not hold packed: a table of descriptions, and packing them once.

A description says where the weights of an expert's products stand below the block. To add a way of
naming experts, add a line to `SPLIT_FORMS`. Shape letters: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from moetor.config import ExpertsConfig
from moetor.huggingface.experts_form import Unrecognised
from moetor.kernels.base import ExpertWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitForm:
    """Where a block's expert weights stand: paths below the block, `*` for the expert's number.

    A path names a module with a `weight`, and perhaps a `bias`, or a parameter.

    Attributes:
        gate, up: the first product's halves, [I, H] for each expert; no gate: not gated.
        gate_up: both in one, [E, 2 I, H], gate first.
        down: the second product, [H, I] for each expert, or [E, H, I].
        flat: `gate`, `up` and `down` are matrices [E * I, H] of all experts, down transposed.
        transposed: `gate_up` and `down` are [E, H, 2 I] and [E, I, H].
        output_bias: name of a vector [H] of the block that is added to its output.
    """

    gate: str = ""
    up: str = ""
    gate_up: str = ""
    down: str
    flat: bool = False
    transposed: bool = False
    output_bias: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """All that are given."""
        return tuple(path for path in (self.gate, self.up, self.gate_up, self.down) if path)


SPLIT_FORMS: tuple[SplitForm, ...] = (
    # the modules of DeepSeek, Qwen and most files of one's own
    SplitForm(gate="experts.*.gate_proj", up="experts.*.up_proj", down="experts.*.down_proj"),
    # Mixtral, Phi-MoE
    SplitForm(gate="experts.*.w1", up="experts.*.w3", down="experts.*.w2"),
    # Grok-1
    SplitForm(gate="experts.*.linear", up="experts.*.linear_v", down="experts.*.linear_1"),
    # without a gate: NLLB and BERT style; Switch Transformers
    SplitForm(up="experts.*.fc1", down="experts.*.fc2"),
    SplitForm(up="experts.expert_*.wi", down="experts.expert_*.wo"),
    # DBRX
    SplitForm(gate="experts.mlp.w1", up="experts.mlp.v1", down="experts.mlp.w2", flat=True),
    # JetMoE; Granite and Aria in older releases of Transformers
    SplitForm(gate_up="input_linear", down="output_linear", output_bias="bias"),
    SplitForm(gate_up="experts.fc1", down="experts.fc2", transposed=True),
)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one of the block's own tensors is in the packed ones.

    Attributes:
        path: of the block's tensor, below the block.
        packed: name of the packed parameter.
        expert: the row that it fills, or None for all of them.
        rows: of the first product's rows, or None for all.
        flat: it is a matrix [E * I, H]; with `turned`, of the second product.
    """

    path: str
    packed: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    flat: bool = False
    turned: bool = False

    @property
    def whole(self) -> bool:
        """Whether the block's own tensor is the packed one."""
        return self.expert is None and self.rows is None and not self.flat

    def view(self, packed: Tensor) -> Tensor:
        """The part of the packed tensor that is this slot's."""
        part = packed if self.expert is None else packed[self.expert]
        if self.rows is not None:
            axis = part.dim() - (1 if self.packed.endswith("_bias") else 2)
            part = part.narrow(axis, self.rows[0], self.rows[1] - self.rows[0])
        return part.transpose(-1, -2) if self.turned else part

    def take(self, packed: Tensor) -> Tensor:
        """The block's own tensor, a view where there can be one."""
        part = self.view(packed)
        return part.reshape(-1, part.shape[-1]) if self.flat else part

    def put(self, packed: Tensor, value: Tensor) -> None:
        """Writes the block's own tensor into the packed one."""
        part = self.view(packed)
        part.copy_(value.reshape(part.shape))


@dataclass(frozen=True, kw_only=True)
class SplitExperts:
    """A block's experts as a description found them.

    Attributes:
        config: the form in which they are packed; without an activation until it is looked for.
        slots: of every tensor.
        children: names of the block's children that they are.
    """

    form: SplitForm
    config: ExpertsConfig
    slots: tuple[Slot, ...]
    children: tuple[str, ...]

    @property
    def name(self) -> str:
        """Under which the packed experts are registered in a fused block."""
        return "experts"

    @property
    def only_whole(self) -> str:
        """Why they are not fused without their block."""
        return f"its experts ({', '.join(self.form.paths)}) can only be fused with their block"

    def pack(self, block: nn.Module) -> ExpertWeights:
        """The packed weights: a copy, or the block's own tensors where they are packed already."""
        names = dict.fromkeys(slot.packed for slot in self.slots)
        packed = {name: self._pack_one(block, name) for name in names}
        up = "gate_up_proj" if self.config.gated else "up_proj"
        return ExpertWeights(
            gate_up=packed[up],
            down=packed["down_proj"],
            gate_up_bias=packed.get(f"{up}_bias"),
            down_bias=packed.get("down_proj_bias"),
        )

    def _pack_one(self, block: nn.Module, name: str) -> Tensor:
        slots = [slot for slot in self.slots if slot.packed == name]
        first = tensor_at(block, slots[0].path)
        if slots[0].whole:
            return first
        packed = first.detach().new_empty(self.shapes[name])
        for slot in slots:
            slot.put(packed, tensor_at(block, slot.path).detach())
        return packed

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the packed tensors."""
        config = self.config
        up = "gate_up_proj" if config.gated else "up_proj"
        return {
            up: config.gate_up_shape,
            "down_proj": config.down_shape,
            f"{up}_bias": (config.num_experts, config.up_size),
            "down_proj_bias": (config.num_experts, config.hidden_size),
        }

    def packed_bytes(self, block: nn.Module) -> int:
        """Size of the block's own tensors that packing copies."""
        return sum(tensor_at(block, slot.path).nbytes for slot in self.slots if not slot.whole)

    def release(self, block: nn.Module) -> None:
        """Lets go of the block's own tensors that were copied; its fused form has them."""
        for slot in self.slots:
            if slot.whole:
                continue
            owner, name = _owner(block, slot.path)
            parameter = owner._parameters[name]
            assert parameter is not None, slot.path
            parameter.data = parameter.data.new_empty(0)

    def hand_back(self, block: nn.Module, experts: nn.Module) -> None:
        """Gives the block its tensors again, as `experts` holds them now."""
        for slot in self.slots:
            owner, name = _owner(block, slot.path)
            packed = experts._parameters[slot.packed]
            parameter = owner._parameters[name]
            assert packed is not None, slot.packed
            assert parameter is not None, slot.path
            if slot.whole:
                owner._parameters[name] = packed
            else:
                parameter.data = slot.take(packed.detach())

    def is_whole(self, block: nn.Module) -> Unrecognised | None:
        """Why these are not all that the experts hold, or None."""
        covered = {slot.path for slot in self.slots}
        for child in self.children:
            for name, _ in block.get_submodule(child).named_parameters(prefix=child):
                if name not in covered:
                    return Unrecognised(f"its experts hold {name}, which no description covers")
        return None


def tensor_at(block: nn.Module, path: str) -> Tensor:
    """The parameter at a dotted path below the block."""
    owner, name = _owner(block, path)
    tensor = owner._parameters[name]
    assert tensor is not None, path
    return tensor


def _owner(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent), name


def find_split(block: nn.Module) -> SplitExperts | None:
    """The experts that the block itself holds apart, by the first description that fits."""
    for form in SPLIT_FORMS:
        found = _read_form(block, form)
        if found is not None:
            return found
    return None


def _read_form(block: nn.Module, form: SplitForm) -> SplitExperts | None:
    roles = {role: getattr(form, role) for role in ("gate", "up", "gate_up", "down")}
    paths = {role: _expand(block, path) for role, path in roles.items() if path}
    if not all(paths.values()) or len({len(found) for found in paths.values()}) != 1:
        return None
    weights = {role: [tensor_at(block, path) for path in found] for role, found in paths.items()}
    wanted = 3 if form.gate_up else 2
    if any(t.dim() != wanted for found in weights.values() for t in found):
        return None
    config = _config(block, form, weights)
    if config is None:
        return None
    slots = tuple(_slots(block, form, config, paths))
    children = tuple(dict.fromkeys(path.partition(".")[0] for path in form.paths))
    has_bias = any(slot.packed.endswith("_bias") for slot in slots)
    return SplitExperts(
        form=form, config=replace(config, has_bias=has_bias), slots=slots, children=children
    )


def _expand(block: nn.Module, path: str) -> list[str]:
    """Paths of the parameters that a path with or without a `*` names, in the experts' order."""
    before, star, after = path.partition("*")
    names = [path]
    if star:
        holder, _, prefix = before.rpartition(".")
        try:
            children = block.get_submodule(holder)._modules
        except AttributeError:
            return []
        numbers = [
            int(match[1]) for name in children if (match := re.fullmatch(rf"{prefix}(\d+)", name))
        ]
        if not numbers or len(numbers) != len(children):
            return []
        names = [f"{before}{number}{after}" for number in sorted(numbers)]
    return [found for name in names for found in _parameter(block, name)]


def _parameter(block: nn.Module, name: str) -> list[str]:
    for path in (f"{name}.weight", name):
        try:
            owner, leaf = _owner(block, path)
        except AttributeError:
            continue
        if owner._parameters.get(leaf) is not None:
            return [path]
    return []


def _config(
    block: nn.Module, form: SplitForm, weights: dict[str, list[Tensor]]
) -> ExpertsConfig | None:
    """The packed form; None where the shapes do not fit one another."""
    down = weights["down"][0]
    wanted: tuple[int, ...]
    if form.gate_up:
        first = weights["gate_up"][0]
        experts, one, two = first.shape
        hidden, rows = (one, two) if form.transposed else (two, one)
        wanted = (experts, rows // 2, hidden) if form.transposed else (experts, hidden, rows // 2)
        size = rows // 2
    elif form.flat:
        experts = _flat_experts(block)
        if not experts or down.shape[0] % experts:
            return None
        size, hidden = down.shape[0] // experts, down.shape[1]
        wanted = tuple(weights["up"][0].shape)
    else:
        experts, (size, hidden) = len(weights["up"]), weights["up"][0].shape
        wanted = (hidden, size)
        others = (t.shape for role in ("gate", "up") for t in weights.get(role, ()))
        if any(tuple(shape) != (size, hidden) for shape in others):
            return None
    if any(tuple(t.shape) != wanted for t in weights["down"]):
        return None
    return ExpertsConfig(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=size,
        gated=bool(form.gate or form.gate_up),
        transposed=form.transposed,
    )


def _flat_experts(block: nn.Module) -> int:
    """E of flat weights, which their shapes do not tell."""
    holder = block.get_submodule("experts")
    value = getattr(holder, "num_experts", 0)
    return value if isinstance(value, int) else 0


def _slots(
    block: nn.Module, form: SplitForm, config: ExpertsConfig, paths: dict[str, list[str]]
) -> Iterator[Slot]:
    up = "gate_up_proj" if config.gated else "up_proj"
    size = config.intermediate_size
    halves = {"gate": (0, size), "up": (size, 2 * size) if form.gate else None}
    for role, found in paths.items():
        packed = "down_proj" if role == "down" else up
        for number, path in enumerate(found):
            whole = len(found) == 1 and "*" not in getattr(form, role)
            slot = Slot(
                path,
                packed,
                expert=None if whole else number,
                rows=halves.get(role),
                flat=form.flat,
                turned=form.flat and role == "down",
            )
            yield slot
            bias = path.removesuffix("weight") + "bias"
            if path.endswith(".weight") and _parameter(block, bias):
                yield replace(slot, path=bias, packed=f"{packed}_bias")
