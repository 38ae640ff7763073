"""The Triton kernels on the CPU, under Triton's interpreter: every form and edge case, small.

The interpreter is chosen by an environment variable when a kernel is defined, so the table runs in
a process of its own: `TRITON_INTERPRET=1 python tests/kernels/test_triton_interpreter.py SEED`.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve()


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install triton)",
)
@pytest.mark.parametrize(
    "path", ["small", "large", "descriptors", "paired", "walking", "random", "map", "routing"]
)
def test_under_the_interpreter(path: str, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE), path, str(seed)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# --- what runs in that process -------------------------------------------------------------------


def _cases(path: str) -> Iterator[tuple[str, object]]:
    from layer.expert_cases import EDGES, FORMS
    from moetor.kernels.triton.choose import small_form

    for case in FORMS + EDGES:
        if path != "small" or small_form(case.config) is None:
            config = case.config
            if path in (
                "descriptors",
                "paired",
                "walking",
            ):  # they need rows of a multiple of 16 bytes
                config = replace(config, hidden_size=16, intermediate_size=24)
            if case.tokens > 10:  # a loop over programs in Python: keep it short
                config = replace(config, hidden_size=4, intermediate_size=4)
            yield case.id, replace(case, config=config)


def _run(path: str, drawn: object, config: object, dtype: torch.dtype) -> Tensor:
    from moetor.kernels.base import ExpertWeights
    from moetor.kernels.triton import choose
    from moetor.kernels.triton.large import run_large
    from moetor.kernels.triton.small import run_small

    inputs = (
        drawn.hidden,
        drawn.topk_weights,
        drawn.topk_ids,
        ExpertWeights(**drawn.tensors._asdict()),
        config,
    )
    tokens, top_k = drawn.topk_ids.shape
    device = choose.Device(sms=132, shared=232448, capability=(8, 0))
    if path == "small":
        if dtype == torch.float32:
            plan = choose.small_plan(config, top_k, dtype.itemsize, device)
        else:
            plan = choose.SmallPlan(
                up=choose.VectorTile(rows=4, depth=8, warps=1),
                down=choose.VectorTile(rows=4, depth=8, warps=1),
                parts=2 if config.transposed else 0,
            )
        return run_small(*inputs, plan)
    tile = choose.Tile(
        rows=128 if path == "paired" else 16,
        columns=16,
        depth=16,
        warps=1,
        stages=1,
        group=2,
        tma=path in ("descriptors", "paired", "walking"),
        halves=path == "paired",
    )
    plan = choose.LargePlan(up=tile, down=tile)
    if path == "walking":
        plan = replace(plan, up=replace(tile, persistent=3))
    if path == "large" and dtype == torch.float32:
        plan = choose.large_plan(config, top_k, tokens, dtype.itemsize, device)
    return run_large(*inputs, plan)


def _check_random(seed: int) -> None:
    """Sizes, forms, routings, tiles and ways to read and walk that nobody chose."""
    from layer.expert_cases import ExpertsCase, draw
    from moetor.config import Activation, ExpertsConfig
    from moetor.kernels.base import ExpertWeights
    from moetor.kernels.triton import choose
    from moetor.kernels.triton.large import run_large
    from moetor.kernels.triton.small import run_small
    from oracle import assert_close

    chance, rng = random.Random(seed), torch.Generator().manual_seed(seed)

    def flag() -> bool:
        return chance.random() < 0.5

    def tile(rows: int) -> choose.Tile:
        return choose.Tile(
            rows=rows, columns=chance.choice((16, 32, 64)), depth=chance.choice((16, 32, 64)),
            warps=4, stages=2, group=chance.choice((1, 2, 8)), tma=flag(),
            persistent=chance.choice((0, 1, 3, 7)), halves=rows > 16 and flag(),
        )  # fmt: skip

    def vectors() -> choose.VectorTile:
        return choose.VectorTile(
            rows=chance.choice((1, 2, 8)), depth=chance.choice((4, 16, 64)), warps=1, ahead=flag()
        )

    for _ in range(16):
        experts, gated, transposed = chance.choice((1, 3, 5)), flag(), flag()
        # Half of the sizes are multiples of 16 bytes, as descriptors need them.
        unit = 8 if flag() else 1
        config = ExpertsConfig(
            num_experts=experts,
            hidden_size=unit * chance.randint(1, 80 // unit),
            intermediate_size=unit * chance.randint(1, 80 // unit),
            gated=gated,
            interleaved=gated and flag(),
            transposed=transposed,
            has_bias=flag(),
            weight_on_input=flag(),
            post_norm_eps=1e-5 if chance.random() < 0.2 else None,
            activation=Activation() if gated else Activation(name="relu2"),
        )
        case = ExpertsCase(
            id="random",
            config=config,
            tokens=chance.choice((2, 5, 17, 40)),
            top_k=chance.randint(1, min(experts, 3)),
            routing=chance.choice(("random", "all_on_one", "some_dropped", "all_dropped")),
        )
        drawn = draw(case, chance.choice((torch.float32, torch.float16)), rng)
        arguments = (
            drawn.hidden, drawn.topk_weights, drawn.topk_ids,
            ExpertWeights(**drawn.tensors._asdict()), config,
        )  # fmt: skip
        rows = chance.choice((16, 32, 64, 128))
        plans = [choose.LargePlan(up=tile(rows), down=tile(rows))]
        if choose.small_form(config) is None and case.tokens <= 5:
            parts = chance.choice((1, 3, 8)) if transposed else 0
            plans.append(choose.SmallPlan(up=vectors(), down=vectors(), parts=parts))
        for plan in plans:
            run = run_small if isinstance(plan, choose.SmallPlan) else run_large
            try:
                assert_close(run(*arguments, plan), drawn.expected(config))
            except AssertionError as error:
                raise AssertionError(f"{case} {plan}: {error}") from error


def _check_map(rng: torch.Generator) -> None:
    """Every kept slot in exactly one row, in tiles of its expert, in token order."""
    from moetor.kernels.triton.sort import make_row_tiles

    for experts, tokens, top_k, rows in [
        (1, 1, 1, 16), (5, 40, 3, 16), (3, 200, 2, 32), (8, 700, 2, 16), (130, 90, 4, 64),
        (7, 61, 3, 16), (1, 1100, 1, 128), (1024, 70, 16, 16),
    ]:  # fmt: skip
        ids = torch.randint(0, experts + 1, (tokens, top_k), generator=rng, dtype=torch.int32)
        made = make_row_tiles(ids, experts, rows, pdl=False)
        # Or the products would be compiled again for some numbers of tokens.
        assert all(part.data_ptr() % 16 == 0 for part in made)
        used, slots, flat = int(made.used), ids.numel(), ids.flatten().tolist()
        assert used <= made.tiles
        found: dict[int, list[int]] = {expert: [] for expert in range(experts)}
        place = made.place.flatten().tolist()
        for row, slot in enumerate(made.order[: used * rows].tolist()):
            assert 0 <= slot <= slots
            if slot < slots:  # the others are padding
                found[int(made.expert[row // rows])].append(slot)
                assert place[slot] == row
        for expert, placed in found.items():
            assert placed == [slot for slot, other in enumerate(flat) if other == expert]
        assert [at == -1 for at in place] == [expert == experts for expert in flat]


def _check_routing(rng: torch.Generator) -> None:
    """Every router against the oracle, by ids and by weights; NaN logits are seen."""
    import oracle
    from layer.routing_cases import CASES, draw
    from moetor.config import RouterConfig
    from moetor.kernels.triton.routing import run_route

    for dtype in (torch.float32, torch.bfloat16):
        relative = 32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
        for case in CASES:
            config = case.config
            logits, bias = draw(case, dtype, rng)
            judged = oracle.route(logits, config, bias, dtype)
            found = run_route(logits, config, bias, dtype)
            ids = [[min(one, config.num_experts) for one in row] for row in judged.ids]
            assert [sorted(row) for row in found.topk_ids.tolist()] == [sorted(x) for x in ids], (
                case.id
            )
            dense = torch.zeros(case.tokens, config.num_experts + 1, dtype=torch.float64)
            dense.scatter_add_(1, found.topk_ids.long(), found.topk_weights.double())
            if found.identity_weights is not None:
                assert not dense[:, -1].any()
                dense[:, -1] = found.identity_weights
            wanted = judged.dense(config.num_logits)
            identity = wanted[:, config.num_experts :].sum(dim=1, keepdim=True)
            wanted = torch.cat((wanted[:, : config.num_experts], identity), dim=1)
            limit = relative if config.weights_precision == "model" else 4e-6
            assert ((dense - wanted).abs() <= limit * wanted).all(), case.id
    # Ties: the smaller id. A NaN comes first and shows.
    config = RouterConfig(num_experts=6, top_k=2, scoring="sigmoid")
    logits = torch.tensor([[0.0, 1, 1, 1, 0, 0], [0.0, 1, float("nan"), 1, 0, 0]])
    found = run_route(logits, config, None, torch.float32)
    assert found.topk_ids.tolist() == [[1, 2], [2, 1]]
    assert found.topk_weights[1].isnan().tolist() == [True, False]


def _main(path: str, seed: int) -> None:
    from interpreted import allow_loop_bounds
    from layer.expert_cases import draw
    from oracle import assert_close

    allow_loop_bounds()

    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    rng = torch.Generator().manual_seed(seed)
    if path == "random":
        _check_random(seed)
        return
    if path in ("map", "routing"):
        (_check_map if path == "map" else _check_routing)(rng)
        return
    # The interpreter of Triton 3.6 multiplies the bit patterns of bfloat16 in tl.dot.
    second = torch.bfloat16 if path == "small" else torch.float16
    for dtype in (torch.float32, second):
        for name, case in _cases(path):
            drawn = draw(case, dtype, rng)
            out = _run(path, drawn, case.config, dtype)
            try:
                assert out.dtype == dtype
                assert_close(out, drawn.expected(case.config))
            except AssertionError as error:
                raise AssertionError(f"{path} {name} {dtype}: {error}") from error


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    _main(sys.argv[1], int(sys.argv[2]))
