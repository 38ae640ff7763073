"""`fuse(dense=True)`: what stands around the experts, fused and against the original."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moetor
from moetor.errors import FusionError, FusionMismatchError
from moetor.huggingface import dense_fusing
from moetor.huggingface.dense_fusing import is_dense_fused, unfuse_dense
from moetor.huggingface.dense_products import GatedMLPForward, JoinedPart, JoinedProduct
from moetor.tools.tiny.calls import generate_of, logits_of, tiny_inputs
from moetor.tools.tiny.models import tiny_model

# Family: parts that are fused in it, among them all that matter for its speed.
FAMILIES = {
    "qwen3_moe": {"norm": 13, "product": 4, "attention": 3, "layer": 3, "mlp": 1},
    "qwen2_moe": {"norm": 7, "product": 6, "attention": 3, "layer": 3, "mlp": 3},
    "mixtral": {"norm": 7, "product": 3, "attention": 3, "layer": 3},
    "olmoe": {"norm": 13, "product": 3, "attention": 3, "layer": 3},
    "gpt_oss": {"norm": 7, "product": 3, "attention": 3, "layer": 3},
    "glm4_moe": {"attention": 3, "layer": 3},
    "ernie4_5_moe": {"attention": 3, "layer": 3},
    "minimax_m2": {"attention": 3, "layer": 3},
    "qwen3_vl_moe": {"layer": 3},
    "deepseek_v3": {"layer": 3},
    "llama4": {"layer": 3},
    "qwen3_next": {"layer": 3},
    "granitemoe": {"attention": 3},  # its layers scale what they add
    "gemma4": {},
    "cohere2_moe": {},
    "nemotron_h": {},
    "doge": {},
    "dbrx": {},
}


def counts(report: moetor.FusionReport) -> Counter[str]:
    return Counter(part.kind for part in report.dense if part.done)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(family, model)
    logits, tokens = logits_of(family, model, inputs), generate_of(family, model, inputs)
    names = {name: value.clone() for name, value in model.state_dict().items()}
    report = moetor.fuse(model, dense=True)
    fused = logits_of(family, model, inputs)
    assert (fused - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert tokens is not None
    again = generate_of(family, model, inputs)
    assert again is not None
    assert torch.equal(again, tokens)
    found = counts(report)
    assert {kind: found[kind] for kind in FAMILIES[family]} == FAMILIES[family]
    assert all(part.reason for part in report.dense if not part.done)
    state = model.state_dict()
    assert state.keys() == names.keys()
    assert all(torch.equal(state[name], value) for name, value in names.items())
    moetor.unfuse(model)
    assert not is_dense_fused(model)
    assert torch.equal(logits_of(family, model, inputs), logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen2_moe"])
def test_bfloat16(family: str) -> None:
    """Most tokens agree to a few roundings; a nearly tied expert may change one."""
    model = tiny_model(family, torch.bfloat16)
    inputs = tiny_inputs(family, model)
    logits = logits_of(family, model, inputs)
    report = moetor.fuse(model, dense=True)
    deviation = (logits_of(family, model, inputs) - logits).abs().amax(-1)
    assert deviation.median() < 0.05 * logits.abs().max()
    assert counts(report)["layer"] == 3


def test_padding_and_more_sequences() -> None:
    model = tiny_model("qwen3_moe")
    ids = torch.randint(3, 90, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :9] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        moetor.fuse(model, dense=True)
        after = model(input_ids=ids, attention_mask=mask).logits
    kept = mask.bool()
    assert torch.allclose(after[kept], before[kept], atol=1e-5 * before.abs().max().item())


def qkv(model: Any) -> list[nn.Linear]:
    attention = model.model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def test_weights_are_views_of_one_buffer() -> None:
    model = tiny_model("qwen3_moe")
    moetor.fuse(model, dense=True)
    storages = {linear.weight.untyped_storage().data_ptr() for linear in qkv(model)}
    assert len(storages) == 1
    (buffer,) = {linear.forward.product.weight for linear in qkv(model)}
    assert buffer.numel() == sum(linear.weight.numel() for linear in qkv(model))
    # A checkpoint that is loaded now is what the product computes with.
    with torch.no_grad():
        qkv(model)[1].weight.fill_(2.0)
    assert (buffer == 2.0).sum() == qkv(model)[1].weight.numel()


def test_moved_parameters_are_not_forgotten() -> None:
    """After `model.to` the parameters are no views any more; results follow them."""
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs("qwen3_moe", model)
    moetor.fuse(model, dense=True)
    model.double().float()
    for linear in qkv(model):
        linear.weight.data.mul_(-1.5)
    after = logits_of("qwen3_moe", model, inputs)
    moetor.unfuse(model)
    wanted = logits_of("qwen3_moe", model, inputs)
    assert (after - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs("qwen3_moe", model)
    moetor.fuse(model, dense=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    wanted = logits_of("qwen3_moe", model, inputs)
    assert (logits_of("qwen3_moe", loaded, inputs) - wanted).abs().max() < 1e-4


def test_static_cache_and_compilation() -> None:
    model = tiny_model("mixtral")
    ids = torch.randint(3, 90, (1, 9))
    call = {"do_sample": False, "max_new_tokens": 6, "cache_implementation": "static"}
    wanted = model.generate(ids, **call)
    moetor.fuse(model, dense=True)
    assert torch.equal(model.generate(ids, **call), wanted)


def test_gradients_pass_through_what_is_not_an_expert() -> None:
    model = tiny_model("qwen3_moe")
    moetor.fuse(model, dense=True)
    linears = qkv(model)
    for linear in linears:
        linear.requires_grad_(True)
    x = torch.randn(2, linears[0].in_features)
    for linear in linears:
        linear(x).sum().backward()
        assert linear.weight.grad is not None
        assert torch.allclose(linear.weight.grad, x.sum(0).expand_as(linear.weight), atol=1e-5)


def test_joined_modules_out_of_turn() -> None:
    """A part that is asked for twice, or with another tensor, is computed again."""
    linears = [nn.Linear(6, size).requires_grad_(False) for size in (4, 3)]
    x, y = torch.randn(2, 6), torch.randn(2, 6)
    wanted = {
        (i, n): linear(v) for i, linear in enumerate(linears) for n, v in (("x", x), ("y", y))
    }
    product = JoinedProduct(linears, contiguous=True)
    product.install()
    for i, name in ((0, "x"), (0, "x"), (1, "y"), (0, "x"), (1, "x"), (1, "x"), (0, "y")):
        found = linears[i](x if name == "x" else y)
        assert found.is_contiguous()
        assert torch.allclose(found, wanted[i, name], atol=1e-6)
    product.remove()
    assert not isinstance(linears[0].__dict__.get("forward"), JoinedPart)
    assert linears[0].weight.untyped_storage().nbytes() == 4 * 6 * 4


def test_gated_mlp_needs_its_activation() -> None:
    """An activation that is not known leaves gate and up in one product, and the rest alone."""
    model = tiny_model("qwen2_moe")
    for module in model.modules():
        if isinstance(getattr(module, "gate_proj", None), nn.Linear):
            module.act_fn = nn.Softsign()
    report = moetor.fuse(model, dense=True)
    assert counts(report)["mlp"] == 0
    assert not any(isinstance(m.__dict__.get("forward"), GatedMLPForward) for m in model.modules())


def test_off_by_default_and_refusals() -> None:
    model = tiny_model("qwen3_moe")
    report = moetor.fuse(model)
    assert report.dense == []
    assert not is_dense_fused(model)
    assert "around the experts" not in str(report)
    moetor.unfuse(model)
    report = moetor.fuse(model, dense=True)
    assert "around the experts: 13 x norm" in str(report)
    assert report.to_dict()["dense"]
    with pytest.raises(FusionError, match="fused already"):
        moetor.fuse(model, dense=True)


def test_a_wrong_whole_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the trial of the layers to let a wrong one pass, the model's logits would show it."""
    model = tiny_model("granitemoe")
    inputs = tiny_inputs("granitemoe", model)
    before = logits_of("granitemoe", model, inputs)
    monkeypatch.setattr(dense_fusing, "layer_error", lambda made, call: 0.0)
    with pytest.raises(FusionMismatchError, match="logits differ"):
        moetor.fuse(model, dense=True)
    assert not is_dense_fused(model)
    assert unfuse_dense(model) == 0
    moetor.unfuse(model)
    assert torch.equal(logits_of("granitemoe", model, inputs), before)
