"""Routed experts with quantised weights for many tokens on NVIDIA GPUs: slots sorted by expert,
input rows rounded, two grouped matrix products, one sum. No host synchronisation.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, R rows of all tiles; N
outputs and D depth of a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetor.config import Activation, ExpertsConfig
from moetor.kernels.activations import activate
from moetor.kernels.formats import (
    QuantizedExpertWeights,
    QuantizedMatrix,
)
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import (
    IDENTITY,
    ActivationConstants,
    LargePlan,
    activation_constants,
    cdiv,
    large_plan,
)
from moetor.kernels.triton.choose_quantized import (
    QuantizedLargePlan,
    operands,
    quantized_large_plan,
    use_workspace,
)
from moetor.kernels.triton.dequantized import dequantized
from moetor.kernels.triton.large import launch_down, rows_operand, run_up
from moetor.kernels.triton.quantize_rows import RUNS, Rows, new_rows, quantize
from moetor.kernels.triton.quantized_operands import form_of, read_as
from moetor.kernels.triton.sort import RowTiles, make_row_tiles
from moetor.kernels.triton.weighted_sum import launch_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What all launches of a call need."""

    weights: QuantizedExpertWeights
    config: ExpertsConfig
    plan: QuantizedLargePlan
    made: RowTiles
    topk_weights: Tensor


def run_large_quantized(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    plan: QuantizedLargePlan,
) -> Tensor:
    """All launches, with the tiles of `plan`, on inputs that are known to be right."""
    out_TH = torch.empty_like(hidden_TH)
    if topk_ids_TK.shape[0] == 0:
        return out_TH
    # Contiguous copies live until the call is over; most routers make contiguous tensors anyway.
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    with support.on_device_of(hidden_TH):
        made = make_row_tiles(topk_ids_TK, config.num_experts, plan.up.tile.rows, pdl=plan.pdl)
        call = _Call(
            weights=weights, config=config, plan=plan, made=made, topk_weights=topk_weights_TK
        )
        x = _rounded(call, weights.gate_up, hidden_TH, tokens=True)
        activated = _activated(call, x, hidden_TH.dtype)
        rows_RH = hidden_TH.new_empty((made.rows, config.hidden_size))
        _launch_down(call, activated, rows_RH)
        launch_sum(rows_RH, topk_weights_TK, weights.post_norm, config, made, out_TH, pdl=plan.pdl)
    return out_TH


def _rounded(call: _Call, matrix: QuantizedMatrix, x_SD: Tensor, *, tokens: bool) -> Rows:
    """A product's input as its activation format says."""
    if call.weights.activation_format == "unquantized":
        return Rows(x_SD, x_SD, by_token=tokens)
    weighted = tokens and call.config.weight_on_input
    return quantize(
        x_SD,
        call.weights.activation_format,
        call.made,
        tile_rows=call.plan.up.tile.rows,
        tokens=tokens,
        input_scales=matrix.input_scales,
        weights_TK=call.topk_weights if weighted else None,
        pdl=call.plan.pdl,
    )


def _activated(call: _Call, x: Rows, dtype: torch.dtype) -> Rows:
    """The second product's input: rounded by the tiles of the first one where each of these sees
    all values of a scale, else by a launch of its own. A Python activation runs between."""
    config, activations = call.config, call.weights.activation_format
    rows, width = call.made.rows, config.intermediate_size
    device = x.values.device
    if config.activation.function is not None:
        up_RJ = torch.empty((rows, config.up_size), dtype=dtype, device=device)
        plain = replace(
            config, gated=False, intermediate_size=config.up_size, activation=Activation()
        )
        _launch_up(call, x, plain, IDENTITY, up_RJ, None)
        act_RI = activate(up_RJ, config.activation, gated=config.gated, interleaved=False)
        return _rounded(call, call.weights.down, act_RI.contiguous(), tokens=False)
    constants = activation_constants(config.activation)
    run = RUNS.get(activations, 0)
    fused = activations == "fp8_static" or (run > 0 and call.plan.up.tile.columns % run == 0)
    if fused:
        values, scales = new_rows(rows, width, activations, device)
        _launch_up(call, x, config, constants, values, scales)
        return Rows(values, scales, by_token=False)
    act_RI = torch.empty((rows, width), dtype=dtype, device=device)
    _launch_up(call, x, config, constants, act_RI, None)
    return _rounded(call, call.weights.down, act_RI, tokens=False)


