"""Direct collectives: sums over ranks that the launch of the norm after them makes, and tokens that
travel in turns. On a CPU gloo stands in for what GPUs do through shared memory: what is left to it,
and that nothing is summed twice or not at all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import moetor
from layer.layer_cases import build, draw_layer, make_config
from moetor.huggingface.trial import relative_error
from moetor.kernels import dense
from moetor.kernels.dense import Norm
from moetor.layer.sharding import shard_layer
from moetor.parallel import direct_rows, small_sums
from moetor.parallel.direct_rows import DirectRows
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


class NotedRows(DirectRows):
    """Rows by gloo, which notes what it did."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._busy, self.noted = group, False, ""

    def _reserve(self, there: int, back: int) -> bool:
        return True

    def gather(self, rows_NH: Tensor, routing_NK: Tensor) -> tuple[Tensor, Tensor]:
        self._busy, self.noted = True, self.noted + "g"
        return self._all(rows_NH), self._all(routing_NK)

    def _all(self, rows: Tensor) -> Tensor:
        found = [torch.empty_like(rows) for _ in range(self._group.size())]
        dist.all_gather(found, rows.contiguous(), group=self._group)
        return torch.cat(found)

    def scatter(self, parts_NH: Tensor) -> Tensor:
        self._busy, self.noted = False, self.noted + "s"
        total = parts_NH.clone()
        dist.all_reduce(total, group=self._group)
        return total.chunk(self._group.size())[self._group.rank()]


def exchange_noted(rank: int, runner: dict[str, Any], mode: str) -> tuple[float, str]:
    """In a worker: the error of a layer, and what went directly."""
    config = make_config(runner=runner, experts={"intermediate_size": 48}, hidden_size=64)
    tensors = draw_layer(config, torch.float32, torch.Generator().manual_seed(5))
    whole, layer = build(config, tensors), build(config, tensors)
    groups = make_groups(MODES[mode])
    shard_layer(layer, groups)
    group = layer.dispatcher.group
    direct_rows._of[group] = noted = NotedRows(group)
    # One rank has fewer tokens, where ranks have tokens of their own.
    count = (8, 5)[groups.data_rank]
    rng = torch.Generator().manual_seed(7 + groups.data_rank)
    hidden = torch.randn((count, 64), generator=rng)
    try:
        return relative_error(layer(hidden), whole(hidden)), noted.noted
    finally:
        del direct_rows._of[group]


# There is one place for rows: of two halves under way, the second goes by the backend.
@pytest.mark.parametrize("mode", ["dp_ep", "sp"])
@pytest.mark.parametrize("runner", [{}, {"name": "dual_batch", "dual_batch_min_tokens": 2}])
def test_rows_travel_in_turns(runner: dict[str, Any], mode: str, two: Pool) -> None:
    for error, noted in two.run(exchange_noted, runner, mode):
        assert error <= 1e-5
        assert noted == "gs"


def test_flags_take_a_link_with_atomic_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    linked = {(0, 1), (1, 0), (2, 0)}
    monkeypatch.setattr(small_sums, "_has_atomics", lambda own, other: (own, other) in linked)
    assert small_sums.no_link(0, [0, 1]) is None
    assert "GPU 2 has no atomic operations on the memory of GPU 1" in str(
        small_sums.no_link(2, [0, 1, 2])
    )
    assert "does not see the other ranks' GPUs" in str(small_sums.no_link(0, [0, 0]))
