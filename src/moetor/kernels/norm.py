"""The norm of each expert's output. Shape letters: S rows, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.config import ExpertsConfig


def post_expert_norm(out_SH: Tensor, weight_H: Tensor, config: ExpertsConfig) -> Tensor:
    """RMS norm with a weight, in the dtype of its input (float32 or float64).

    `scale_first`: x * w is normalised (Muse Spark); otherwise the normalised x is multiplied by w.
    """
    assert config.post_norm_eps is not None, "asked for a form that has the norm"
    scale_first = config.post_norm_order == "scale_first"
    if scale_first:
        out_SH = out_SH * weight_H
    mean = out_SH.square().mean(dim=-1, keepdim=True)
    out_SH = out_SH * torch.rsqrt(mean + config.post_norm_eps)
    return out_SH if scale_first else out_SH * weight_H
