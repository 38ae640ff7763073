"""The contract of an experts kernel: what it is given, what it is asked, what it answers.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product
(2 I when gated).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moetor.config import ExpertsConfig
from moetor.errors import InputError
from moetor.kernels.formats import QuantizedExpertWeights


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The tensors of the routed experts, in the storage form that their `ExpertsConfig`
    describes.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None


Weights = ExpertWeights | QuantizedExpertWeights
"""What a kernel may be given: which of the two follows from the query's `weight_format`."""


def unquantized(weights: Weights) -> ExpertWeights:
    """The weights of a kernel that reads no quantised ones.

    Raises:
        InputError: they are quantised.
    """
    if isinstance(weights, QuantizedExpertWeights):
        raise InputError(f"this kernel reads unquantised weights, not {weights.weight_format}")
    return weights


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelQuery:
    """The case for which a kernel is sought.

    Attributes:
        device: a device type (`cpu`, `cuda`).
        dtype: of the hidden states and of unquantised weights.
        experts: sizes and form.
        top_k: K.
        tokens: T where it is known, None for any.
        weight_format: `unquantized`, or the name of a quantised format: that of a `WeightFormat`,
            or `A+B` where the two products' formats differ.
        activation_format: an `ActivationFormat`: how the inputs of both products are rounded.
        batch_invariant: whether a token's bits must not depend on its neighbours.
    """

    device: str
    dtype: torch.dtype
    experts: ExpertsConfig
    top_k: int
    tokens: int | None = None
    weight_format: str = "unquantized"
    activation_format: str = "unquantized"
    batch_invariant: bool = False


class ExpertsKernel(ABC):
    """Routed experts, from hidden states and a routing to their weighted sum."""

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, query: KernelQuery) -> str | None:
        """Why this kernel cannot run `query`, as half a sentence, or None when it can."""

    @abstractmethod
    def __call__(
        self,
        hidden_TH: Tensor,
        topk_weights_TK: Tensor,
        topk_ids_TK: Tensor,
        weights: Weights,
        config: ExpertsConfig,
        *,
        batch_invariant: bool = False,
    ) -> Tensor:
        """The sum over a token's K slots of weight * expert(hidden), in the dtype of `hidden_TH`.

        Args:
            hidden_TH: contiguous; never written to.
            topk_weights_TK: float32.
            topk_ids_TK: int32 in [0, E]; E is a dropped slot and contributes nothing.
            weights: as stored; `config` says how. Quantised weights are stored canonically.

        Returns:
            A new tensor [T, H]. Products accumulate in float32, the K contributions are summed in
            float32 in a fixed order, and the sum is rounded once.
        """

    def note(self, query: KernelQuery) -> str | None:
        """What a person should know of how `query` runs, as half a sentence, or None."""
        return None

    @abstractmethod
    def workspace_bytes_per_token(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype
    ) -> int:
        """Upper bound of the temporary memory of a call, divided by its number of tokens."""

    def tokens_within(
        self, config: ExpertsConfig, top_k: int, dtype: torch.dtype, budget: int
    ) -> int:
        """The most tokens, at least one, of which a call needs at most `budget` bytes of temporary
        memory."""
        return max(1, budget // self.workspace_bytes_per_token(config, top_k, dtype))
