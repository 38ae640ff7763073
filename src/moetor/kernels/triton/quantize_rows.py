"""A product's input rounded on the device: codes and scales, or for mxfp8 the rounded numbers.

Shape letters: T tokens, K top_k, E experts, R rows of all tiles, S rows of the input (T or R), D
their width, G scales of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moetor.kernels.formats import ActivationFormat
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import next_power_of_2
from moetor.kernels.triton.sort import RowTiles

RUNS: dict[ActivationFormat, int] = {"fp8_group128": 128, "mxfp8": 32}
"""Values of a row that share a scale, of the formats where these are not all of them."""
_ELEMENTS = 4096  # of a program: 16 float32 a thread of eight warps, and enough bytes in flight
_WIDEST = 2048  # columns of a program where a row need not be seen whole


class Rows(NamedTuple):
    """One product's input.

    Attributes:
        values: [S, D]: float8 e4m3 or int8 codes, or numbers.
        scales: float32 [G, S]; unused where values are numbers.
        by_token: S = T: a row of a tile finds its values by its slot's token.
    """

    values: Tensor
    scales: Tensor
    by_token: bool


def new_rows(
    rows: int, width: int, activations: ActivationFormat, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Memory for values and scales of rounded rows."""
    dtypes = {"int8_token": torch.int8, "mxfp8": torch.bfloat16}
    dtype = dtypes.get(activations, torch.float8_e4m3fn)
    run = RUNS.get(activations, width)
    # mxfp8 puts its scales into its numbers.
    held = 0 if activations == "mxfp8" else rows
    return (
        torch.empty((rows, width), dtype=dtype, device=device),
        torch.empty((-(-width // run), held), dtype=torch.float32, device=device),
    )


def quantize(
    x_SD: Tensor,
    activations: ActivationFormat,
    made: RowTiles,
    *,
    tile_rows: int,
    tokens: bool,
    input_scales: Tensor | None,
    weights_TK: Tensor | None,
    pdl: bool,
) -> Rows:
    """Rounds the rows of a product's input.

    Args:
        x_SD: contiguous, [T, D] of tokens or [R, D] of tile rows.
        made: the sorted slots; padding rows of the result are undefined.
        tile_rows: BM.
        tokens: whether `x_SD` is of tokens. Its result has a row for each token, unless a row
            depends on its expert (`input_scales`) or slot (`weights_TK`).
        input_scales: float32 [E], for `fp8_static`.
        weights_TK: multiplied into a slot's token first.
    """
    from moetor.kernels.triton import quantize_rows_kernels

    width, top_k = x_SD.shape[1], made.place.shape[1]
    static = activations == "fp8_static"
    by_token = tokens and not static and weights_TK is None
    rows = x_SD.shape[0] if by_token else made.rows
    run = RUNS.get(activations, 0)
    codes, scales = new_rows(rows, width, activations, x_SD.device)
    span = max(run, 16, next_power_of_2(width))
    if run or static:
        span = min(span, _WIDEST)
    # A program's rows lie in one tile.
    height = min(16, max(1, _ELEMENTS // span))
    quantize_rows_kernels.quantize_rows[(-(-rows // height), -(-width // span))](
        x_SD,
        codes,
        scales,
        x_SD if input_scales is None else input_scales,
        x_SD if weights_TK is None else weights_TK,
        made.order,
        made.expert,
        made.used,
        rows if by_token else made.place.numel(),
        rows,
        K=top_k,
        D=width,
        RUN=run,
        FORMAT={"int8_token": "int8", "mxfp8": "mxfp8"}.get(activations, "fp8"),
        SOURCE="tokens" if by_token else ("slots" if tokens else "rows"),
        STATIC=static,
        WEIGHTED=weights_TK is not None,
        BM=tile_rows,
        ROWS=height,
        WIDTH=span,
        PDL=pdl,
        num_warps=min(16, max(4, height * span // 1024)),
        **support.chained(pdl),
    )
    return Rows(codes, scales, by_token)
