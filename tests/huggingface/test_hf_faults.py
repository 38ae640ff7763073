"""What `fuse` refuses, and that a refusal leaves the model as it was, to the last bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import (
    DEEPSEEK_V3,
    GPT_OSS,
    MIXTRAL,
    QWEN2,
    QWEN3,
    Tiny,
    block_paths,
    classes_of,
    fused_blocks,
    logits_of,
    relative,
    some_ids,
    tensors_of,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moetor
from moetor.config import RunnerConfig
from moetor.errors import (
    ConfigError,
    FusionError,
    FusionMismatchError,
    InputError,
    KernelRefusedError,
    MoetorError,
    UnsupportedError,
)
from moetor.huggingface import block_form

SOME = pytest.mark.parametrize("tiny", [MIXTRAL, DEEPSEEK_V3, GPT_OSS], ids=lambda tiny: tiny.id)


class Untouched:
    """A model whose modules, tensors and logits are remembered."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.classes = classes_of(model)
        self.attributes = {path: set(m.__dict__) for path, m in self.modules.items()}
        self.tensors = tensors_of(model)
        self.addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
        self.logits = None if model.training else logits_of(model)

    def check(self) -> None:
        modules = dict(self.model.named_modules())
        assert list(modules) == list(self.modules)
        assert all(modules[path] is module for path, module in self.modules.items())
        assert classes_of(self.model) == self.classes
        assert {path: set(m.__dict__) for path, m in modules.items()} == self.attributes
        assert {n: p.data_ptr() for n, p in self.model.named_parameters()} == self.addresses
        tensors = tensors_of(self.model)
        assert all(torch.equal(tensors[name], kept) for name, kept in self.tensors.items())
        if self.logits is not None:
            assert torch.equal(logits_of(self.model), self.logits)


@dataclasses.dataclass(frozen=True)
class BadCall:
    id: str
    options: dict[str, Any]
    error: type[MoetorError]
    text: str


BAD_CALLS = (
    BadCall("level", {"level": "blocks"}, ConfigError, "'blocks'.*auto, block, experts"),
    BadCall("level-none", {"level": None}, ConfigError, "None.*auto, block, experts"),
    BadCall("kernel", {"kernel": "cuda"}, KernelRefusedError, "'cuda'.*native.*torch"),
    BadCall("kernel-case", {"kernel": "Native"}, KernelRefusedError, "'Native'"),
    BadCall("quantization", {"quantization": "int3"}, ConfigError, "'int3'.*int8.*int4"),
    BadCall(
        "two-kernels",
        {"kernel": "torch", "runner": RunnerConfig(kernel="native")},
        ConfigError,
        "disagree",
    ),
    BadCall("padding", {"runner": RunnerConfig(hidden_multiple=128)}, ConfigError, "cannot pad"),
    BadCall(
        "reduce-without-a-group",
        {"runner": RunnerConfig(reduce_results=True)},
        ConfigError,
        "process_group",
    ),
    BadCall(
        "quantization-of-experts-alone",
        {"level": "experts", "quantization": "unquantized_monolithic"},
        ConfigError,
        "level 'experts'.*quant method",
    ),
)


@pytest.mark.parametrize("call", BAD_CALLS, ids=lambda call: call.id)
def test_bad_calls(call: BadCall) -> None:
    kept = Untouched(QWEN3.build())
    with pytest.raises(call.error, match=call.text) as caught:
        moetor.fuse(kept.model, **call.options)
    assert "\n" not in str(caught.value)
    kept.check()


@pytest.mark.parametrize("level", ["auto", "block", "experts"])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_kernel_that_refuses(level: Any, verify: bool) -> None:
    """The native kernel has no float64; it was named, so nothing else may run instead."""
    model = QWEN3.build().double()
    kept = Untouched(model)
    with pytest.raises(KernelRefusedError, match=r"'native'.*float64.*torch"):
        moetor.fuse(model, level=level, kernel="native", verify=verify)
    kept.check()
    report = moetor.fuse(model, level=level)
    assert report.kernels == ("torch",)
    assert kept.logits is not None
    assert relative(logits_of(model), kept.logits) <= 1e-10


@SOME
@pytest.mark.parametrize("level", ["block", "experts"])
def test_fuse_twice(tiny: Tiny, level: Any) -> None:
    model = tiny.build()
    moetor.fuse(model, level=level)
    kept = Untouched(model)
    for again in ("auto", "block", "experts"):
        with pytest.raises(FusionError, match=r"fused already.*unfuse"):
            moetor.fuse(model, level=again)
    kept.check()


