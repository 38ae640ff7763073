"""The last launch of the path for many tokens: a token's rows, weighted and added.

Shape letters: T tokens, K top_k, H hidden, R rows of all tiles.
"""

from __future__ import annotations

from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.kernels.triton import support
from moetor.kernels.triton.choose import next_power_of_2
from moetor.kernels.triton.sort import RowTiles


def launch_sum(
    rows_RH: Tensor,
    topk_weights_TK: Tensor,
    post_norm: Tensor | None,
    config: ExpertsConfig,
    made: RowTiles,
    out_TH: Tensor,
    *,
    pdl: bool,
) -> None:
    """The weighted sum over a token's slots, after the norm of each expert's output if there is
    one."""
    from moetor.kernels.triton import weighted_sum_kernels

    columns = next_power_of_2(config.hidden_size)
    if config.post_norm_eps is None:
        columns = min(1024, columns)
    weighted_sum_kernels.sum_rows[(out_TH.shape[0], -(-config.hidden_size // columns))](
        rows_RH,
        made.place,
        topk_weights_TK,
        support.flat(post_norm, rows_RH),
        out_TH,
        K=topk_weights_TK.shape[1],
        H=config.hidden_size,
        WEIGHT_ON_INPUT=config.weight_on_input,
        EPS=None if config.post_norm_eps is None else float(config.post_norm_eps),
        SCALE_FIRST=config.post_norm_order == "scale_first",
        BN=columns,
        PDL=pdl,
        num_warps=4 if columns <= 2048 else 8,
        **support.chained(pdl),
    )
