"""Routed experts with quantised weights on GPUs with compute capability 9.0, whose matrix
instructions take numbers from registers: tokens copied into expert order, two products that turn
codes into numbers where they multiply them, one sum.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, R rows of all tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.formats import QuantizedExpertWeights, QuantizedMatrix
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import IDENTITY, activation_constants, cdiv
from moetor.kernels.triton.choose_registers import RegisterTile, register_tile
from moetor.kernels.triton.gathered import launch_copy
from moetor.kernels.triton.quantized_operands import form_of, operand_tensors
from moetor.kernels.triton.sort import RowTiles, make_row_tiles
from moetor.kernels.triton.weighted_sum import launch_sum

_BLOCK = 64  # rows of a weight; a program has two of them


def run_registers(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
) -> Tensor:
    """All launches, on inputs that are known to be right and of a form that
    `choose_registers.has_register_form`."""
    out_TH = torch.empty_like(hidden_TH)
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    with support.on_device_of(hidden_TH):
        tiles = (register_tile(config.hidden_size), register_tile(config.intermediate_size))
        made = make_row_tiles(topk_ids_TK, config.num_experts, tiles[0].rows, pdl=True)
        rows_RH = launch_copy(hidden_TH, made, tiles[0].rows, pdl=True)
        act_RI = hidden_TH.new_empty((made.rows, config.intermediate_size))
        call = (topk_weights_TK, made, config)
        up, down = weights.gate_up, weights.down
        _launch(rows_RH, up, weights.gate_up_bias, act_RI, tiles[0], *call, first=True)
        # The copied tokens were read to the end.
        _launch(act_RI, down, weights.down_bias, rows_RH, tiles[1], *call, first=False)
        launch_sum(rows_RH, topk_weights_TK, weights.post_norm, config, made, out_TH, pdl=True)
    return out_TH


def _described(tensor: Tensor, box: list[int]) -> Any:
    """A tensor descriptor with the layout that a box has in shared memory."""
    from triton.experimental.gluon.language import (  # type: ignore[import-not-found, unused-ignore]
        NVMMASharedLayout,
        bfloat16,
        uint8,
    )
    from triton.experimental.gluon.nvidia.hopper import (  # type: ignore[import-not-found, unused-ignore]
        TensorDescriptor,
    )

    kind = bfloat16 if tensor.dtype == torch.bfloat16 else uint8
    return TensorDescriptor.from_tensor(tensor, box, NVMMASharedLayout.get_default_for(box, kind))


def _launch(
    x_RD: Tensor,
    matrix: QuantizedMatrix,
    bias: Tensor | None,
    out: Tensor,
    tile: RegisterTile,
    topk_weights_TK: Tensor,
    made: RowTiles,
    config: ExpertsConfig,
    *,
    first: bool,
) -> None:
    """One product."""
    from moetor.kernels.triton import register_kernels

    values, scales, zeros, row_scales = operand_tensors(matrix)
    packed = matrix.format.packed
    gated = first and config.gated
    last = out.shape[1]
    width = _BLOCK if gated else 2 * _BLOCK
    flat = values.view(-1, values.shape[2])
    if matrix.format.group[1] == 0:
        row_scales = scales
    register_kernels.register_product[(made.tiles * cdiv(last, width),)](
        _described(x_RD, [tile.rows, tile.depth]),
        _described(flat, [_BLOCK, tile.depth // 2 if packed else tile.depth]),
        scales,
        zeros,
        row_scales,
        support.flat(bias, out),
        topk_weights_TK,
        out,
        made.order,
        made.expert,
        made.used,
        made.place.numel(),
        N=values.shape[1],
        D=matrix.depth,
        LAST=last,
        GATED=gated,
        HAS_BIAS=bias is not None,
        WEIGHT_ON_INPUT=first and config.weight_on_input,
        ACT=activation_constants(config.activation) if first else IDENTITY,
        FORM=form_of(matrix.format, "unquantized", x_RD.dtype),
        BM=tile.rows,
        BK=tile.depth,
        STAGES=tile.stages,
        GROUP=tile.group,
        PDL=True,
        num_warps=4,
        **support.chained(True),
    )
