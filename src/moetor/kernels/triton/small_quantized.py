"""Quantised experts for few tokens on NVIDIA GPUs: no launch sorts or pads.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate, R rows of an
input, D its width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.formats import ActivationFormat, QuantizedExpertWeights, QuantizedMatrix
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import activation_constants, next_power_of_2
from moetor.kernels.triton.choose_small_quantized import (
    RUNS,
    GroupTile,
    QuantizedSmallPlan,
    quantized_small_plan,
)

_WIDEST = 2048  # columns of a program that rounds a row which need not be seen whole
_BY_EXPERT: tuple[ActivationFormat, ...] = ("fp8_static",)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class _Input(NamedTuple):
    """One product's input.

    Attributes:
        rows: [R, D].
        scales: float32 [R, runs] of rounded rows; any tensor where there are none.
        slots_per_row: slots that share a row.
        rounded: whether a launch made it.
        group: values that share a scale; 0: all of a row, or there is none.
        scaled: a row has one scale.
    """

    rows: Tensor
    scales: Tensor
    slots_per_row: int
    rounded: bool = False
    group: int = 0
    scaled: bool = False


def codes_of(tensor: Tensor) -> Tensor:
    """Codes and scales of 8 bits as uint8, whatever they mean."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _round(
    x_RD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    matrix: QuantizedMatrix,
    activations: ActivationFormat,
    experts: int,
    *,
    slots_per_row: int,
    by_slot: bool,
    weighted: bool,
    pdl: bool,
) -> _Input:
    """A product's input, rounded as `activations` says.

    Args:
        slots_per_row: of `x_RD`.
        by_slot: the result has a row for each slot.
        weighted: rows are multiplied with their slots' weights first.
    """
    if activations == "unquantized":
        return _Input(x_RD, x_RD, slots_per_row)
    from moetor.kernels.triton import small_round_kernels

    width, run = x_RD.shape[1], RUNS.get(activations, 0)
    rows = ids_TK.numel() if by_slot else x_RD.shape[0]
    rounded = x_RD.new_empty((rows, width))
    scales = x_RD.new_empty((rows, _cdiv(width, run or width)), dtype=torch.float32)
    static = activations == "fp8_static"
    span = max(run, 16, next_power_of_2(width))
    if run or static:
        span = min(span, _WIDEST)
    names: dict[ActivationFormat, str] = {"int8_token": "int8", "mxfp8": "mxfp8"}
    small_round_kernels.round_rows[(rows, _cdiv(width, span))](
        x_RD,
        ids_TK,
        weights_TK,
        x_RD if matrix.input_scales is None else matrix.input_scales,
        rounded,
        scales,
        E=experts,
        D=width,
        DIV=slots_per_row if by_slot else 1,
        BY_SLOT=by_slot,
        WEIGHTED=weighted,
        FORMAT=names.get(activations, "fp8"),
        RUN=run,
        STATIC=static,
        WIDTH=span,
        PDL=pdl,
        num_warps=8 if span >= 2048 else 4,
        **support.chained(pdl),
    )
    return _Input(
        rounded,
        scales,
        1 if by_slot else slots_per_row,
        rounded=True,
        group=run if activations == "fp8_group128" else 0,
        scaled=run == 0,
    )


