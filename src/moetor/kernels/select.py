"""Which kernel runs, or why each one does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moetor.config import RouterConfig
from moetor.errors import KernelRefusedError
from moetor.kernels.base import ExpertsKernel, KernelQuery
from moetor.kernels.grouped import GroupedKernel
from moetor.kernels.grouped_mm import GroupedMMKernel
from moetor.kernels.native.kernel import NativeKernel
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.routing import Routing
from moetor.kernels.routing import route as route_in_torch
from moetor.kernels.triton.fused import TritonKernel
from moetor.kernels.triton.routing import route as route_in_triton
from moetor.kernels.triton.routing import routing_refusal

# In the order in which `auto` prefers them. The reference is never chosen by itself.
KERNELS: tuple[ExpertsKernel, ...] = (
    NativeKernel(),
    TritonKernel(),
    GroupedKernel(),
    GroupedMMKernel(),
    ReferenceKernel(),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A kernel that does not run the case, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The answer.

    Attributes:
        refusals: the preferred kernels that refused.
        note: what the kernel says of how it runs the case, as half a sentence, or None.
    """

    kernel: ExpertsKernel
    refusals: tuple[Refusal, ...]
    note: str | None = None


def kernel_names() -> tuple[str, ...]:
    """Every name that `kernel=` takes."""
    return ("auto", *(kernel.name for kernel in KERNELS))


def select_kernel(query: KernelQuery, requested: str = "auto") -> KernelChoice:
    """The kernel for `query`.

    Args:
        requested: a kernel's name, used or refused; `auto` takes the first that does not refuse.

    Raises:
        KernelRefusedError: unknown name, or the named kernel refuses, or (for `auto`) all do.
    """
    if requested not in kernel_names():
        raise KernelRefusedError(
            f"unknown kernel {requested!r}; the kernels are {', '.join(kernel_names())}"
        )
    answers = [(kernel, kernel.refusal(query)) for kernel in KERNELS]
    refusals = tuple(Refusal(kernel.name, why) for kernel, why in answers if why is not None)
    able = [kernel for kernel, why in answers if why is None]
    if requested != "auto":
        for kernel, why in answers:
            if kernel.name == requested and why is None:
                return KernelChoice(kernel, (), kernel.note(query))
            if kernel.name == requested:
                others = ", ".join(kernel.name for kernel in able) or "none"
                raise KernelRefusedError(
                    f"kernel {requested!r} was asked for and {why}; kernels that can: {others}"
                )
    able = [kernel for kernel in able if kernel.name != ReferenceKernel.name]
    if not able:
        reasons = "; ".join(f"{refusal.kernel} {refusal.reason}" for refusal in refusals)
        raise KernelRefusedError(f"no kernel runs this case: {reasons}")
    chosen = able[0]
    before = {kernel.name for kernel in KERNELS[: KERNELS.index(chosen)]}
    kept = tuple(refusal for refusal in refusals if refusal.kernel in before)
    return KernelChoice(chosen, kept, chosen.note(query))


RouteFunction = Callable[[Tensor, RouterConfig, Tensor | None, torch.dtype], Routing]
"""`(logits [T, E], config, selection bias [E] or None, dtype of the hidden states) -> routing`."""


@dataclass(frozen=True, slots=True)
class RouterChoice:
    """What computes a router's formula.

    Attributes:
        name: `triton` (one launch) or `torch`.
        refusal: why the preferred one does not, as half a sentence; None where it does.
    """

    name: str
    route: RouteFunction
    refusal: str | None


@functools.cache
def select_router(config: RouterConfig, device: str, dtype: torch.dtype) -> RouterChoice:
    """What routes logits of `dtype` on `device`; one token never depends on another in either.

    The two may order experts of equal scores otherwise, which are frequent where logits are of half
    precision: the smaller id wins in Triton, torch promises none.
    """
    refusal = routing_refusal(config, device, dtype)
    if refusal is None:
        return RouterChoice("triton", route_in_triton, None)
    return RouterChoice("torch", route_in_torch, refusal)
