"""Random weights under which every part of a block matters.

Transformers' own initialisation leaves routers near zero, biases at zero and norms at one, so that
a forgotten bias or a router that is never asked would not show. Shape letters: E experts, H
hidden, I intermediate.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

# Biases that select experts, and their spread: of the order of the scores.
_SELECTION = re.compile(r"(e_score_correction_bias|expert_bias|balancing_biases)$")
_SELECTION_STD = {"balancing_biases": 0.06}
_TABLE = re.compile(r"tid2eid$")
# Experts and routers are wider than the fan-in asks for: clamps act and choices differ.
_EXPERTS_GAIN = 1.5
_ROUTER_GAIN = 1.5
_NOISE = 0.2


def randomise(model: nn.Module, seed: int) -> None:
    """Gives every parameter and every selection bias of the model new random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, module in model.named_modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in done:
                continue
            done.add(id(tensor))
            path = f"{name}.{own}"
            is_parameter = own in module._parameters
            with torch.no_grad():
                if _TABLE.search(path):
                    _fill_table(tensor, model, generator)
                elif _SELECTION.search(path):
                    bias = _normal(tensor, _SELECTION_STD.get(own, 0.3), generator)
                    tensor.copy_(bias - bias.mean())  # some of them negative
                elif is_parameter and tensor.is_floating_point():
                    _fill(module, own, path, tensor, generator)


def _fill(module: nn.Module, own: str, path: str, tensor: Tensor, rng: torch.Generator) -> None:
    if isinstance(module, nn.Embedding):
        tensor.copy_(_normal(tensor, 1.0, rng))
    elif tensor.dim() == 3 and own.startswith(("gate_up_proj", "up_proj", "down_proj")):
        fan_in = tensor.shape[1 if getattr(module, "is_transposed", False) else 2]
        tensor.copy_(_normal(tensor, _EXPERTS_GAIN * fan_in**-0.5, rng))
    elif tensor.dim() == 2 and own == "weight":
        gain = _ROUTER_GAIN if re.search(r"(router|gate|\bwg)(\.[a-z_0-9]+)*\.weight$", path) else 1
        tensor.copy_(_normal(tensor, gain * max(1, tensor.shape[1]) ** -0.5, rng))
    else:
        # Norms, biases, convolutions, state spaces: as Transformers made them, and not quite.
        tensor.add_(_normal(tensor, _NOISE, rng))


def _normal(like: Tensor, std: float, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng) * std


def _fill_table(table: Tensor, model: Any, rng: torch.Generator) -> None:
    """Distinct experts per token id."""
    experts = model.config.get_text_config().num_local_experts
    order = torch.rand((table.shape[0], experts), generator=rng).argsort(dim=-1)
    table.copy_(order[:, : table.shape[1]])


def copy_rounded(exact: Any, rounded: Any) -> None:
    """Gives a model of a smaller dtype the values of a float32 one, as loading a checkpoint would:
    what the family keeps in float32 is float32 again, and not rounded."""
    kept = getattr(rounded, "_keep_in_fp32_modules_strict", None) or ()
    # the names are globs that may match anywhere in a path, as in Transformers' own loading
    keep = re.compile("|".join(part.replace("*", ".*") for part in kept) or r"$^")
    for name, module in rounded.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and keep.search(f"{name}.{own}"):
                parameter.data = parameter.data.float()
        for own, buffer in module._buffers.items():
            if buffer is not None and keep.search(f"{name}.{own}"):
                module._buffers[own] = buffer.float()
    rounded.load_state_dict(exact.state_dict())