def test_model_without_experts() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, intermediate_size=48, num_hidden_layers=2, **sizes)
    kept = Untouched(LlamaForCausalLM(config).eval())
    report = moetor.fuse(kept.model)
    assert len(report.blocks) == 0
    assert report.kernels == ()
    assert "0 MoE blocks" in str(report)
    kept.check()
    assert moetor.unfuse(kept.model) == 0
    plain = nn.Sequential(nn.Linear(3, 3)).eval()
    assert len(moetor.fuse(plain).blocks) == 0


def test_training_mode() -> None:
    kept = Untouched(QWEN2.build().train())
    with pytest.raises(FusionError, match=r"training mode.*model\.eval\(\)"):
        moetor.fuse(kept.model)
    kept.check()


def test_training_after_fusing_is_refused_not_silent() -> None:
    model = QWEN2.build()
    moetor.fuse(model)
    model.train()
    with pytest.raises(UnsupportedError, match=r"inference.*unfuse"):
        model(input_ids=some_ids(), labels=some_ids())
    moetor.unfuse(model)
    model(input_ids=some_ids(), labels=some_ids()).loss.backward()
    gradient = model.model.layers[0].mlp.experts.down_proj.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("level", ["block", "experts"])
def test_gradients_through_a_fused_model_are_never_silently_missing(level: Any) -> None:
    """In eval mode with gradients enabled: an error, or right gradients, but not none at all."""
    model, plain = QWEN2.build(), QWEN2.build()
    moetor.fuse(model, level=level)
    try:
        model(input_ids=some_ids(), labels=some_ids()).loss.backward()
    except (RuntimeError, NotImplementedError):
        return
    plain(input_ids=some_ids(), labels=some_ids()).loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        if expected is not None and float(expected.abs().max()) > 0:
            assert parameter.grad is not None, name
            assert relative(parameter.grad, expected) <= 1e-4, name


def test_frozen_parameters_in_training_mode() -> None:
    """`fuse` takes such a model; then it must run, too."""
    model = QWEN2.build().requires_grad_(False)
    before = logits_of(model)
    model.train()
    moetor.fuse(model)
    assert relative(logits_of(model), before) <= 1e-5


def _wrong(config: Any) -> Any:
    if config.score_order == "after_topk":  # a softmax of the kept sums to one in any case
        return dataclasses.replace(config, scaling_factor=2 * config.scaling_factor)
    return dataclasses.replace(config, logit_multiplier=1.3)


