"""The gate product. Shape letters: T tokens, E router logits, H hidden."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moetor.config import Precision


def gate_product(
    hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, precision: Precision
) -> Tensor:
    """`hidden @ weight.T + bias` [T, E].

    In float32 when `precision` is "float32" (as DeepSeek's routers), else in the hidden states'
    dtype.
    """
    if precision == "float32":
        hidden_TH, weight_EH = hidden_TH.float(), weight_EH.float()
        bias_E = None if bias_E is None else bias_E.float()
    return F.linear(hidden_TH, weight_EH, bias_E)