def _matrix_arguments(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zero points and scales of rows; any tensor for what a format lacks."""
    scales = codes_of(matrix.scales)
    zeros = scales if matrix.zero_points is None else matrix.zero_points
    rows = scales if matrix.row_scales is None else matrix.row_scales
    return codes_of(matrix.values), scales, zeros, rows


def _product_options(
    matrix: QuantizedMatrix, tile: GroupTile, plan: QuantizedSmallPlan, given: _Input
) -> dict[str, Any]:
    kind = matrix.format
    rows, depth = kind.group
    return {
        "FORMAT": (kind.element, depth, max(1, rows), kind.scale, kind.zero_points),
        "MODE": tile.mode,
        "X_GROUP": given.group,
        "X_SCALED": given.scaled,
        "BN": tile.rows,
        "BK": tile.depth,
        "TN": tile.tokens,
        "NG": tile.groups,
        "PARTS": tile.parts,
        "STAGES": tile.stages,
        "PDL": plan.pdl,
        "num_warps": tile.warps,
    }


def plan_small_quantized(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    tokens: int | None,
) -> QuantizedSmallPlan:
    """The computed plan for a call of `tokens` tokens, or of any number."""
    return quantized_small_plan(
        config,
        topk_ids_TK.shape[1],
        tokens,
        (weights.gate_up.format, weights.down.format),
        weights.activation_format,
        support.device_of(hidden_TH),
        half=hidden_TH.dtype == torch.float16,
        itemsize=hidden_TH.element_size(),
    )


def run_small_quantized(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    plan: QuantizedSmallPlan,
) -> Tensor:
    """All launches, with the tiles of `plan`, on inputs that are known to be right."""
    out_TH = torch.empty_like(hidden_TH)
    if topk_ids_TK.shape[0] == 0:
        return out_TH
    # Contiguous copies live until the call is over.
    topk_weights_TK, topk_ids_TK = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    routing = (topk_ids_TK, topk_weights_TK)
    slots, top_k = topk_ids_TK.numel(), topk_ids_TK.shape[1]
    form, by_slot = weights.activation_format, config.weight_on_input
    act_SI = hidden_TH.new_empty((slots, config.intermediate_size))
    with support.on_device_of(hidden_TH):
        given = _round(
            hidden_TH, *routing, weights.gate_up, form, config.num_experts, slots_per_row=top_k,
            by_slot=by_slot or form in _BY_EXPERT, weighted=by_slot, pdl=plan.pdl,
        )  # fmt: skip
        _launch_up(given, *routing, weights, config, plan, act_SI)
        given = _round(
            act_SI, *routing, weights.down, form, config.num_experts, slots_per_row=1,
            by_slot=True, weighted=False, pdl=plan.pdl,
        )  # fmt: skip
        if plan.summed:
            _launch_down_sum(given, *routing, weights, config, plan, out_TH)
        else:
            rows_SH = hidden_TH.new_empty((slots, config.hidden_size), dtype=torch.float32)
            _launch_down(given, topk_ids_TK, weights, config, plan, rows_SH)
            _launch_sum(rows_SH, *routing, weights, config, plan, out_TH)
    return out_TH


def _grid(
    tile: GroupTile, plan: QuantizedSmallPlan, config: ExpertsConfig, ids: Tensor, rows: int
) -> tuple[int]:
    entries, width = _entries(ids, config)
    rounds = 1
    if plan.sharing != "none":
        rounds = _cdiv(entries, plan.entries) * _cdiv(plan.entries, tile.tokens)
    units = config.num_experts if plan.sharing == "experts" else entries * width
    return (rounds * units * _cdiv(rows, tile.rows // tile.parts),)


def _entries(topk_ids_TK: Tensor, config: ExpertsConfig) -> tuple[int, int]:
    """Columns, and slots of each: a token's slots of one expert differ where their weights do."""
    tokens, top_k = topk_ids_TK.shape
    return (tokens * top_k, 1) if config.weight_on_input else (tokens, top_k)


def _launch_up(
    given: _Input,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    plan: QuantizedSmallPlan,
    act_SI: Tensor,
) -> None:
    from moetor.kernels.triton import small_quantized_kernels

    entries, width = _entries(topk_ids_TK, config)
    grid = _grid(plan.up, plan, config, topk_ids_TK, config.up_size)
    small_quantized_kernels.quantized_up[grid](
        given.rows,
        given.scales,
        topk_ids_TK,
        topk_weights_TK,
        *_matrix_arguments(weights.gate_up),
        support.flat(weights.gate_up_bias, given.rows),
        act_SI,
        entries,
        E=config.num_experts,
        K=width,
        KP=next_power_of_2(width),
        DIV=given.slots_per_row,
        H=config.hidden_size,
        I=config.intermediate_size,
        GATED=config.gated,
        HAS_BIAS=weights.gate_up_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input and not given.rounded,
        ACT=activation_constants(config.activation),
        SHARING=plan.sharing,
        TE=plan.entries,
        ROUNDED=given.rounded,
        **_product_options(weights.gate_up, plan.up, plan, given),
        **support.chained(plan.pdl and given.rounded),
    )


def _launch_down(
    given: _Input,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    plan: QuantizedSmallPlan,
    rows_SH: Tensor,
) -> None:
    from moetor.kernels.triton import small_quantized_kernels

    entries, width = _entries(topk_ids_TK, config)
    grid = _grid(plan.down, plan, config, topk_ids_TK, config.hidden_size)
    small_quantized_kernels.quantized_down[grid](
        given.rows,
        given.scales,
        topk_ids_TK,
        *_matrix_arguments(weights.down),
        support.flat(weights.down_bias, given.rows),
        rows_SH,
        entries,
        E=config.num_experts,
        K=width,
        KP=next_power_of_2(width),
        H=config.hidden_size,
        I=config.intermediate_size,
        HAS_BIAS=weights.down_bias is not None,
        SHARING=plan.sharing,
        TE=plan.entries,
        **_product_options(weights.down, plan.down, plan, given),
        **support.chained(plan.pdl),
    )


def _launch_down_sum(
    given: _Input,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    plan: QuantizedSmallPlan,
    out_TH: Tensor,
) -> None:
    from moetor.kernels.triton import small_quantized_kernels

    (tokens, top_k), slots = topk_ids_TK.shape, next_power_of_2(topk_ids_TK.shape[1])
    blocks = _cdiv(config.hidden_size, plan.down.rows // (slots * plan.down.parts))
    small_quantized_kernels.quantized_down_sum[(tokens * blocks,)](
        given.rows,
        given.scales,
        topk_ids_TK,
        topk_weights_TK,
        *_matrix_arguments(weights.down),
        support.flat(weights.down_bias, given.rows),
        out_TH,
        tokens,
        E=config.num_experts,
        K=top_k,
        KP=slots,
        H=config.hidden_size,
        I=config.intermediate_size,
        HAS_BIAS=weights.down_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input,
        **_product_options(weights.down, plan.down, plan, given),
        **support.chained(plan.pdl),
    )


def _launch_sum(
    rows_SH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
    plan: QuantizedSmallPlan,
    out_TH: Tensor,
) -> None:
    from moetor.kernels.triton import small_quantized_kernels

    (tokens, top_k), hidden = topk_ids_TK.shape, config.hidden_size
    columns = next_power_of_2(hidden)
    if config.post_norm_eps is None:
        columns = min(256, columns)
    small_quantized_kernels.quantized_sum[(_cdiv(hidden, columns), tokens)](
        rows_SH,
        topk_ids_TK,
        topk_weights_TK,
        out_TH if weights.post_norm is None else weights.post_norm.contiguous(),
        out_TH,
        E=config.num_experts,
        K=top_k,
        KP=next_power_of_2(top_k),
        H=hidden,
        WEIGHT_ON_INPUT=config.weight_on_input,
        EPS=config.post_norm_eps,
        SCALE_FIRST=config.post_norm_order == "scale_first",
        BN=columns,
        PDL=plan.pdl,
        num_warps=4,
        **support.chained(plan.pdl),
    )