def _launch_up(
    call: _Call,
    x: Rows,
    config: ExpertsConfig,
    constants: ActivationConstants,
    act_RI: Tensor,
    act_scales: Tensor | None,
) -> None:
    """The first product and its activation, in the form `config`.

    Args:
        act_scales: where the tiles round their results to codes.
    """
    from moetor.kernels.triton import large_quantized_kernels

    plan, made, matrix = call.plan.up, call.made, call.weights.gate_up
    tile, activations = plan.tile, call.weights.activation_format
    form = form_of(matrix.format, activations, x.values.dtype)
    operands = read_as(matrix, plan, form)
    blocks = cdiv(config.intermediate_size, tile.columns)
    steps = call.weights.down.input_scales
    large_quantized_kernels.large_quantized_up[(made.tiles * blocks,)](
        x.values,
        x.scales,
        x.values.shape[0],
        *operands.tensors,
        support.flat(call.weights.gate_up_bias, x.scales),
        act_RI,
        x.scales if act_scales is None else act_scales,
        made.rows,
        x.scales if steps is None else steps,
        call.topk_weights,
        made.order,
        made.expert,
        made.used,
        made.place.numel(),
        K=made.place.shape[1],
        H=config.hidden_size,
        I=config.intermediate_size,
        GATED=config.gated,
        BY_TOKEN=x.by_token,
        HAS_BIAS=call.weights.gate_up_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input and activations == "unquantized",
        ACT=constants,
        OUT="plain" if act_scales is None else activations,
        FORM=form,
        TMA=operands.tma,
        SWAP=plan.swap,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        HALVES=tile.halves,
        PDL=call.plan.pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **support.chained(call.plan.pdl),
    )


def _launch_down(call: _Call, x: Rows, rows_RH: Tensor) -> None:
    """The second product, for every row of every tile."""
    from moetor.kernels.triton import large_quantized_kernels

    plan, made, matrix = call.plan.down, call.made, call.weights.down
    tile, config = plan.tile, call.config
    form = form_of(matrix.format, call.weights.activation_format, x.values.dtype)
    operands = read_as(matrix, plan, form)
    described_rows = None if matrix.format.packed else rows_operand(x.values, plan.tile)
    programs = made.tiles * cdiv(config.hidden_size, tile.columns)
    if tile.persistent:
        programs = min(programs, tile.persistent)
    large_quantized_kernels.large_quantized_down[(programs,)](
        x.values if described_rows is None else described_rows,
        x.scales,
        x.values.shape[0],
        *operands.tensors,
        support.flat(call.weights.down_bias, rows_RH),
        rows_RH,
        made.order,
        made.expert,
        made.used,
        made.place.numel(),
        H=config.hidden_size,
        I=config.intermediate_size,
        HAS_BIAS=call.weights.down_bias is not None,
        FORM=form,
        TMA=operands.tma,
        TMA_ROWS=described_rows is not None,
        SWAP=plan.swap,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        PERSISTENT=tile.persistent > 0,
        HALVES=tile.halves,
        PDL=call.plan.pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **support.chained(call.plan.pdl),
    )


def run_dequantized(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    plan: LargePlan,
) -> Tensor:
    """Each matrix as numbers in a workspace, one after the other, and the products of unquantised
    weights: where an expert has many rows, its codes would be turned into numbers for each tile of
    them."""
    out_TH, dtype = torch.empty_like(hidden_TH), hidden_TH.dtype
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    with support.on_device_of(hidden_TH):
        made = make_row_tiles(topk_ids_TK, config.num_experts, plan.up.rows, pdl=plan.pdl)
        matrix_EXY = dequantized(weights.gate_up, dtype)
        up = (matrix_EXY, weights.gate_up_bias)
        act_RI = run_up(hidden_TH, topk_weights_TK, *up, config, plan, made)
        del up, matrix_EXY  # the second one may take its memory
        matrix_EXY = dequantized(weights.down, dtype)
        rows_RH = hidden_TH.new_empty((made.rows, config.hidden_size))
        launch_down(act_RI, matrix_EXY, weights.down_bias, config, plan, made, rows_RH)
        launch_sum(rows_RH, topk_weights_TK, weights.post_norm, config, made, out_TH, pdl=plan.pdl)
    return out_TH


def run_planned(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    *,
    batch_invariant: bool,
) -> Tensor:
    """All launches with computed tiles; with `batch_invariant` one plan serves any number of
    tokens."""
    tokens, top_k = topk_ids_TK.shape
    activations, size = weights.activation_format, hidden_TH.element_size()
    gated = config.gated and config.activation.function is None
    up = operands(weights.gate_up.format, activations, size, gated=gated)
    down = operands(weights.down.format, activations, size, gated=False)
    device = support.device_of(hidden_TH)
    inputs = (hidden_TH, topk_weights_TK, topk_ids_TK)
    if not batch_invariant and use_workspace(config, top_k, tokens, up, down, activations):
        plain = large_plan(config, top_k, tokens, size, device)
        return run_dequantized(*inputs, weights, config, plain)
    asked = None if batch_invariant else tokens
    plan = quantized_large_plan(config, top_k, asked, up, down, device)
    return run_large_quantized(*inputs, weights, config, plan)
