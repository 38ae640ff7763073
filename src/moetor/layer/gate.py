"""The gate of a layer of one's own.

Shape letters: T tokens, E router logits, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetor.config import RouterConfig
from moetor.kernels.gate import gate_product


class Gate(nn.Module):
    """The gate product [T, H] -> [T, E], with the selection bias that belongs to it.

    Parameters: `weight` [E, H], `bias` [E] or None; buffer `selection_bias` [E] float32 or None.
    """

    def __init__(
        self,
        hidden_size: int,
        router: RouterConfig,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        experts = router.num_logits
        self.precision = router.gate_precision
        self.weight = nn.Parameter(
            torch.randn(experts, hidden_size, device=device, dtype=dtype) * hidden_size**-0.5,
            requires_grad=False,
        )
        self.bias = (
            nn.Parameter(torch.zeros(experts, device=device, dtype=dtype), requires_grad=False)
            if bias
            else None
        )
        made = torch.zeros(experts, device=device) if router.selection_bias else None
        self.register_buffer("selection_bias", made)
        self.selection_bias: Tensor | None

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Router logits [T, E], in float32 or the dtype of the hidden states as the router asks."""
        return gate_product(hidden_TH, self.weight, self.bias, self.precision)
