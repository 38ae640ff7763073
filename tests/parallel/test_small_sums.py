"""Sums over ranks that the launch of the norm after them makes. On a CPU gloo stands in for what
GPUs do through shared memory: what is left to it, and that nothing is summed twice or not at all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import moetor
from moetor.huggingface.trial import relative_error
from moetor.kernels import dense
from moetor.kernels.dense import Norm
from moetor.parallel import small_sums
from moetor.parallel.groups import make_groups
from moetor.tools.tiny import logits_of, tiny_inputs, tiny_model
from parallel.families import MODES
from parallel.pool import Pool


class Noted:
    """Sums and norms up to 24 rows, and counts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.calls = group, 0

    def takes(self, partial: Tensor) -> bool:
        return False

    def takes_rows(self, hidden: Tensor) -> bool:
        return hidden.numel() <= 24 * hidden.shape[-1]

    def add_rms_norm(self, partial: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        self.calls += 1
        total = partial.clone()
        dist.all_reduce(total, group=self.group)
        return dense.add_rms_norm(total, residual, norm)


def fuse_noted(rank: int, name: str, mode: str) -> tuple[float, float, int, int, int]:
    """In a worker: errors of the logits of few tokens and of many; sums that the norms made and
    that were made otherwise in the former call; layers.
    """
    model = tiny_model(name)
    few: Any = tiny_inputs(name, model)
    many = {"input_ids": torch.arange(3, 43)[None]}
    expected = logits_of(name, model, few), model(**many).logits
    group = make_groups(MODES[mode]).tensor
    small_sums._of[group] = noted = Noted(group)  # type: ignore[assignment]
    try:
        moetor.fuse(model, verify=False, dense=True, parallel=MODES[mode])
        error = relative_error(logits_of(name, model, few), expected[0])
        noted.calls = 0
        with CommDebugMode() as counted:
            model(input_ids=torch.arange(3, 8)[None])
        made, sums = (
            noted.calls,
            sum(n for op, n in counted.get_comm_counts().items() if "allreduce" in str(op)),
        )
        with torch.no_grad():
            large = relative_error(model(**many).logits, expected[1])
        assert noted.calls == made, "40 rows are too many"
    finally:
        del small_sums._of[group]
    return error, large, made, sums, len(model.model.layers)


# Dense layers beside experts; shared experts, which are summed together with the routed ones.
@pytest.mark.parametrize(
    ("name", "mode"), [("qwen3_moe", "tp"), ("qwen3_moe", "tp_ep"), ("glm4_moe", "tp_ep")]
)
def test_norms_make_the_sums(name: str, mode: str, two: Pool) -> None:
    for error, large, made, sums, layers in two.run(fuse_noted, name, mode):
        assert error <= 1e-5
        assert large <= 1e-5
        assert made == 2 * layers
        assert sums - made <= 1, "the embedding alone"
