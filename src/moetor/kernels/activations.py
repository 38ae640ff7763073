"""The activation between the two products, in plain torch. Shared by the reference and the torch
kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.config import Activation


def split_gate_up(up_XJ: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up halves [..., I] of the first product's output [..., 2 I]."""
    if interleaved:
        return up_XJ[..., 0::2], up_XJ[..., 1::2]
    gate, up = up_XJ.chunk(2, dim=-1)
    return gate, up


def _pointwise(x: Tensor, activation: Activation) -> Tensor:
    if activation.function is not None:
        result: Tensor = activation.function(x)
        return result
    match activation.name:
        case "silu":
            return F.silu(x) if activation.alpha == 1.0 else x * torch.sigmoid(activation.alpha * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()


def activate(
    up_XJ: Tensor, activation: Activation, *, gated: bool = True, interleaved: bool = False
) -> Tensor:
    """`[..., J] -> [..., I]` in the dtype of the input; the formula is that of
    `moetor.config.Activation`.
    """
    limit = activation.limit
    if not gated:
        if limit is not None and activation.limit_place == "before":
            up_XJ = up_XJ.clamp(max=limit)
        out = _pointwise(up_XJ, activation)
        if limit is not None and activation.limit_place == "after":
            out = out.clamp(max=limit)
        return out
    gate, up = split_gate_up(up_XJ, interleaved=interleaved)
    if limit is not None and activation.limit_place == "before":
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if activation.softcap is not None:
        cap, up_cap = activation.softcap, activation.up_softcap or activation.softcap
        capped_up = up_cap * torch.tanh(up / up_cap)
        return cap * torch.tanh(gate / cap) * torch.sigmoid(gate) * capped_up
    out = _pointwise(gate, activation)
    if limit is not None and activation.limit_place == "after":
        out, up = out.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return out * (up + activation.up_shift if activation.up_shift else up)
