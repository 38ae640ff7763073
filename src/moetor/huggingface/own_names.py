"""A fused block's experts under the names that its original gives them, in `state_dict` and when
one is loaded.

Experts that were packed stand in the module as packed parameters; what is saved and loaded has the
tensors of the original.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moetor.huggingface.split_experts import SplitExperts


def keep_own_names(block: nn.Module, split: SplitExperts, experts: str) -> None:
    """Makes a fused block save and load its experts as its original does.

    Args:
        experts: name of the packed experts below the block.
    """
    block.register_state_dict_post_hook(_Save(split, experts))
    block.register_load_state_dict_pre_hook(_Load(split, experts))


class _Save:
    """After `state_dict`: the original's tensors, views of the packed ones where they can be."""

    def __init__(self, split: SplitExperts, experts: str) -> None:
        self.split = split
        self.experts = experts

    def __call__(self, _: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        """Replaces the packed tensors; quantised ones have no own names."""
        if any(f"{prefix}{self.experts}.{slot.packed}" not in state for slot in self.split.slots):
            return
        for slot in self.split.slots:
            packed = state[f"{prefix}{self.experts}.{slot.packed}"]
            state[f"{prefix}{slot.path}"] = slot.take(packed)
        for name in {slot.packed for slot in self.split.slots}:
            del state[f"{prefix}{self.experts}.{name}"]


class _Load:
    """Before a state is loaded: the packed tensors from the original's."""

    def __init__(self, split: SplitExperts, experts: str) -> None:
        self.split = split
        self.experts = experts

    def __call__(
        self,
        module: nn.Module,
        state: dict[str, Tensor],
        prefix: str,
        _: Any,
        __: bool,
        missing: list[str],
        ___: list[str],
        errors: list[str],
    ) -> None:
        """Packs what is there; what is not there keeps its value and is named."""
        experts = module.get_submodule(self.experts)
        for name in dict.fromkeys(slot.packed for slot in self.split.slots):
            held = experts._parameters.get(name)
            if held is None:
                return
            packed = held.detach().clone()
            for slot in (slot for slot in self.split.slots if slot.packed == name):
                value = state.pop(f"{prefix}{slot.path}", None)
                wanted = slot.take(packed)
                if value is None:
                    missing.append(f"{prefix}{slot.path}")
                elif value.shape != wanted.shape:
                    errors.append(
                        f"size mismatch for {prefix}{slot.path}: {tuple(value.shape)} in the "
                        f"state, {tuple(wanted.shape)} in the model"
                    )
                else:
                    slot.put(packed, value)
            state[f"{prefix}{self.experts}.{name}"] = packed
