"""Experts that the GPU reads where they are, in page-locked host memory: with few tokens its part
of the reading comes on top of what the CPU's cores can read.

Shape letters: T tokens, K top_k, E experts.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moetor.kernels.routing import Routing
from moetor.kernels.triton.choose import use_small
from moetor.kernels.triton.small import TritonSmallKernel
from moetor.layer.experts import Experts

_TYPES = {1: "|u1", 2: "<i2", 4: "<i4"}
# With more tokens several read the same expert, on both sides.
MOST_TOKENS = 4
_KERNEL = TritonSmallKernel()


class _Memory:
    """Page-locked host memory as other libraries describe a GPU's: the addresses are the same."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # lives as long as what is made of it
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "typestr": _TYPES[tensor.itemsize],
            "data": (tensor.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def on_gpu(tensor: Tensor, device: torch.device) -> Tensor:
    """A page-locked host tensor as the GPU sees it, without a copy."""
    if device.type != "cuda":
        return tensor
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]
    seen = torch.as_tensor(_Memory(tensor.view(bits)), device=device).view(tensor.dtype)
    assert seen.data_ptr() == tensor.data_ptr(), "the same memory"
    return seen


def reads_directly(experts: Experts, tokens: int) -> bool:
    """Whether a call is of the kind whose kernel reads each slot's expert once, and no other."""
    size = experts.dtype.itemsize
    return tokens <= MOST_TOKENS and use_small(experts.config, experts.top_k, tokens, size)


def run_directly(experts: Experts, hidden_TH: Tensor, routing: Routing) -> Tensor:
    """Their sum, by the kernel that loads weights in the order of their addresses, whatever has
    been tuned for experts in the GPU's own memory.
    """
    if hidden_TH.device.type != "cuda":
        return experts.run(hidden_TH, routing)
    weights, config = experts.kernel_weights, experts.config
    return _KERNEL(hidden_TH, routing.topk_weights, routing.topk_ids, weights, config)


def split(
    weights_TK: Tensor, host_TK: Tensor, num_experts: int, share: float
) -> tuple[Routing, Routing]:
    """Slots for the GPU and for the host; of each token's the GPU has the first ones.

    Args:
        host_TK: experts that are not in the cache, int32, E for all other slots.
        share: of them that the GPU reads.
    """
    away_TK = host_TK < num_experts
    number_TK = away_TK.cumsum(dim=1, dtype=torch.int32)
    last_T1 = (number_TK[:, -1:] * share + 0.5).to(torch.int32)
    direct_TK = number_TK <= last_T1
    return (
        Routing(weights_TK, torch.where(direct_TK, host_TK, num_experts)),
        Routing(weights_TK, torch.where(direct_TK, num_experts, host_TK)),
    )


def measured_share(direct: Experts, host: Any, device: torch.device) -> float:
    """The GPU's part for one token, so that both end together when each reads alone.

    Args:
        direct: experts whose tensors are seen by `on_gpu`.
        host: called with hidden states and a routing on the GPU, computes on the host.
    """
    taken = []
    for run in (partial(run_directly, direct), host):
        times = []
        for number in range(4):
            hidden_TH, routing = _one_token(direct, number, device)
            torch.cuda.synchronize(device)
            begin = time.perf_counter()
            run(hidden_TH, routing)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        taken.append(min(times))
    ours, theirs = taken
    return theirs / (ours + theirs)


def _one_token(experts: Experts, number: int, device: torch.device) -> tuple[Tensor, Routing]:
    config, top_k = experts.config, experts.top_k
    hidden_TH = torch.ones((1, config.hidden_size), dtype=experts.dtype, device=device)
    ids = (torch.arange(top_k) + number * top_k) % config.num_experts
    ids_TK = ids.to(device, torch.int32).unsqueeze(0)
    return hidden_TH, Routing(torch.full(ids_TK.shape, 1.0 / top_k, device=device), ids_TK)
