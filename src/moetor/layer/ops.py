"""The custom ops: what `torch.compile` and CUDA graphs see of a MoE layer.

Each is one opaque node in a graph, with a fake implementation, and mutates nothing. Weights are not
arguments: the layer is found by its name. Shape letters: T tokens, K top_k, E router logits, H
hidden (of the experts), S hidden (of the shared experts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.layer.context import find_layer, get_forward_context
from moetor.layer.recording import replay_choice

if TYPE_CHECKING:
    from moetor.layer.moe import MoELayer
    from moetor.layer.parts import RowPart


@torch.library.custom_op("moetor::moe_forward", mutates_args=())
def moe_forward(hidden_TH: Tensor, logits_TE: Tensor, layer_name: str) -> Tensor:
    """Routes by the logits and runs the routed experts: [T, H].

    Under sequence parallelism the logits are those of all ranks' tokens, which tells how many of
    this rank's rows are tokens.
    """
    layer = cast("MoELayer", find_layer(layer_name))
    return layer.runner.run_routed(layer, hidden_TH, logits_TE)


@moe_forward.register_fake
def _(hidden_TH: Tensor, logits_TE: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(hidden_TH)


@torch.library.custom_op("moetor::moe_forward_shared", mutates_args=())
def moe_forward_shared(
    hidden_TH: Tensor, shared_TS: Tensor, logits_TE: Tensor, layer_name: str
) -> tuple[Tensor, Tensor]:
    """The same with the shared experts on `shared_TS`: (shared [T, S], routed [T, H])."""
    layer = cast("MoELayer", find_layer(layer_name))
    return layer.runner.run_both(layer, hidden_TH, shared_TS, logits_TE)


@moe_forward_shared.register_fake
def _(
    hidden_TH: Tensor, shared_TS: Tensor, logits_TE: Tensor, layer_name: str
) -> tuple[Tensor, Tensor]:
    shared = torch.empty_like(shared_TS, memory_format=torch.contiguous_format)
    return shared, torch.empty_like(hidden_TH)


@torch.library.custom_op("moetor::transformers_moe_forward", mutates_args=())
def transformers_moe_forward(
    hidden_TH: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, layer_name: str
) -> Tensor:
    """The routed experts for a routing made outside, by Transformers or a callable: [T, H]."""
    layer = find_layer(layer_name)
    routing = Routing(topk_weights_TK.float(), topk_ids_TK.to(torch.int32))
    context = get_forward_context()
    if context.replay is not None:
        ids_TK = context.replay.take(layer_name, hidden_TH.shape[0])
        routing = replay_choice(layer_name, ids_TK, routing)
    layer.runner.note_choice(layer, routing)
    return layer.runner.run_experts(layer, hidden_TH, routing)


@transformers_moe_forward.register_fake
def _(hidden_TH: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(hidden_TH)


@torch.library.custom_op("moetor::rows_forward", mutates_args=())
def rows_forward(
    rows_TX: Tensor, part: str, width: int, dtype: torch.dtype, layer_name: str
) -> Tensor:
    """A part of a batch-invariant layer on rows [T, X], in blocks of fixed size: [T, width]."""
    layer = cast("MoELayer", find_layer(layer_name))
    return layer.in_blocks(cast("RowPart", part), rows_TX, width)


@rows_forward.register_fake
def _(rows_TX: Tensor, part: str, width: int, dtype: torch.dtype, layer_name: str) -> Tensor:
    return rows_TX.new_empty((rows_TX.shape[0], width), dtype=dtype)
