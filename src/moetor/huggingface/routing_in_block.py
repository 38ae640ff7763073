"""Asking a whole block how it routes, where its router alone does not tell: its experts are taken
out, and what stands in their place shows which expert was given how much.

Shape letters: T tokens, K top_k, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetor.huggingface.bare import bare_copy
from moetor.huggingface.experts_form import Unrecognised
from moetor.huggingface.router_trial import (
    BIAS_NAMES,
    PROBE_TOKENS,
    Answer,
    random_like,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockParts:
    """What of a block is replaced for the question.

    Attributes:
        router: name of the router.
        experts: name of the experts: a list of them, or one module that is called with ids and
            weights.
        others: names of children that add something of their own, such as shared experts.
    """

    router: str
    experts: str
    others: Sequence[str] = ()


def ask_block(
    block: nn.Module,
    parts: BlockParts,
    twin_router: nn.Module,
    *,
    num_experts: int,
    hidden_size: int,
    dtype: torch.dtype,
    selection_bias: Tensor | None = None,
) -> Answer | Unrecognised:
    """The routing that the block makes of the answers of `twin_router` to random tokens.

    Args:
        selection_bias: random values for the block's own selection bias, where it has one.
    """
    like = next(twin_router.parameters())
    hidden_TH = random_like(like.new_empty((PROBE_TOKENS, hidden_size), dtype=dtype), "hidden", 1.0)
    twin = _prepare(block, parts, twin_router, like, selection_bias)
    experts = block._modules.get(parts.experts)
    why = f"its block {type(block).__name__} does not show how it routes"
    try:
        with torch.no_grad():
            if isinstance(experts, nn.ModuleList | nn.ModuleDict):
                dense_TE = _by_marks(twin, parts.experts, experts, hidden_TH)
                top_k = int((dense_TE != 0).sum(dim=-1).max())
                weights_TK, ids_TK = dense_TE.topk(max(1, top_k), dim=-1)
            else:
                weights_TK, ids_TK = _by_call(twin, parts.experts, hidden_TH)
    except Exception as failure:  # foreign code may fail in any way on experts that are not there
        return Unrecognised(f"{why} ({type(failure).__name__})")
    if weights_TK.shape != ids_TK.shape or weights_TK.shape[0] != PROBE_TOKENS:
        return Unrecognised(why)
    if int(ids_TK.max()) >= num_experts:
        return Unrecognised(why)
    return Answer(
        hidden_TH=hidden_TH,
        weights_TK=weights_TK,
        ids_TK=ids_TK,
        logits_dtype=dtype,
    )


def _prepare(
    block: nn.Module,
    parts: BlockParts,
    twin_router: nn.Module,
    like: Tensor,
    selection_bias: Tensor | None,
) -> nn.Module:
    """A copy of the block with the random router, and with nothing but its routed output."""
    twin = bare_copy(block)
    twin._modules[parts.router] = twin_router
    for name in parts.others:
        twin._modules[name] = _Nothing()
    for tensors in (twin._parameters, twin._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                zeros: Tensor = torch.zeros(tensor.shape, dtype=tensor.dtype, device=like.device)
                given = selection_bias if name in BIAS_NAMES else None
                tensors[name] = nn.Parameter(zeros if given is None else given, False)
    return twin


class _Nothing(nn.Module):
    """Adds nothing."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden)


class _Mark(nn.Module):
    """An expert that answers with 1 in one column."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        out = torch.zeros_like(hidden)
        if 0 <= self.column < hidden.shape[-1]:
            out[..., self.column] = 1.0
        return out


def _by_marks(
    twin: nn.Module, name: str, experts: nn.ModuleList | nn.ModuleDict, hidden_TH: Tensor
) -> Tensor:
    """The weights [T, E] that the block gives its experts: they mark one column each, as many at
    a time as there are columns.
    """
    width = hidden_TH.shape[1]
    parts = []
    for start in range(0, len(experts), width):
        marks = [_Mark(number - start) for number in range(len(experts))]
        if isinstance(experts, nn.ModuleDict):
            twin._modules[name] = nn.ModuleDict(dict(zip(experts.keys(), marks, strict=True)))
        else:
            twin._modules[name] = nn.ModuleList(marks)
        answer = twin(hidden_TH.unsqueeze(0))
        out = answer[0] if isinstance(answer, tuple) else answer
        parts.append(out.reshape(hidden_TH.shape))
    return torch.cat(parts, dim=1)[:, : len(experts)]


class _Listener(nn.Module):
    """Experts that note what they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.given = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        return torch.zeros_like(hidden)


def _by_call(twin: nn.Module, name: str, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids [T, K] with which the block calls its experts."""
    listener = _Listener()
    experts: Any = twin._modules[name]
    twin._modules[name] = listener
    twin(hidden_TH.unsqueeze(0))
    given: Any = listener.given
    if len(given) == 1 and hasattr(experts, "route_tokens_to_experts"):
        given = experts.route_tokens_to_experts(*given)  # Aria before Transformers 5.20
    first, second = given
    ids, weights = (second, first) if first.is_floating_point() else (first, second)
    if ids.is_floating_point() or not weights.is_floating_point():
        raise TypeError("experts are not called with ids and weights")
    return weights.reshape(-1, weights.shape[-1]), ids.reshape(-1, ids.shape[-1])
