"""Kernels refused before a model's weights are read or made."""

from __future__ import annotations

import torch
from torch import nn

from moetor.config import RunnerConfig
from moetor.errors import KernelRefusedError
from moetor.huggingface.block_form import ExpertsSource, experts_form, find_blocks, recognise_block
from moetor.huggingface.experts_form import Unrecognised
from moetor.huggingface.report_lines import top_k_of
from moetor.huggingface.split_experts import SplitExperts
from moetor.quantization.method import QuantMethod, make_method


def check_kernels(
    model: nn.Module, method: QuantMethod, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuses, of a model that will be fused, the kernels that `fuse` would refuse.

    Args:
        model: without its weights, such as on the meta device.
        method: that will compute with the experts, and names the kernel that is asked for.
        device, dtype: of the weights to come.

    Raises:
        KernelRefusedError: that kernel does not run a block's experts, or none does.
    """
    # Every block is proved unquantised first.
    methods: list[QuantMethod] = [make_method(None, method.requested_kernel, batch_invariant=False)]
    # Of several formats in one checkpoint no layer need have both: `fuse` sees which it has.
    if "+" not in method.weight_format:
        methods.append(method)
    for path, block, source in find_blocks(model):
        form = experts_form(block, source)
        if isinstance(form, Unrecognised):
            continue
        top_k = top_k_of(block, form.num_experts)
        try:
            for one in methods:
                one.choice(one.stored_form(form), top_k, device, dtype)
        except KernelRefusedError:
            if not _left_alone(path, block, source):
                raise


def _left_alone(path: str, block: nn.Module, source: ExpertsSource) -> bool:
    """Whether a block stays as it is: experts that are held apart are fused with all of it or not
    at all.
    """
    if not isinstance(source, SplitExperts):
        return False
    plan = recognise_block(path, block, source, quantization=None, runner=RunnerConfig(), hint=None)
    return isinstance(plan, Unrecognised)
