"""From how many tokens on it is faster to bring a layer's experts to the GPU: measured, once."""

from __future__ import annotations

import time

import torch

from moetor.kernels.native.kernel import native_experts
from moetor.layer.offload.store import LayerStore, Staging

_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024)


def measured_threshold(store: LayerStore, staging: Staging, device: torch.device) -> int | None:
    """Tokens for which the host takes as long as copying all of the layer's experts; None where it
    is faster at any number that was tried.
    """
    experts = store.experts
    everyone = range(experts.config.num_experts)
    limit = 0.0
    for _ in range(2):  # the first copies may fault pages in
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in staging.chunks(store, everyone):
            pass
        torch.cuda.synchronize(device)
        limit = time.perf_counter() - begin
    before = (0, 0.0)
    for tokens in _TOKENS:
        taken = _host_seconds(store, tokens)
        if taken >= limit:
            low, least = before
            share = (limit - least) / max(taken - least, 1e-9)
            return max(1, round(low + share * (tokens - low)))
        before = (tokens, taken)
    return None


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
