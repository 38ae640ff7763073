"""The gate product. Shape letters: T tokens, E router logits, H hidden."""

from __future__ import annotations

from torch import Tensor

from moetor.config import Precision
from moetor.kernels import dense


def gate_product(
    hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, precision: Precision
) -> Tensor:
    """`hidden @ weight.T + bias` [T, E].

    In float32 when `precision` is "float32" (as DeepSeek's routers), else in the hidden states'
    dtype.
    """
    if precision == "float32":
        return dense.linear_float32(hidden_TH, weight_EH, bias_E)
    return dense.linear(hidden_TH, weight_EH, bias_E)
