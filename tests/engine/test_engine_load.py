"""Counting which experts are chosen, all layers of a model call together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.engine_cases import greedy, make_engine, make_model, random_prompts, run_staggered
from moetor import fuse
from moetor.engine.load import ExpertLoad
from moetor.huggingface.modules import fused_modules
from moetor.layer.context import get_forward_context


class Launches(TorchDispatchMode):
    """Operations that are more than another view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def note(load: ExpertLoad, calls: list[tuple[str, Tensor, Tensor | None]]) -> None:
    with load.recording():
        recorder = get_forward_context().recorder
        assert recorder is load
        for name, ids, tokens in calls:
            recorder.note(name, ids, tokens, load._layers[name].ids - 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_are_those_of_each_layer_by_itself(dtype: torch.dtype, masked: bool) -> None:
    model = make_model("qwen3_moe", 3)
    fuse(model)
    load = ExpertLoad(model, torch.device("cpu"))
    modules = [(path, module) for path, module in fused_modules(model)]
    size = modules[0][1].routed_experts.config.num_experts
    wanted = {path: Counter[int]() for path, _ in modules}
    for tokens, repeated in ((5, False), (1, True), (0, False)):
        mask = torch.rand(tokens) < 0.5 if masked else None
        calls = []
        for number, (path, module) in enumerate(modules * (1 + repeated)):
            # the id `size` is a dropped slot; one layer has another number of slots
            ids = torch.randint(0, size + 1, (tokens, 2 + number % 2 * repeated), dtype=dtype)
            calls.append((module.name, ids, mask))
            kept = ids if mask is None else ids[mask]
            wanted[path].update(kept.flatten().tolist())
        note(load, calls)
    assert load.counts() == {
        path: [found[expert] for expert in range(size)] for path, found in wanted.items()
    }


def test_layers_of_one_shape_are_counted_in_five_operations() -> None:
    model = make_model("qwen3_moe", 3)
    fuse(model)
    load = ExpertLoad(model, torch.device("cpu"))
    names = [module.name for _, module in fused_modules(model)]
    mask = torch.tensor([True, False, True])
    calls = [(name, torch.zeros((3, 2), dtype=torch.int32), mask) for name in names]
    assert len(names) == 2
    with Launches() as launches:
        note(load, calls)
    assert len(launches.names) <= 5, launches.names


def test_a_call_that_fails_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a step that failed together are computed again, each alone."""
    model = make_model("qwen3_moe", 3)
    engine = make_engine(model, "auto", record_expert_load=True)
    runner = engine.core.runner
    call = runner._call_packed

    def failing(parts: Any) -> Tensor:
        logits = call(parts)
        if len(parts) > 1:
            raise RuntimeError("together they fail")
        return logits

    monkeypatch.setattr(runner, "_call_packed", failing)
    prompts = random_prompts(model, (5, 9), seed=2)
    run_staggered(engine, prompts, [greedy(4), greedy(4)], every=1)
    top_k = model.config.num_experts_per_tok
    assert [sum(one) for one in engine.core.expert_load().values()] == [(5 + 9 + 6) * top_k] * 2
