"""Whole MoE blocks fused: the same numbers, and a model that still is one of Transformers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tiny import (
    DEEPSEEK_V3,
    FAMILIES,
    GPT_OSS,
    MIXTRAL,
    QWEN2,
    VARIANTS,
    Tiny,
    block_paths,
    bound,
    classes_of,
    fused_blocks,
    logits_of,
    relative,
    safetensors_of,
    same_tensors,
    some_hidden,
    some_ids,
    tensors_of,
)
from torch import Tensor

import moetor
from moetor.config import RunnerConfig

ALL = (*FAMILIES, *VARIANTS)
families = pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
all_cases = pytest.mark.parametrize("tiny", ALL, ids=lambda tiny: tiny.id)


def fuse_whole(model: Any, tiny: Tiny, **options: Any) -> moetor.FusionReport:
    """Fuses, and insists on level `block` for every block."""
    paths = block_paths(model, tiny)
    assert len(paths) == tiny.blocks
    report = moetor.fuse(model, **options)
    assert [(b.name, b.level, b.family_block, b.reason) for b in report.blocks] == [
        (path, "block", tiny.block, "") for path in paths
    ]
    return report


def answer(block: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """What a block returns, always as a tuple."""
    with torch.no_grad():
        out = block(hidden.clone())
    return out if isinstance(out, tuple) else (out,)


@all_cases
def test_logits_float32(tiny: Tiny) -> None:
    model = tiny.build()
    before = logits_of(model)
    report = fuse_whole(model, tiny)
    assert relative(logits_of(model), before) <= 1e-5
    for block in report.blocks:
        assert block.max_error is not None
        assert block.max_error <= bound(torch.float32)


@families
def test_seeds_differ(tiny: Tiny) -> None:
    """The comparison means something: another model's logits are far away."""
    assert relative(logits_of(tiny.build(seed=1)), logits_of(tiny.build(seed=2))) > 0.1


@all_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_block_half_precision(tiny: Tiny, dtype: torch.dtype) -> None:
    """One block at a time, on the same input.

    Both sides compute the router's logits by the same product in the same dtype, so they route
    alike and what differs is rounding alone. Across layers that would not hold: a rounded hidden
    state may tip a near tie in the next router, and two correct implementations part.
    """
    original = tiny.build(dtype=dtype)
    fused = copy.deepcopy(original)
    fuse_whole(fused, tiny)
    for number, path in enumerate(block_paths(original, tiny)):
        size = original.config.hidden_size
        hidden = some_hidden(size, 60, seed=10 + number, dtype=dtype)
        theirs = answer(original.get_submodule(path), hidden)
        ours = answer(fused.get_submodule(path), hidden)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert relative(a, b) <= bound(dtype)


@all_cases
def test_model_bfloat16_is_no_less_accurate(tiny: Tiny) -> None:
    """Logits in bfloat16 against the same weights in float32.

    A near tie that rounding tips makes single tokens differ by a whole expert, in the original as
    in the fused model, so tokens are judged by the median of their errors: half of them without
    such a tip. We round less often than the original, hence no more than a quarter above its error.
    """
    original = tiny.build(dtype=torch.bfloat16)
    ids = some_ids(4, 32)
    exact = logits_of(copy.deepcopy(original).float(), ids).double()
    fused = copy.deepcopy(original)
    fuse_whole(fused, tiny)

    def error(logits: Tensor) -> float:
        return float((logits.double() - exact).norm(dim=-1).median() / exact.norm(dim=-1).median())

    theirs, ours = error(logits_of(original, ids)), error(logits_of(fused, ids))
    assert theirs < 0.2, "the original itself must stand for something"
    assert ours <= 1.25 * theirs


@families
def test_greedy_generation(tiny: Tiny) -> None:
    model = tiny.build()
    ids = some_ids(3, 9)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    fuse_whole(model, tiny)
    after = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert after.tolist() == before.tolist()
    assert len(set(after[:, 9:].flatten().tolist())) > 3, (
        "a model that repeats itself proves little"
    )


