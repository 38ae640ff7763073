"""The Triton kernels on an NVIDIA GPU: every form, edge case and promise of `ExpertsKernel`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layer.expert_cases import EDGES, FORMS, Drawn, ExpertsCase, draw
from moetor.config import Activation, ExpertsConfig
from moetor.errors import InputError, KernelRefusedError
from moetor.kernels.base import ExpertsKernel, ExpertWeights
from moetor.kernels.reference import ReferenceKernel
from moetor.kernels.triton import choose, support
from moetor.kernels.triton.fused import TritonKernel
from moetor.kernels.triton.large import run_large
from moetor.kernels.triton.large_kernel import TritonLargeKernel
from moetor.kernels.triton.small import TritonSmallKernel
from nvidia import REFUSED, needs_triton_gpu
from oracle import assert_close

pytestmark = needs_triton_gpu

KERNELS = [TritonSmallKernel(), TritonLargeKernel(), TritonKernel()]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = FORMS + EDGES
# The forms whose tiles differ, for larger sizes.
SIZED_FORMS: list[dict[str, Any]] = [
    {},
    {"gated": False, "activation": Activation(name="relu2")},
    {"interleaved": True, "has_bias": True},
    {"transposed": True},
    {
        "interleaved": True,
        "transposed": True,
        "has_bias": True,
        "activation": Activation(alpha=1.702, limit=7.0, up_shift=1.0),
    },
    {"weight_on_input": True, "has_bias": True},
    {"post_norm_eps": 1e-5},
    {"post_norm_eps": 1e-5, "post_norm_order": "scale_first", "has_bias": True},
    {"activation": Activation(function=torch.tanh), "interleaved": True, "weight_on_input": True},
]


def by_name(value: Any) -> str | None:
    if isinstance(value, ExpertsKernel):
        return value.name
    if isinstance(value, ExpertsCase):
        return value.id
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return "-".join(value) or "plain"
    return None


class Inputs:
    """One call's arguments on the GPU."""

    def __init__(
        self,
        config: ExpertsConfig,
        top_k: int,
        tokens: int,
        dtype: torch.dtype,
        *,
        drop: float = 0.0,
        weights: ExpertWeights | None = None,
    ) -> None:
        self.config = config
        self.hidden = torch.randn(tokens, config.hidden_size, device="cuda").to(dtype)
        scores = torch.rand(tokens, config.num_experts, device="cuda")
        self.ids = scores.topk(top_k, dim=-1).indices.int()
        self.routing = torch.rand(tokens, top_k, device="cuda") + 0.2
        dropped = torch.rand(tokens, top_k, device="cuda") < drop
        self.ids[dropped] = config.num_experts
        self.routing[dropped] = 0.0
        self.weights = random_weights(config, dtype) if weights is None else weights

    def run(self, kernel: ExpertsKernel, **options: bool) -> Tensor:
        poison()
        return kernel(self.hidden, self.routing, self.ids, self.weights, self.config, **options)

    def part(self, start: int, stop: int) -> Inputs:
        made = object.__new__(Inputs)
        made.config, made.weights = self.config, self.weights
        made.hidden, made.routing = self.hidden[start:stop], self.routing[start:stop]
        made.ids = self.ids[start:stop]
        return made

    def expected(self) -> Tensor:
        """The reference in float32, on the same (rounded) inputs."""
        wide = ExpertWeights(
            self.weights.gate_up, self.weights.down,
            self.weights.gate_up_bias, self.weights.down_bias, self.weights.post_norm,
        )  # fmt: skip
        return ReferenceKernel()(self.hidden.float(), self.routing, self.ids, wide, self.config)

    def check(self, out: Tensor) -> None:
        expected = self.expected()
        assert out.dtype == self.hidden.dtype
        assert out.isfinite().all()
        error = (out.float() - expected).norm() / expected.norm().clamp(min=1e-30)
        limit = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}[out.dtype]
        assert error < limit, f"relative error {error:.2e}"
        # And row by row, so that one wrong token in thousands is seen.
        rows = (out.float() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-3)
        assert rows.max() < 6 * limit, f"row {int(rows.argmax())}: {rows.max():.2e}"


