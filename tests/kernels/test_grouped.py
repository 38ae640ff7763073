"""The contract of an experts kernel, for the two that are written in torch: every form and edge
case against the oracle, and what `ExpertsKernel` promises besides numbers."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layer.expert_cases import DTYPES, EDGES, FORMS, Drawn, ExpertsCase, draw
from moetor.config import Activation, ExpertsConfig
from moetor.kernels.base import ExpertsKernel, ExpertWeights, KernelQuery
from moetor.kernels.grouped import GroupedKernel
from moetor.kernels.reference import ReferenceKernel
from oracle import assert_close

KERNELS = [GroupedKernel(), ReferenceKernel()]
CASES = FORMS + EDGES


def by_name(value: Any) -> str | None:
    if isinstance(value, ExpertsKernel):
        return value.name
    if isinstance(value, ExpertsCase):
        return value.id
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def run(kernel: ExpertsKernel, case: ExpertsCase, drawn: Drawn, **options: bool) -> Tensor:
    weights = ExpertWeights(**drawn.tensors._asdict())
    return kernel(drawn.hidden, drawn.topk_weights, drawn.topk_ids, weights, case.config, **options)


@pytest.fixture(params=KERNELS, ids=by_name)
def kernel(request: pytest.FixtureRequest) -> ExpertsKernel:
    found: ExpertsKernel = request.param
    return found


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_matches_the_oracle(
    kernel: ExpertsKernel, case: ExpertsCase, dtype: torch.dtype, rng: torch.Generator
) -> None:
    drawn = draw(case, dtype, rng)
    for batch_invariant in (False, True):
        out = run(kernel, case, drawn, batch_invariant=batch_invariant)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_close(out, drawn.expected(case.config))


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_leaves_its_inputs_alone_and_returns_a_new_tensor(
    kernel: ExpertsKernel, case: ExpertsCase, rng: torch.Generator
) -> None:
    drawn = draw(case, torch.float32, rng)
    inputs = [drawn.hidden, drawn.topk_weights, drawn.topk_ids, *drawn.tensors]
    before = [None if tensor is None else tensor.clone() for tensor in inputs]
    out = run(kernel, case, drawn)
    for tensor, copy in zip(inputs, before, strict=True):
        if tensor is not None:
            assert torch.equal(tensor, copy)
            assert tensor.numel() == 0 or tensor.data_ptr() != out.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_gives_the_same_bits_twice(
    kernel: ExpertsKernel, case: ExpertsCase, dtype: torch.dtype, rng: torch.Generator
) -> None:
    drawn = draw(case, dtype, rng)
    assert torch.equal(run(kernel, case, drawn), run(kernel, case, drawn))


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize(
    "size", [(12, 10), (13, 7), (64, 96), (257, 65)], ids=lambda size: "x".join(map(str, size))
)
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in FORMS
        if case.id
        in (
            "silu",
            "interleaved",
            "transposed",
            "post_norm",
            "gpt_oss",
            "ungated_bias_transposed",
        )
    ],
    ids=by_name,
)
def test_batch_invariant_rows_do_not_see_their_batch(
    kernel: ExpertsKernel,
    case: ExpertsCase,
    size: tuple[int, int],
    dtype: torch.dtype,
    rng: torch.Generator,
) -> None:
    if kernel.name == "reference" and max(size) > 13:
        pytest.skip("it multiplies row by row: nothing depends on the size")
    config = replace(case.config, hidden_size=size[0], intermediate_size=size[1])
    case = replace(case, config=config, tokens=35)
    drawn = draw(case, dtype, rng)
    whole = run(kernel, case, drawn, batch_invariant=True)
    for start, stop in [(row, row + 1) for row in range(0, 35, 5)] + [(0, 7), (7, 35), (16, 33)]:
        part = replace(
            drawn,
            hidden=drawn.hidden[start:stop],
            topk_weights=drawn.topk_weights[start:stop],
            topk_ids=drawn.topk_ids[start:stop],
        )
        assert torch.equal(run(kernel, case, part, batch_invariant=True), whole[start:stop])


@pytest.mark.parametrize("threads", [1, 3])
def test_batch_invariant_rows_do_not_see_the_threads(
    kernel: ExpertsKernel, threads: int, rng: torch.Generator
) -> None:
    """A wide activation is split between threads, which must not fall within the rows."""
    form = next(case for case in FORMS if case.id == "gelu")
    config = replace(form.config, num_experts=1, hidden_size=8, intermediate_size=3000)
    case = replace(form, config=config, tokens=32, top_k=1)
    drawn = draw(case, torch.float32, rng)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = run(kernel, case, drawn, batch_invariant=True)
        for row in range(case.tokens):
            part = replace(
                drawn,
                hidden=drawn.hidden[row : row + 1],
                topk_weights=drawn.topk_weights[row : row + 1],
                topk_ids=drawn.topk_ids[row : row + 1],
            )
            alone = run(kernel, case, part, batch_invariant=True)
            assert torch.equal(alone, whole[row : row + 1])
    finally:
        torch.set_num_threads(before)


def test_an_expert_without_a_token_is_not_touched(
    kernel: ExpertsKernel, rng: torch.Generator
) -> None:
    case = next(case for case in EDGES if case.id == "expert_without_token")
    drawn = draw(case, torch.float32, rng)
    unused = sorted(set(range(4)) - set(drawn.topk_ids.flatten().tolist()))
    assert unused
    drawn.tensors.gate_up[unused] = float("nan")
    drawn.tensors.down[unused] = float("inf")
    assert run(kernel, case, drawn).isfinite().all()


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_broken_token_does_not_spread(
    kernel: ExpertsKernel, batch_invariant: bool, rng: torch.Generator
) -> None:
    case = replace(FORMS[0], tokens=6)
    drawn = draw(case, torch.float32, rng)
    drawn.hidden[2] = float("nan")
    out = run(kernel, case, drawn, batch_invariant=batch_invariant)
    assert out[2].isnan().all()
    drawn.hidden[2] = 1.0
    assert_close(
        torch.cat((out[:2], run(kernel, case, drawn)[2:3], out[3:])), drawn.expected(case.config)
    )


def test_a_token_whose_slots_are_all_dropped_gives_zero(
    kernel: ExpertsKernel, rng: torch.Generator
) -> None:
    case = next(case for case in EDGES if case.id == "all_slots_of_a_token_dropped")
    drawn = draw(case, torch.float32, rng)
    row = case.tokens // 2
    drawn.hidden[row] = float("inf")
    out = run(kernel, case, drawn)
    assert torch.equal(out[row], torch.zeros(12))
    assert out.isfinite().all()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=by_name)
def test_contributions_are_summed_in_float32(
    kernel: ExpertsKernel, dtype: torch.dtype, batch_invariant: bool
) -> None:
    """A first contribution of 1 and 63 of 1/4096: in a 16-bit sum each of the 63 would vanish."""
    config = ExpertsConfig(
        num_experts=64,
        hidden_size=1,
        intermediate_size=1,
        gated=False,
        activation=Activation(name="relu"),
    )
    ones = torch.ones(64, 1, 1, dtype=dtype)
    weights = torch.full((1, 64), 2.0**-12)
    weights[0, 0] = 1.0
    out = kernel(
        torch.ones(1, 1, dtype=dtype),
        weights,
        torch.arange(64, dtype=torch.int32)[None],
        ExpertWeights(gate_up=ones, down=ones),
        config,
        batch_invariant=batch_invariant,
    )
    assert torch.equal(out, torch.tensor([[1 + 63 * 2.0**-12]], dtype=dtype))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_routing_weights_are_applied_in_float32(
    kernel: ExpertsKernel, batch_invariant: bool
) -> None:
    """1 * (1 + 2**-12) - 1 * 1: a weight rounded to bfloat16 would leave nothing."""
    config = ExpertsConfig(
        num_experts=1,
        hidden_size=1,
        intermediate_size=1,
        gated=False,
        activation=Activation(name="relu"),
    )
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    out = kernel(
        torch.ones(1, 1, dtype=torch.bfloat16),
        torch.tensor([[1 + 2.0**-12, -1.0]]),
        torch.zeros(1, 2, dtype=torch.int32),
        ExpertWeights(gate_up=one, down=one),
        config,
        batch_invariant=batch_invariant,
    )
    assert torch.equal(out, torch.tensor([[2.0**-12]], dtype=torch.bfloat16))


def test_refuses_an_unknown_format_alone(kernel: ExpertsKernel) -> None:
    query = KernelQuery(
        device="cpu", dtype=torch.float32, experts=FORMS[0].config, top_k=2, weight_format="runes"
    )
    assert kernel.refusal(query) == "knows no weight format runes"
    for case in FORMS:
        assert kernel.refusal(replace(query, experts=case.config, weight_format="unquantized")) is (
            None
        )


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made under it and still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known | inputs:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("sizes", [(128, 32), (32, 128)], ids=["wide", "deep"])
@pytest.mark.parametrize("routing", ["random", "all_on_one"])
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in FORMS
        if case.id
        in (
            "silu",
            "ungated",
            "weight_on_input",
            "gpt_oss",
            "post_norm",
            "limit_after",
            "softcap",
        )
    ],
    ids=by_name,
)
def test_workspace_is_bounded_as_promised(
    kernel: ExpertsKernel,
    case: ExpertsCase,
    routing: Any,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    rng: torch.Generator,
) -> None:
    config = replace(case.config, hidden_size=sizes[0], intermediate_size=sizes[1])
    top_k = 1 if routing == "all_on_one" else 2  # an expert sees a token once
    case = replace(case, config=config, tokens=64, top_k=top_k, routing=routing)
    if kernel.name == "reference" and dtype.itemsize < 4:
        pytest.skip("it widens an expert's weights, which no token count divides")
    drawn = draw(case, dtype, rng)
    with PeakMemory() as memory:
        out = run(kernel, case, drawn)
    measured = memory.peak / case.tokens
    assert measured > out.nbytes / case.tokens
    assert measured <= kernel.workspace_bytes_per_token(config, case.top_k, dtype)
