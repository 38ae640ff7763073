"""How tokens travel: as they are, or as e4m3 codes with a scale for every 128 values, as in
DeepSeek-V3 (arXiv:2412.19437, 3.3.2). Results travel back as they are.

Shape letters: N rows, H hidden, G runs of 128 values, B bytes of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.kernels.formats import E4M3_MAX

RUN = 128


class Wire(ABC):
    """From tokens to what is sent, and back."""

    @abstractmethod
    def pack(self, hidden_NH: Tensor) -> Tensor:
        """One row of the message per token."""

    @abstractmethod
    def unpack(self, message_NB: Tensor, like: Tensor) -> Tensor:
        """[N, H] from rows that have arrived.

        Args:
            like: tokens of this rank, for width and dtype.
        """


class PlainWire(Wire):
    """Tokens as they are."""

    def pack(self, hidden_NH: Tensor) -> Tensor:
        """The argument itself."""
        return hidden_NH

    def unpack(self, message_NB: Tensor, like: Tensor) -> Tensor:
        """The argument itself."""
        return message_NB


class Fp8Wire(Wire):
    """Rows uint8 [N, H + 4 G]: codes, then float32 scales. A run of zeros has scale 1."""

    def pack(self, hidden_NH: Tensor) -> Tensor:
        """See `Wire.pack`."""
        rows, width = hidden_NH.shape
        padded = F.pad(hidden_NH, (0, -width % RUN)).float()
        runs_NGR = padded.view(rows, -(-width // RUN), RUN)
        largest_NG = runs_NGR.abs().amax(dim=-1)
        scales_NG = torch.where(largest_NG > 0, largest_NG / E4M3_MAX, 1.0)
        codes = (runs_NGR / scales_NG.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
        codes_NH = codes.to(torch.float8_e4m3fn).flatten(1)[:, :width]
        return torch.cat(
            (codes_NH.view(torch.uint8), scales_NG.contiguous().view(torch.uint8)), dim=1
        )

    def unpack(self, message_NB: Tensor, like: Tensor) -> Tensor:
        """See `Wire.unpack`."""
        rows, width = message_NB.shape[0], like.shape[1]
        codes_NH = message_NB[:, :width].view(torch.float8_e4m3fn).float()
        # A copy, for it must begin where a float may.
        scales_NG = message_NB[:, width:].clone(memory_format=torch.contiguous_format)
        scales_NG = scales_NG.view(torch.float32)
        runs_NGR = F.pad(codes_NH, (0, -width % RUN)).view(rows, -(-width // RUN), RUN)
        return (runs_NGR * scales_NG.unsqueeze(-1)).flatten(1)[:, :width].to(like.dtype)