@families
@pytest.mark.parametrize("recorded_before", [True, False], ids=["hooks-before", "hooks-after"])
@pytest.mark.parametrize("level", ["block", "experts"])
def test_output_router_logits(tiny: Tiny, recorded_before: bool, level: Any) -> None:
    """Transformers records router logits by hooks that it installs at the first such call."""
    reference, model = tiny.build(), tiny.build()
    ids = some_ids()
    with torch.no_grad():
        expected = reference(ids, output_router_logits=True)
        if recorded_before:
            model(ids, output_router_logits=True)
        moetor.fuse(model, level=level)
        got = model(ids, output_router_logits=True)
        again = model(ids, output_router_logits=True)
    assert len(expected.router_logits) == tiny.blocks
    assert len(got.router_logits) == tiny.blocks
    for ours, repeated, theirs in zip(
        got.router_logits, again.router_logits, expected.router_logits, strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert relative(ours, theirs) <= 1e-5
        assert torch.equal(ours, repeated)
    assert relative(got.logits, expected.logits) <= 1e-5
    if getattr(expected, "aux_loss", None) is not None:
        torch.testing.assert_close(got.aux_loss, expected.aux_loss)


@families
def test_router_logits_in_bfloat16_keep_their_dtype(tiny: Tiny) -> None:
    model = tiny.build(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(some_ids(), output_router_logits=True).router_logits
        moetor.fuse(model)
        got = model(some_ids(), output_router_logits=True).router_logits
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    # The first router sees the same input on both sides.
    assert torch.equal(got[0], expected[0])


@families
@pytest.mark.parametrize("level", ["block", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_model_loads_in_plain_transformers(
    tiny: Tiny, level: Any, dtype: torch.dtype, tmp_path: Any
) -> None:
    """What a fused model saves is, file for file, what the original saves."""
    model = tiny.build(dtype=dtype)
    tensors, names = tensors_of(model), {name for name, _ in model.named_parameters()}
    model.save_pretrained(tmp_path / "plain")
    moetor.fuse(model, level=level)
    assert same_tensors(tensors_of(model), tensors) == []
    assert {name for name, _ in model.named_parameters()} == names
    model.save_pretrained(tmp_path / "fused")
    files = {folder: safetensors_of(tmp_path / folder) for folder in ("plain", "fused")}
    assert same_tensors(files["fused"], files["plain"]) == []
    assert (tmp_path / "fused/config.json").read_text() == (
        tmp_path / "plain/config.json"
    ).read_text()
    loaded, plain = (
        tiny.model_class.from_pretrained(tmp_path / folder, experts_implementation="eager").eval()
        for folder in ("fused", "plain")
    )
    assert same_tensors(tensors_of(loaded), tensors_of(plain)) == []
    assert torch.equal(logits_of(loaded), logits_of(plain))


@families
@pytest.mark.parametrize("level", ["block", "experts"])
def test_unfuse_restores_the_very_modules(tiny: Tiny, level: Any) -> None:
    model = tiny.build()
    modules = dict(model.named_modules())
    attributes = {path: set(module.__dict__) for path, module in modules.items()}
    before = logits_of(model)
    moetor.fuse(model, level=level)
    logits_of(model)
    assert moetor.unfuse(model) == tiny.blocks
    after = dict(model.named_modules())
    assert list(after) == list(modules), "the same modules in the same order"
    assert all(after[path] is module for path, module in modules.items())
    assert {path: set(module.__dict__) for path, module in after.items()} == attributes
    assert torch.equal(logits_of(model), before)
    assert moetor.unfuse(model) == 0


@families
def test_fuse_again_after_unfuse(tiny: Tiny) -> None:
    model = tiny.build()
    moetor.fuse(model)
    first = logits_of(model)
    moetor.unfuse(model)
    fuse_whole(model, tiny)
    assert torch.equal(logits_of(model), first)


def _deepcopied(model: Any) -> Any:
    return copy.deepcopy(model)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved_whole(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("tiny", [QWEN2, DEEPSEEK_V3, GPT_OSS], ids=lambda tiny: tiny.id)
@pytest.mark.parametrize("level", ["block", "experts"])
@pytest.mark.parametrize("duplicate", [_deepcopied, _pickled, _saved_whole])
def test_copies(tiny: Tiny, level: Any, duplicate: Any) -> None:
    """A copy is a model of its own: another's weights, or its end, do not touch it."""
    model = tiny.build()
    before = logits_of(model)
    moetor.fuse(model, level=level)
    fused = logits_of(model)
    twin = duplicate(model)
    assert torch.equal(logits_of(twin), fused)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(twin), fused)
    del model
    assert torch.equal(logits_of(twin), fused)
    assert moetor.unfuse(twin) == tiny.blocks
    assert torch.equal(logits_of(twin), before)


@families
@pytest.mark.parametrize("level", ["block", "experts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cast_after_fusing(tiny: Tiny, level: Any, dtype: torch.dtype) -> None:
    model, cast_first = tiny.build(), tiny.build().to(dtype)
    expected = tensors_of(cast_first)
    moetor.fuse(model, level=level)
    model.to(dtype)
    assert same_tensors(tensors_of(model), expected) == []
    # Recognised in float32, the gate product of the two may differ in precision; the experts not.
    logits = logits_of(model)
    assert logits.dtype == dtype
    moetor.unfuse(model)
    assert torch.equal(logits_of(model), logits_of(tiny.build().to(dtype)))


@families
def test_cast_to_float64_computes_in_float64(tiny: Tiny) -> None:
    """Kernels are chosen by the present dtype, not by that at the time of fusing."""
    model, plain = tiny.build(), tiny.build()
    plain.set_experts_implementation("eager")  # the default has no float64
    moetor.fuse(model, kernel="torch")
    model.double()
    plain.double()
    assert relative(logits_of(model), logits_of(plain)) <= 1e-6


@families
@pytest.mark.parametrize("level", ["block", "experts"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_weights_loaded_after_fusing_take_effect(tiny: Tiny, level: Any, assign: bool) -> None:
    model, other = tiny.build(seed=3), tiny.build(seed=4)
    expected = logits_of(other)
    moetor.fuse(model, level=level)
    logits_of(model)
    model.load_state_dict(tensors_of(other), assign=assign)
    assert relative(logits_of(model), expected) <= 1e-5
    moetor.unfuse(model)
    assert torch.equal(logits_of(model), expected), "the originals got the new tensors back"


@families
@pytest.mark.parametrize("kernel", ["torch", "reference", "native"])
def test_named_kernel_is_the_one_that_runs(
    tiny: Tiny, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moetor.kernels.select import KERNELS

    model = tiny.build()
    before = logits_of(model)
    report = fuse_whole(model, tiny, kernel=kernel)
    assert report.kernels == (kernel,)
    calls: list[str] = []
    for one in KERNELS:
        run = type(one).__call__

        def spy(self: Any, *args: Any, run: Any = run, **kwargs: Any) -> Tensor:
            calls.append(self.name)
            result: Tensor = run(self, *args, **kwargs)
            return result

        monkeypatch.setattr(type(one), "__call__", spy)
    assert relative(logits_of(model), before) <= 1e-5
    assert calls == [kernel] * tiny.blocks


@all_cases
def test_monolithic_equals_modular_bitwise(tiny: Tiny) -> None:
    modular, monolithic = tiny.build(), tiny.build()
    fuse_whole(modular, tiny, quantization="unquantized")
    fuse_whole(monolithic, tiny, quantization="unquantized_monolithic")
    assert {b.routed_experts.method.name for b in fused_blocks(modular)} == {"unquantized"}
    assert {b.routed_experts.method.name for b in fused_blocks(monolithic)} == {
        "unquantized_monolithic"
    }
    assert torch.equal(logits_of(monolithic), logits_of(modular))


@families
@pytest.mark.parametrize("level", ["block", "experts"])
@pytest.mark.parametrize("kernel", ["torch", "native"])
def test_chunked_equals_unchunked(tiny: Tiny, level: Any, kernel: str) -> None:
    """A chunk holds other tokens than the whole, so bits agree only where the batch has no say."""
    whole, chunked = tiny.build(), tiny.build()
    common = {"level": level, "kernel": kernel}
    runner = RunnerConfig(batch_invariant=True)
    small = RunnerConfig(name="chunked", workspace_bytes=10_000, batch_invariant=True)
    moetor.fuse(whole, runner=runner, **common)
    moetor.fuse(chunked, runner=small, **common)
    assert torch.equal(logits_of(chunked), logits_of(whole))


@families
def test_few_and_no_tokens(tiny: Tiny) -> None:
    original = tiny.build()
    fused = copy.deepcopy(original)
    fuse_whole(fused, tiny)
    path = block_paths(original, tiny)[0]
    ours, theirs = fused.get_submodule(path), original.get_submodule(path)
    size = original.config.hidden_size
    for tokens in (1, 2):
        hidden = some_hidden(size, tokens)
        for a, b in zip(answer(ours, hidden), answer(theirs, hidden), strict=True):
            assert relative(a, b) <= 1e-5
    assert answer(ours, torch.empty(1, 0, size))[0].shape == (1, 0, size)


@families
def test_input_is_not_written_to(tiny: Tiny) -> None:
    model = tiny.build()
    path = block_paths(model, tiny)[0]
    moetor.fuse(model)
    hidden = some_hidden(model.config.hidden_size)
    kept = hidden.clone()
    with torch.no_grad():
        model.get_submodule(path)(hidden)
    assert torch.equal(hidden, kept)


@families
def test_strided_input(tiny: Tiny) -> None:
    """Hidden states that are a view with gaps, batch and sequence swapped."""
    original = tiny.build()
    fused = copy.deepcopy(original)
    moetor.fuse(fused)
    path = block_paths(original, tiny)[0]
    hidden = some_hidden(2 * original.config.hidden_size, 12)[..., ::2].unflatten(1, (3, 4))
    hidden = hidden.squeeze(0).transpose(0, 1)
    assert not hidden.is_contiguous()
    theirs = answer(original.get_submodule(path), hidden.contiguous())
    with torch.no_grad():
        ours = fused.get_submodule(path)(hidden)
    ours = ours if isinstance(ours, tuple) else (ours,)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) <= 1e-5


def test_left_padded_batch_generates_like_its_rows() -> None:
    model = QWEN2.build()
    moetor.fuse(model)
    rows = [some_ids(1, 5, seed=5)[0], some_ids(1, 9, seed=6)[0]]
    padded, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, 9 - len(row) :] = row
        mask[place, 9 - len(row) :] = 1
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(padded, attention_mask=mask, **settings)[:, 9:]
    for place, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings)
        assert together[place].tolist() == alone[0, len(row) :].tolist()


def test_two_fused_models_do_not_mix() -> None:
    """Both have a layer of the same name, by which the ops find it."""
    one, two = MIXTRAL.build(seed=5), MIXTRAL.build(seed=6)
    plain = logits_of(one), logits_of(two)
    moetor.fuse(one)
    moetor.fuse(two)
    names = [layer.name for model in (one, two) for layer in fused_blocks(model)]
    assert len(set(names)) == len(names)
    assert relative(logits_of(one), plain[0]) <= 1e-5
    assert relative(logits_of(two), plain[1]) <= 1e-5


@pytest.mark.parametrize("tiny", [DEEPSEEK_V3, GPT_OSS], ids=lambda tiny: tiny.id)
def test_compile_fullgraph(tiny: Tiny) -> None:
    """A block with shared experts and a selection bias, and one that returns a tuple."""
    model = tiny.build()
    before = logits_of(model)
    fuse_whole(model, tiny)
    eager = logits_of(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    got = logits_of(compiled)
    assert relative(got, eager) <= 1e-5
    assert relative(got, before) <= 1e-5


@pytest.mark.parametrize("tiny", [QWEN2, GPT_OSS], ids=lambda tiny: tiny.id)
def test_compiled_model_sees_new_weights(tiny: Tiny) -> None:
    """Weights are not part of the graph: tensors assigned after compiling must still be used."""
    model, other = tiny.build(seed=7), tiny.build(seed=8)
    expected = logits_of(other)
    moetor.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    logits_of(compiled)
    model.load_state_dict(tensors_of(other), assign=True)
    assert relative(logits_of(compiled), expected) <= 1e-5


def test_print_shows_the_fused_layer() -> None:
    model = QWEN2.build()
    report = moetor.fuse(model)
    assert "10 experts" in repr(model)
    text = str(report)
    for path in block_paths(QWEN2.build(), QWEN2):
        assert path in text
    assert "Qwen2MoeSparseMoeBlock" in text
    assert "2 MoE blocks: 2 at level block" in text
    assert (
        classes_of(model)["model.layers.0.mlp"]
        is not classes_of(QWEN2.build())["model.layers.0.mlp"]
    )
