"""What part of a layer's experts is worth copying to the GPU: measured, once.

Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

import bisect
import math
import time
from dataclasses import dataclass

import torch

from moetor.kernels.native.kernel import native_experts
from moetor.layer.offload.store import LayerStore, Staging

_TOKENS = (8, 16, 32, 64, 128, 256, 512)
# Below this part of experts that a call meets, too many would be copied for nothing; and a part
# that small saves less than what it costs.
_MET, _LEAST_SHARE = 0.8, 0.15
# The host's part is then not worth the way there and back.
_NEARLY_ALL = 0.95


@dataclass(frozen=True, slots=True)
class Balance:
    """How the experts of a call are shared out, so that the host and the copies end together.

    Attributes:
        min_tokens: fewer are computed by the host; None: any number is.
        host: rising tokens, and what the host takes for them, in seconds.
        copy_seconds: of all the layer's experts; 0 for a balance that was not measured: then all
            are copied.
    """

    min_tokens: int | None
    host: tuple[tuple[int, float], ...] = ()
    copy_seconds: float = 0.0

    def copied(self, tokens: int, experts: int) -> int:
        """How many of the experts are copied in a call of so many tokens."""
        if not self.copy_seconds:
            return experts
        share = self._share(tokens)
        return experts if share > _NEARLY_ALL else round(share * experts)

    def _share(self, tokens: int) -> float:
        taken = self.host_seconds(tokens)
        return taken / (taken + self.copy_seconds)

    def host_seconds(self, tokens: int) -> float:
        """Between the measured ones a straight line; beyond the last one in proportion."""
        sizes = [size for size, _ in self.host]
        place = bisect.bisect_left(sizes, tokens)
        if place == len(sizes):
            size, seconds = self.host[-1]
            return seconds * tokens / size
        high, above = self.host[place]
        if place == 0:
            return above
        low, below = self.host[place - 1]
        return below + (above - below) * (tokens - low) / (high - low)

    @classmethod
    def of(
        cls, host: tuple[tuple[int, float], ...], copy_seconds: float, top_k: int, experts: int
    ) -> Balance:
        """From what was measured."""
        found = cls(None, host, copy_seconds)
        unmet = 1.0 - top_k / experts
        least = 1 if unmet <= 0 else math.ceil(math.log(1.0 - _MET) / math.log(unmet))
        for tokens in range(max(2, least), host[-1][0] + 1):
            if found._share(tokens) >= _LEAST_SHARE:
                return cls(tokens, host, copy_seconds)
        return found


def measured_balance(store: LayerStore, staging: Staging, device: torch.device) -> Balance:
    """For layers like this one on this machine."""
    experts = store.experts
    everyone = range(experts.config.num_experts)
    copy_seconds = math.inf
    for _ in range(3):  # the first copies may fault pages in
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in staging.chunks(store, everyone):
            pass
        torch.cuda.synchronize(device)
        copy_seconds = min(copy_seconds, time.perf_counter() - begin)
    host = []
    for tokens in _TOKENS:
        host.append((tokens, _host_seconds(store, tokens)))
        if host[-1][1] > 4 * copy_seconds:
            break
    return Balance.of(tuple(host), copy_seconds, experts.top_k, experts.config.num_experts)


def _host_seconds(store: LayerStore, tokens: int) -> float:
    experts, config = store.experts, store.experts.config
    generator = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn((tokens, config.hidden_size), generator=generator).to(experts.dtype)
    scores_TE = torch.rand((tokens, config.num_experts), generator=generator)
    weights_TK, ids_TK = scores_TE.topk(experts.top_k, dim=-1)
    taken = []
    for _ in range(2):
        begin = time.perf_counter()
        native_experts(
            hidden_TH,
            weights_TK.contiguous(),
            ids_TK.to(torch.int32),
            experts.kernel_weights,
            config,
        )
        taken.append(time.perf_counter() - begin)
    return min(taken)
