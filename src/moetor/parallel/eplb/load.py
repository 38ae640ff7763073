"""How often a layer's router chooses each expert, counted on the device.

Shape letters: T tokens, K top_k, E logical experts, W passes that are remembered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetor.parallel.config import EplbConfig


class ExpertLoad:
    """Choices per expert in the last `window` passes of a layer; a pass is one `count`.

    Nothing waits for the host, and a captured graph counts at every replay.

    Args:
        num_experts: E.
        config: window and decay.
        counts: whether this rank counts at all: another one may see the same tokens.
    """

    def __init__(self, num_experts: int, config: EplbConfig, *, counts: bool = True) -> None:
        self.num_experts = num_experts
        self.window = config.window
        self.decay = config.decay
        self._counts = counts
        self._passes: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def count(self, ids_TK: Tensor) -> None:
        """Notes one pass; dropped slots (E) do not count."""
        if not self._counts:
            return
        device = ids_TK.device
        if device not in self._passes:
            with torch.inference_mode(False):  # else they could not be changed outside of it
                counts_WE = torch.zeros((self.window, self.num_experts + 1), dtype=torch.int32)
                place = torch.zeros(1, dtype=torch.long)
                self._passes[device] = counts_WE.to(device), place.to(device)
        counts_WE, place = self._passes[device]
        ids = ids_TK.flatten().long()
        row_E = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=device)
        row_E.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        counts_WE.index_copy_(0, place, row_E.unsqueeze(0))
        place.add_(1).remainder_(self.window)

    def read(self) -> Tensor:
        """Loads float64 [E], on the host: the passes' counts, each older one times `decay`."""
        total = torch.zeros(self.num_experts, dtype=torch.float64)
        for counts_WE, place in self._passes.values():
            newest_first = (place.cpu() - 1 - torch.arange(self.window)) % self.window
            ages = torch.arange(self.window, dtype=torch.float64)
            counts = counts_WE.cpu()[newest_first, : self.num_experts].double()
            total += (counts * (self.decay**ages).unsqueeze(1)).sum(dim=0)
        return total

    def clear(self) -> None:
        """Forgets all passes."""
        for counts_WE, _ in self._passes.values():
            counts_WE.zero_()
