"""Quantised experts for few tokens on NVIDIA GPUs: no launch sorts or pads.

Shape letters: T tokens, K top_k, S = T * K slots, E experts, H hidden, I intermediate, R rows of an
input, D its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.formats import ActivationFormat, QuantizedExpertWeights, QuantizedMatrix
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import activation_constants, cdiv, next_power_of_2
from moetor.kernels.triton.choose_small_quantized import (
    GroupTile,
    QuantizedSmallPlan,
    quantized_small_plan,
)
from moetor.kernels.triton.quantize_rows import RUNS
from moetor.kernels.triton.quantized_operands import operand_tensors

_WIDEST = 2048  # columns of a program that rounds a row which need not be seen whole
_BY_EXPERT: tuple[ActivationFormat, ...] = ("fp8_static",)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What all launches of a call need; `ids` and `topk_weights` are [T, K] and contiguous."""

    weights: QuantizedExpertWeights
    config: ExpertsConfig
    plan: QuantizedSmallPlan
    ids: Tensor
    topk_weights: Tensor

    @property
    def entries(self) -> tuple[int, int]:
        """Columns, and slots of each: a token's slots of one expert differ where their weights
        do."""
        tokens, top_k = self.ids.shape
        return (tokens * top_k, 1) if self.config.weight_on_input else (tokens, top_k)

    def grid(self, tile: GroupTile, rows: int) -> tuple[int]:
        """Programs of a product of `rows` rows of each expert."""
        entries, width = self.entries
        rounds, sharing = 1, self.plan.sharing
        if sharing != "none":
            rounds = cdiv(entries, self.plan.entries) * cdiv(self.plan.entries, tile.tokens)
        units = self.config.num_experts if sharing == "experts" else entries * width
        return (rounds * units * cdiv(rows, tile.rows // tile.parts),)

    def shared_by_slots(self) -> dict[str, Any]:
        """Of a product whose programs find their tokens by themselves."""
        width = self.entries[1]
        return {
            "K": width,
            "KP": next_power_of_2(width),
            "SHARING": self.plan.sharing,
            "TE": self.plan.entries,
        }

    def product(self, matrix: QuantizedMatrix, tile: GroupTile, given: _Input) -> dict[str, Any]:
        """Of every product."""
        kind, config = matrix.format, self.config
        rows, depth = kind.group
        width = matrix.values.shape[2]
        return {
            "E": config.num_experts,
            "H": config.hidden_size,
            "I": config.intermediate_size,
            "FORMAT": (kind.element, depth, max(1, rows), kind.scale, kind.zero_points, width),
            "MODE": tile.mode,
            "X_GROUP": given.group,
            "X_SCALED": given.scaled,
            "BN": tile.rows,
            "BK": tile.depth,
            "TN": tile.tokens,
            "NG": tile.groups,
            "PARTS": tile.parts,
            "STAGES": tile.stages,
            "PDL": self.plan.pdl,
            "num_warps": tile.warps,
        } | support.chained(self.plan.pdl)


def plan_small_quantized(
    hidden_TH: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    weights: QuantizedExpertWeights,
    config: ExpertsConfig,
) -> QuantizedSmallPlan:
    """The computed plan for a call."""
    return quantized_small_plan(
        config,
        topk_ids_TK.shape[1],
        topk_ids_TK.shape[0],
        (weights.gate_up.format, weights.down.format),
        weights.activation_format,
        support.device_of(hidden_TH),
        hidden_TH.dtype,
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
    ids, topk_weights = topk_ids_TK.contiguous(), topk_weights_TK.contiguous()
    call = _Call(weights=weights, config=config, plan=plan, ids=ids, topk_weights=topk_weights)
    slots, top_k = ids.numel(), ids.shape[1]
    act_SI = hidden_TH.new_empty((slots, config.intermediate_size))
    with support.on_device_of(hidden_TH):
        weighted = config.weight_on_input
        by_slot = weighted or weights.activation_format in _BY_EXPERT
        given = _round(
            call,
            hidden_TH,
            weights.gate_up,
            slots_per_row=top_k,
            by_slot=by_slot,
            weighted=weighted,
        )
        _launch_up(call, given, act_SI)
        given = _round(call, act_SI, weights.down, slots_per_row=1, by_slot=True, weighted=False)
        if plan.summed:
            _launch_down_sum(call, given, out_TH)
        else:
            rows_SH = hidden_TH.new_empty((slots, config.hidden_size), dtype=torch.float32)
            _launch_down(call, given, rows_SH)
            _launch_sum(call, rows_SH, out_TH)
    return out_TH


def _round(
    call: _Call,
    x_RD: Tensor,
    matrix: QuantizedMatrix,
    *,
    slots_per_row: int,
    by_slot: bool,
    weighted: bool,
) -> _Input:
    """A product's input, rounded as the activation format says.

    Args:
        slots_per_row: of `x_RD`.
        by_slot: the result has a row for each slot.
        weighted: rows are multiplied with their slots' weights first.
    """
    activations, pdl = call.weights.activation_format, call.plan.pdl
    if activations == "unquantized":
        return _Input(x_RD, x_RD, slots_per_row)
    from moetor.kernels.triton import small_round_kernels

    width, run = x_RD.shape[1], RUNS.get(activations, 0)
    rows = call.ids.numel() if by_slot else x_RD.shape[0]
    rounded = x_RD.new_empty((rows, width), dtype=torch.bfloat16)
    scales = x_RD.new_empty((rows, cdiv(width, run or width)), dtype=torch.float32)
    static = activations == "fp8_static"
    span = max(run, 16, next_power_of_2(width))
    if run or static:
        span = min(span, _WIDEST)
    names: dict[ActivationFormat, str] = {"int8_token": "int8", "mxfp8": "mxfp8"}
    small_round_kernels.round_rows[(rows, cdiv(width, span))](
        x_RD,
        call.ids,
        call.topk_weights,
        x_RD if matrix.input_scales is None else matrix.input_scales,
        rounded,
        scales,
        E=call.config.num_experts,
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


def _launch_up(call: _Call, given: _Input, act_SI: Tensor) -> None:
    from moetor.kernels.triton import small_quantized_kernels

    config, weights, tile = call.config, call.weights, call.plan.up
    small_quantized_kernels.quantized_up[call.grid(tile, config.up_size)](
        given.rows,
        given.scales,
        call.ids,
        call.topk_weights,
        *operand_tensors(weights.gate_up),
        support.flat(weights.gate_up_bias, given.rows),
        act_SI,
        call.entries[0],
        DIV=given.slots_per_row,
        GATED=config.gated,
        HAS_BIAS=weights.gate_up_bias is not None,
        WEIGHT_ON_INPUT=config.weight_on_input and not given.rounded,
        ACT=activation_constants(config.activation),
        ROUNDED=given.rounded,
        **call.shared_by_slots(),
        **call.product(weights.gate_up, tile, given),
    )


def _launch_down(call: _Call, given: _Input, rows_SH: Tensor) -> None:
    from moetor.kernels.triton import small_quantized_kernels

    weights, tile = call.weights, call.plan.down
    small_quantized_kernels.quantized_down[call.grid(tile, call.config.hidden_size)](
        given.rows,
        given.scales,
        call.ids,
        *operand_tensors(weights.down),
        support.flat(weights.down_bias, given.rows),
        rows_SH,
        call.entries[0],
        HAS_BIAS=weights.down_bias is not None,
        **call.shared_by_slots(),
        **call.product(weights.down, tile, given),
    )


def _launch_down_sum(call: _Call, given: _Input, out_TH: Tensor) -> None:
    from moetor.kernels.triton import small_quantized_kernels

    weights, tile, (tokens, top_k) = call.weights, call.plan.down, call.ids.shape
    slots = next_power_of_2(top_k)
    blocks = cdiv(call.config.hidden_size, tile.rows // (slots * tile.parts))
    small_quantized_kernels.quantized_down_sum[(tokens * blocks,)](
        given.rows,
        given.scales,
        call.ids,
        call.topk_weights,
        *operand_tensors(weights.down),
        support.flat(weights.down_bias, given.rows),
        out_TH,
        tokens,
        K=top_k,
        KP=slots,
        HAS_BIAS=weights.down_bias is not None,
        WEIGHT_ON_INPUT=call.config.weight_on_input,
        **call.product(weights.down, tile, given),
    )


def _launch_sum(call: _Call, rows_SH: Tensor, out_TH: Tensor) -> None:
    from moetor.kernels.triton import small_quantized_kernels

    config, norm, (tokens, top_k) = call.config, call.weights.post_norm, call.ids.shape
    columns = next_power_of_2(config.hidden_size)
    if config.post_norm_eps is None:
        columns = min(256, columns)
    grid = (cdiv(config.hidden_size, columns), tokens)
    small_quantized_kernels.quantized_sum[grid](
        rows_SH,
        call.ids,
        call.topk_weights,
        out_TH if norm is None else norm.contiguous(),
        out_TH,
        E=config.num_experts,
        K=top_k,
        KP=next_power_of_2(top_k),
        H=config.hidden_size,
        WEIGHT_ON_INPUT=config.weight_on_input,
        EPS=config.post_norm_eps,
        SCALE_FIRST=config.post_norm_order == "scale_first",
        BN=columns,
        PDL=call.plan.pdl,
        num_warps=4,
        **support.chained(call.plan.pdl),
    )