def break_recognition(monkeypatch: pytest.MonkeyPatch, only: Any) -> None:
    """Recognises the routers of the blocks that `only` picks wrongly."""
    right = block_form.recognise_router

    def recognise(router: nn.Module, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = right(router, block, *args, **kwargs)
        return dataclasses.replace(found, config=_wrong(found.config)) if only(block) else found

    monkeypatch.setattr(block_form, "recognise_router", recognise)


@SOME
@pytest.mark.parametrize("level", ["auto", "block"])
def test_wrong_recognition_is_caught(
    tiny: Tiny, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Untouched(tiny.build())
    first = block_paths(kept.model, tiny)[0]
    break_recognition(monkeypatch, lambda block: True)
    with pytest.raises(FusionMismatchError, match=rf"block '{first}'.*nothing was changed"):
        moetor.fuse(kept.model, level=level)
    kept.check()


@SOME
def test_failure_in_the_last_block_leaves_the_first_unfused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Untouched(tiny.build(num_hidden_layers=4))
    paths = block_paths(kept.model, tiny)
    last = kept.model.get_submodule(paths[-1])
    break_recognition(monkeypatch, lambda block: block is last)
    done: list[str] = []
    with pytest.raises(FusionMismatchError, match=paths[-1]):
        moetor.fuse(kept.model, progress=lambda number, total, name: done.append(name))
    assert done == paths[:-1], "the others had been prepared"
    kept.check()


def test_unverified_takes_what_was_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify=False` trusts: the broken recognition above goes through, and shows."""
    model = MIXTRAL.build()
    before = logits_of(model)
    break_recognition(monkeypatch, lambda block: True)
    report = moetor.fuse(model, verify=False)
    assert {block.max_error for block in report.blocks} == {None}
    assert relative(logits_of(model), before) > 1e-2


def test_experts_that_compute_something_else_are_left_alone() -> None:
    """A subclass whose forward adds something that no parameter and no flag tells of."""
    model = QWEN3.build()
    for layer in model.model.layers:
        experts = layer.mlp.experts

        class Odd(type(experts)):  # type: ignore[misc]
            def forward(self, *args: Any) -> Tensor:
                return super().forward(*args) * 1.5

        experts.__class__ = Odd
    kept = Untouched(model)
    with pytest.raises(FusionMismatchError):
        moetor.fuse(model, level="experts")
    kept.check()
    with pytest.raises(FusionMismatchError):
        moetor.fuse(model)
    kept.check()


def test_wrapped_forward_is_left_alone() -> None:
    """A hook of a device map or of tensor parallelism replaces `forward` on the instance."""
    model = QWEN3.build()
    block = model.model.layers[0].mlp
    original = block.forward
    block.forward = lambda hidden_states: original(hidden_states) * 1.0
    experts = model.model.layers[1].mlp.experts
    inner = experts.forward
    experts.forward = lambda *args: inner(*args) * 1.0
    before = logits_of(model)
    report = moetor.fuse(model)
    assert [one.level for one in report.blocks] == ["experts", "none"]
    assert all("hook" in one.reason for one in report.blocks)
    assert relative(logits_of(model), before) <= 1e-5


def test_the_block_itself_is_no_model() -> None:
    kept = QWEN3.build().model.layers[0].mlp
    names = set(kept.gate.__dict__)
    with pytest.raises(FusionError, match="MoE block"):
        moetor.fuse(kept)
    assert set(kept.gate.__dict__) == names


def test_more_experts_per_token_than_experts() -> None:
    """Transformers builds such a model and cannot run it; its routing is no routing of ours."""
    kept = QWEN3.build(num_experts_per_tok=9)
    with pytest.raises(RuntimeError):
        logits_of(kept)
    report = moetor.fuse(kept)
    assert report.count("block") == 0
    assert all(block.reason for block in report.blocks)


def test_mixed_up_input_names_the_layer() -> None:
    model = QWEN3.build()
    moetor.fuse(model)
    block = fused_blocks(model)[0]
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp.*66"):
        block(torch.zeros(1, 3, 65))


@pytest.mark.parametrize("level", ["block", "experts"])
def test_hooks_of_the_user_are_not_dropped(level: Any) -> None:
    """They still run, or the block is left alone and the report says why."""
    model = QWEN3.build()
    seen: list[str] = []
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda *args: seen.append("block"))
    block.experts.register_forward_hook(lambda *args: seen.append("experts"))
    if level == "block":
        with pytest.raises(FusionError, match="a forward hook on its experts would not run"):
            moetor.fuse(model, level=level)
    moetor.fuse(model)
    assert not seen, "the comparison of block and replacement is no call of the user's"
    logits_of(model)
    assert seen == ["experts", "block"]


def test_hooks_on_a_block_survive_fusing() -> None:
    model = QWEN3.build()
    seen: list[str] = []
    block = model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = block.register_forward_hook(lambda *_: seen.append("after"))
    block.gate.register_forward_hook(lambda *_: seen.append("gate"))
    report = moetor.fuse(model)
    assert report.blocks[0].level == "block"
    assert not seen
    logits_of(model)
    assert seen == ["before", "gate", "after"]
    handle.remove()
    logits_of(model)
    assert seen[3:] == ["before", "gate"]
    moetor.unfuse(model)
    logits_of(model)
    assert seen[5:] == ["before", "gate"]


def test_report_is_plain_data() -> None:
    import json

    model = DEEPSEEK_V3.build()
    report = moetor.fuse(model, kernel="torch")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["kernels"] == ["torch"]
    assert [block["name"] for block in data["blocks"]] == [
        "model.layers.1.mlp",
        "model.layers.2.mlp",
    ]
    assert {block["level"] for block in data["blocks"]} == {"block"}


def test_progress_counts_every_block() -> None:
    model = QWEN3.build()
    calls: list[tuple[int, int, str]] = []
    moetor.fuse(model, progress=lambda done, total, name: calls.append((done, total, name)))
    assert calls == [(1, 2, "model.layers.0.mlp"), (2, 2, "model.layers.1.mlp")]