def random_weights(config: ExpertsConfig, dtype: torch.dtype) -> ExpertWeights:
    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device="cuda")
        return made.normal_(std=fan_in**-0.5)

    count = config.num_experts
    return ExpertWeights(
        normal(*config.gate_up_shape, fan_in=config.hidden_size),
        normal(*config.down_shape, fan_in=config.intermediate_size),
        normal(count, config.up_size) if config.has_bias else None,
        normal(count, config.hidden_size) if config.has_bias else None,
        normal(config.hidden_size) if config.post_norm_eps is not None else None,
    )


def poison() -> None:
    """Fills memory that the caching allocator will hand out with NaN."""
    for size in (2**12, 2**16, 2**20, 2**24):
        for _ in range(4):
            torch.full((size,), float("nan"), device="cuda")


def on_gpu(drawn: Drawn) -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
    tensors = {
        name: None if tensor is None else tensor.cuda()
        for name, tensor in drawn.tensors._asdict().items()
    }
    return (
        drawn.hidden.cuda(),
        drawn.topk_weights.cuda(),
        drawn.topk_ids.cuda(),
        ExpertWeights(**tensors),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_matches_the_oracle(
    kernel: ExpertsKernel, case: ExpertsCase, dtype: torch.dtype, rng: torch.Generator
) -> None:
    drawn = draw(case, dtype, rng)
    if isinstance(kernel, TritonSmallKernel) and choose.small_form(case.config) is not None:
        with pytest.raises(KernelRefusedError, match="use kernel 'triton'"):
            kernel(*on_gpu(drawn), case.config)
        return
    poison()
    inputs = on_gpu(drawn)
    before = [tensor.clone() for tensor in inputs[:3]]
    out = kernel(*inputs, case.config)
    again = kernel(*inputs, case.config)
    assert torch.equal(out, again)
    assert out.dtype == dtype
    for tensor, copy in zip(inputs[:3], before, strict=True):
        assert torch.equal(tensor, copy)
    # A tiny case's accumulation is that of the oracle's bound for any dtype.
    assert_close(out.cpu(), drawn.expected(case.config))


@pytest.mark.parametrize("form", SIZED_FORMS, ids=by_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        (1, (128, 8, 2048, 768)),
        (1, (5, 3, 1000, 333)),
        (3, (16, 4, 512, 640)),
        (33, (16, 4, 520, 648)),
        (200, (7, 7, 250, 130)),
        (1000, (8, 2, 520, 328)),
        (2000, (4, 2, 1024, 512)),
        (2200, (4, 2, 512, 1536)),  # both products walk on compute capability 9.0
    ],
)
def test_matches_the_reference(
    form: dict[str, Any], dtype: torch.dtype, tokens: int, shape: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    experts, top_k, hidden, size = shape
    config = ExpertsConfig(num_experts=experts, hidden_size=hidden, intermediate_size=size, **form)
    inputs = Inputs(config, top_k, tokens, dtype, drop=0.1 if tokens > 1 else 0.0)
    few = tokens < 100 and choose.small_form(config) is None
    kernels = KERNELS if few else KERNELS[1:]
    for kernel in kernels:
        inputs.check(inputs.run(kernel))
    inputs.check(inputs.run(KERNELS[1], batch_invariant=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize(("tma", "persistent"), [(False, 0), (False, 7), (True, 0), (True, 132)])
def test_every_row_tile(
    transposed: bool, interleaved: bool, rows: int, tma: bool, persistent: int, seed: int
) -> None:
    if tma and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need compute capability 9.0")
    torch.manual_seed(seed)
    config = ExpertsConfig(
        num_experts=6,
        hidden_size=512,
        intermediate_size=392,
        transposed=transposed,
        interleaved=interleaved,
    )
    inputs = Inputs(config, 2, 500, torch.bfloat16, drop=0.05)
    tile = choose.Tile(rows=rows, columns=64, depth=64, warps=4, stages=2, tma=tma)
    plan = choose.LargePlan(up=tile, down=replace(tile, persistent=persistent))
    poison()
    arguments = (inputs.hidden, inputs.routing, inputs.ids, inputs.weights, config)
    inputs.check(run_large(*arguments, plan))


WALKED_FORMS: list[dict[str, Any]] = [
    *(form for form in SIZED_FORMS if form != {"transposed": True}),
    {"gated": False, "transposed": True, "has_bias": True},
    {"interleaved": True, "weight_on_input": True},
]


@pytest.mark.skipif(
    REFUSED is None and torch.cuda.get_device_capability()[0] < 9,
    reason="tensor descriptors need compute capability 9.0",
)
@pytest.mark.parametrize("form", WALKED_FORMS, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=by_name)
@pytest.mark.parametrize(
    ("rows", "columns", "warps", "stages"), [(128, 64, 4, 3), (128, 128, 8, 3), (64, 32, 4, 4)]
)
def test_first_products_that_walk(
    form: dict[str, Any],
    dtype: torch.dtype,
    rows: int,
    columns: int,
    warps: int,
    stages: int,
    seed: int,
) -> None:
    """Rows copied into expert order; columns and depths that no tile divides."""
    torch.manual_seed(seed)
    hidden = 512 if form.get("transposed") else 520
    config = ExpertsConfig(num_experts=6, hidden_size=hidden, intermediate_size=392, **form)
    inputs = Inputs(config, 2, 900, dtype, drop=0.05)
    tile = choose.Tile(
        rows=rows, columns=columns, depth=64, warps=warps, stages=stages, tma=True, persistent=132
    )
    poison()
    arguments = (inputs.hidden, inputs.routing, inputs.ids, inputs.weights, config)
    inputs.check(run_large(*arguments, choose.LargePlan(up=tile, down=tile)))


@pytest.mark.skipif(
    REFUSED is None and not support.gpu(0).roles,
    reason="warps with roles need compute capability 9.0 and a Triton that has them",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=by_name)
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 50, 400, 3000])
def test_second_products_by_warps_with_roles(
    tokens: int, stages: int, dtype: torch.dtype, seed: int
) -> None:
    """Columns and depths that no tile divides, tiles whose upper half is padding, few tiles."""
    torch.manual_seed(seed)
    config = ExpertsConfig(num_experts=6, hidden_size=520, intermediate_size=392)
    inputs = Inputs(config, 2, tokens, dtype, drop=0.05)
    up = choose.Tile(rows=128, columns=64, depth=64, warps=4, stages=2)
    rows, columns, depth = choose.ROLE_TILE
    down = choose.Tile(
        rows=rows, columns=columns, depth=depth, warps=8, stages=stages, tma=True, persistent=132,
        halves=True, roles=True,
    )  # fmt: skip
    arguments = (inputs.hidden, inputs.routing, inputs.ids, inputs.weights, config)
    plan = choose.LargePlan(up=up, down=down, pdl=True)
    poison()
    out = run_large(*arguments, plan)
    inputs.check(out)
    poison()
    assert torch.equal(run_large(*arguments, plan), out)


@pytest.mark.skipif(
    REFUSED is None and torch.cuda.get_device_capability()[0] < 9,
    reason="programmatic dependent launch needs compute capability 9.0",
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 40, 700, 1100])
def test_chained_launches(tokens: int, transposed: bool, seed: int) -> None:
    """Each launch starts before the one ahead of it has ended, and reads what that one wrote."""
    torch.manual_seed(seed)
    config = ExpertsConfig(
        num_experts=64, hidden_size=1024, intermediate_size=512, transposed=transposed
    )
    inputs = Inputs(config, 8, tokens, torch.bfloat16)
    arguments = (inputs.routing, inputs.ids, inputs.weights, config)
    kernel = TritonSmallKernel() if tokens <= 4 else TritonLargeKernel()
    graph = torch.cuda.CUDAGraph()
    kernel(inputs.hidden, *arguments)
    torch.cuda.synchronize()
    # Twelve layers in a row, as in a model: each one's input is what the one before made.
    with torch.cuda.graph(graph):
        x = inputs.hidden
        for _ in range(12):
            x = kernel(x, *arguments).mul(40.0).clamp(-3.0, 3.0)
    graph.replay()
    first = x.clone()
    expected = inputs.hidden
    for _ in range(12):
        torch.cuda.synchronize()
        expected = kernel(expected, *arguments)
        torch.cuda.synchronize()
        expected = expected.mul(40.0).clamp(-3.0, 3.0)
    assert torch.equal(first, expected)
    for _ in range(100):
        x.fill_(float("nan"))
        poison()
        graph.replay()
        assert torch.equal(x, first)


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
@pytest.mark.parametrize("tokens", [1, 2, 16, 300])
def test_a_captured_graph_follows_its_inputs(kernel: ExpertsKernel, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = ExpertsConfig(num_experts=16, hidden_size=256, intermediate_size=192)
    inputs = Inputs(config, 4, tokens, torch.bfloat16)
    inputs.run(kernel)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(inputs.hidden, inputs.routing, inputs.ids, inputs.weights, config)
    for drop in (0.0, 0.3, 1.0):
        other = Inputs(config, 4, tokens, torch.bfloat16, drop=drop, weights=inputs.weights)
        inputs.hidden.copy_(other.hidden)
        inputs.ids.copy_(other.ids)
        inputs.routing.copy_(other.routing)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, other.run(kernel))
        if drop < 1:
            other.check(out)
        else:
            assert not out.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_batch_invariant_rows_do_not_see_their_batch(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    config = ExpertsConfig(num_experts=8, hidden_size=520, intermediate_size=328)
    inputs = Inputs(config, 2, 300, dtype)
    for kernel in KERNELS[1:]:
        whole = inputs.run(kernel, batch_invariant=True)
        for start, stop in [(0, 1), (7, 8), (299, 300), (0, 5), (13, 100), (100, 300)]:
            part = inputs.part(start, stop).run(kernel, batch_invariant=True)
            assert torch.equal(part, whole[start:stop])
    inputs = inputs.part(0, 8)
    whole = inputs.run(KERNELS[0], batch_invariant=True)
    for row in range(8):
        part = inputs.part(row, row + 1).run(KERNELS[0], batch_invariant=True)
        assert torch.equal(part, whole[row : row + 1])


@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_the_same_bits_twice(tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = ExpertsConfig(num_experts=32, hidden_size=1024, intermediate_size=512)
    inputs = Inputs(config, 8, tokens, torch.bfloat16)
    first = inputs.run(KERNELS[2])
    for _ in range(20):
        assert torch.equal(inputs.run(KERNELS[2]), first)


@pytest.mark.parametrize("kernel", KERNELS[:2], ids=by_name)
def test_weights_of_more_than_two_to_the_31_elements(kernel: ExpertsKernel, seed: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    torch.manual_seed(seed)
    config = ExpertsConfig(num_experts=40, hidden_size=8192, intermediate_size=4096)
    inputs = Inputs(config, 2, 3, torch.bfloat16)
    inputs.ids[:, 0], inputs.ids[:, 1] = 39, 0
    assert inputs.weights.gate_up.numel() > 2**31
    inputs.check(inputs.run(kernel))


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_strided_weights_and_routing(kernel: ExpertsKernel, seed: int) -> None:
    torch.manual_seed(seed)
    config = ExpertsConfig(num_experts=4, hidden_size=64, intermediate_size=48)
    inputs = Inputs(config, 2, 3, torch.bfloat16)
    expected = inputs.run(kernel)
    weights = inputs.weights
    turned = ExpertWeights(
        weights.gate_up.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((weights.down, weights.down), dim=2)[:, :, :48],
    )
    inputs.weights = turned
    inputs.ids = torch.stack((inputs.ids, inputs.ids), dim=2)[:, :, 0]
    inputs.routing = torch.stack((inputs.routing, inputs.routing), dim=2)[:, :, 0]
    inputs.check(inputs.run(kernel))
    assert (inputs.run(kernel).float() - expected.float()).abs().max() < 0.1


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_bad_input_is_refused_before_a_launch(kernel: ExpertsKernel) -> None:
    config = ExpertsConfig(num_experts=4, hidden_size=64, intermediate_size=48)
    good = Inputs(config, 2, 3, torch.bfloat16)
    arguments = [good.hidden, good.routing, good.ids, good.weights, config]
    for place, bad, words in (
        (0, good.hidden.double(), "float64"),
        (0, good.hidden[:, :60].contiguous(), "60"),
        (0, good.hidden.T.contiguous().T, "contiguous"),
        (0, good.hidden.cpu(), "cpu"),
        (1, good.routing.half(), "float16"),
        (2, good.ids.long(), "int64"),
        (2, good.ids[:2], "shape"),
        (3, random_weights(config, torch.float16), "float16"),
        (3, replace(good.weights, down=good.weights.down.cpu()), "cpu"),
        (4, replace(config, has_bias=True), "gate_up_bias"),
        (4, replace(config, post_norm_eps=1e-6), "norm"),
    ):
        changed = list(arguments)
        changed[place] = bad
        with pytest.raises(InputError, match=words):
            kernel(*changed)
