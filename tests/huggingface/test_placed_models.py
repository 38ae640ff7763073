"""Fused models under accelerate's device maps, and with PEFT's adapters on their attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEEPSEEK_V3, OLMOE, QWEN2, Tiny, fused_blocks, logits_of, relative, some_ids
from torch import nn

import moetor
from moetor.errors import FusionError, UnsupportedError
from moetor.huggingface.fusing import FuseLevel

LIMIT = 1e-5


def device_map(model: nn.Module, *, inside: bool = False) -> dict[str, str]:
    """Every layer, or every part of every layer, on the CPU by name."""
    base = model.get_submodule("model")
    names: dict[str, str] = {f"model.{name}": "cpu" for name, _ in base.named_children()}
    del names["model.layers"]
    for number, layer in enumerate(base.get_submodule("layers").children()):
        path = f"model.layers.{number}"
        parts = [f"{path}.{name}" for name, _ in layer.named_children()] if inside else [path]
        names |= dict.fromkeys(parts, "cpu")
    return names | {"lm_head": "cpu"}


def placed(model: Any, *, inside: bool = False) -> Any:
    """The model with the hooks that accelerate gives one that lies on several devices."""
    hooks = pytest.importorskip("accelerate.hooks")
    places = device_map(model, inside=inside)
    hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device={"": "cpu"} | places,
        offload=dict.fromkeys(["", *places], False),
    )
    assert hasattr(model.model.layers[1].mlp.experts, "_hf_hook")
    return model


def hooked(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if hasattr(part, "_hf_hook")}


@pytest.mark.parametrize("level", ["block", "experts"])
@pytest.mark.parametrize("inside", [False, True], ids=["layers", "parts"])
@pytest.mark.parametrize("tiny", [QWEN2, OLMOE, DEEPSEEK_V3], ids=lambda tiny: tiny.id)
def test_placed_over_devices(tiny: Tiny, inside: bool, level: FuseLevel) -> None:
    model = placed(tiny.build(), inside=inside)
    before, names = logits_of(model), hooked(model)
    report = moetor.fuse(model, level=level)
    assert report.count(level) == tiny.blocks
    assert relative(logits_of(model), before) < LIMIT
    path = report.blocks[0].name
    where = path if level == "block" else f"{path}.experts"
    assert where in hooked(model), "what is given to the fused module is moved to its device"
    assert moetor.unfuse(model) == tiny.blocks
    assert torch.equal(logits_of(model), before)
    assert where in hooked(model)
    assert level == "block" or hooked(model) == names


def test_a_refused_fusion_leaves_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = placed(QWEN2.build())
    before, names = logits_of(model), hooked(model)
    # A router that no formula reproduces, and that does not answer as a router does.
    for layer in model.model.layers:
        layer.mlp.gate.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        layer.mlp.register_parameter("stray", nn.Parameter(torch.zeros(1)))
    with pytest.raises(FusionError, match="stray"):
        moetor.fuse(model, level="block")
    assert hooked(model) == names
    assert torch.equal(logits_of(model), before)


def test_the_fused_block_is_given_tensors_of_its_device() -> None:
    """The hook is called around the fused block, not around what it replaced."""
    model = placed(QWEN2.build(), inside=True)
    moetor.fuse(model)
    block = model.model.layers[0].mlp
    seen: list[torch.device] = []
    own = block._hf_hook.pre_forward

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert module is block
        seen.append(args[0].device)
        return own(module, *args, **kwargs)

    block._hf_hook.pre_forward = spy
    logits_of(model)
    assert seen == [torch.device("cpu")]


@pytest.mark.parametrize("places", ["auto", "cpu", {"": "cpu"}, "layers"])
def test_device_map_on_one_device(places: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    original = QWEN2.build()
    original.save_pretrained(tmp_path)
    if places == "layers":
        places = device_map(original)
    if places == "auto" and torch.cuda.is_available():
        pytest.skip("would use the GPU")
    model = original.from_pretrained(tmp_path, device_map=places)
    report = moetor.fuse(model)
    assert report.count("block") == QWEN2.blocks
    assert relative(logits_of(model), logits_of(original)) < LIMIT


def test_offloaded_blocks_are_left_alone_by_name(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    original = QWEN2.build()
    original.save_pretrained(tmp_path / "model")
    places = device_map(original) | {"model.layers.1": "disk"}
    model = original.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off"
    )
    before = logits_of(model)
    with pytest.raises(FusionError, match=r"model\.layers\.1\.mlp.*device_map with offloading"):
        moetor.fuse(model, level="block")
    assert torch.equal(logits_of(model), before)
    first, second = moetor.fuse(model).blocks
    assert (first.name, first.level) == ("model.layers.0.mlp", "block")
    assert (second.name, second.level) == ("model.layers.1.mlp", "none")
    assert "device_map with offloading" in second.reason
    assert relative(logits_of(model), before) < LIMIT


def with_adapter(model: Any) -> Any:
    """Low-rank adapters on the attention, with weights that change the result."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], lora_alpha=16)
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_on_attention(when: str) -> None:
    """Put on before fusing or after, they act as on the original."""
    plain = with_adapter(QWEN2.build())
    model = QWEN2.build()
    if when == "after":
        moetor.fuse(model)
    adapted = with_adapter(model)
    if when == "before":
        moetor.fuse(adapted)
    assert len(fused_blocks(adapted)) == QWEN2.blocks
    theirs = logits_of(plain)
    assert relative(logits_of(adapted), theirs) < LIMIT
    with adapted.disable_adapter():
        assert relative(logits_of(adapted), theirs) > 1e-3
        assert relative(logits_of(adapted), logits_of(QWEN2.build())) < LIMIT


def test_adapters_saved_loaded_and_merged(tmp_path: Path) -> None:
    original = QWEN2.build()
    original.save_pretrained(tmp_path / "model")
    theirs = logits_of(with_adapter(original))
    model = moetor.MoEForCausalLM.from_pretrained(str(tmp_path / "model"))
    with_adapter(copy.deepcopy(model)).save_pretrained(tmp_path / "adapter")
    model.load_adapter(str(tmp_path / "adapter"))  # Transformers' own way
    assert relative(logits_of(model), theirs) < LIMIT
    again = moetor.MoEForCausalLM.from_pretrained(str(tmp_path / "model"))
    merged = with_adapter(again).merge_and_unload()
    assert len(fused_blocks(merged)) == QWEN2.blocks
    assert relative(logits_of(merged), theirs) < LIMIT


def test_training_an_adapter_through_fused_blocks_is_refused() -> None:
    model = QWEN2.build()
    moetor.fuse(model)
    adapted = with_adapter(model).train()
    with pytest.raises(UnsupportedError, match=r"gives no gradients.*moetor\.unfuse"):
        adapted(input_ids=some_ids())
    moetor.unfuse(adapted)
    adapted(input_ids=some_ids()).logits.sum().backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert grads
    assert all(grad is not None and bool(grad.any()) for grad in grads)
