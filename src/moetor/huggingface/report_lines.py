"""The lines of a report on fusing."""

from __future__ import annotations

from torch import nn

from moetor.huggingface.experts_form import is_experts
from moetor.huggingface.modules import FusedMoEBlock
from moetor.huggingface.report import BlockReport
from moetor.huggingface.router_form import TOP_K_ATTRIBUTES


def top_k_of(block: nn.Module, num_experts: int) -> int:
    """K as the block or a child of it states it; 1 where none does (it only informs the choice
    of kernel).
    """
    for module in block.modules():
        for name in TOP_K_ATTRIBUTES:
            value = getattr(module, name, None)
            if isinstance(value, int) and 1 <= value <= num_experts:
                return value
    return 1


def left_alone_report(path: str, block: nn.Module, reason: str) -> BlockReport:
    """The line of a block that stays as it is."""
    packed = (module for module in block.modules() if is_experts(module))
    return BlockReport(
        name=path,
        family_block=type(block).__name__,
        level="none",
        reason=reason,
        num_experts=sum(module.get_parameter("down_proj").shape[0] for module in packed),
    )


def block_report(
    path: str, block: nn.Module, fused: FusedMoEBlock, error: float | None
) -> BlockReport:
    """The line of a block fused whole."""
    choice = fused.routed_experts.kernel_choice
    return BlockReport(
        name=path,
        family_block=type(block).__name__,
        level="block",
        router=fused.token_router.label,
        kernel=choice.kernel.name,
        max_error=error,
        refusals=choice.refusals,
        num_experts=fused.routed_experts.config.num_experts,
        packed_bytes=0 if fused.split is None else fused.split.packed_bytes(block),
        kernel_note=choice.note,
    )
