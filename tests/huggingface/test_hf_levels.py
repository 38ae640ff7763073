"""Families beyond the first eight, experts alone, and blocks that are left as they are.

Whatever the level: the logits stay, and the report says why it is not `block`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    FAMILIES,
    QWEN2,
    QWEN3,
    Tiny,
    block_paths,
    bound,
    classes_of,
    logits_of,
    randomise,
    relative,
    same_tensors,
    some_ids,
    tensors_of,
)
from torch import Tensor, nn

import moetor
from moetor.errors import FusionError
from moetor.huggingface.fused_experts import FusedExperts

families = pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)


def _other(id: str, family: str, **options: Any) -> Tiny:
    return Tiny(id=id, family=family, options=options)


_EIGHT = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
OTHERS = (
    _other(
        "jamba",
        "Jamba",
        intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    _other(
        "minimax",
        "MiniMax",
        intermediate_size=40,
        num_local_experts=8,
        num_experts_per_tok=3,
        head_dim=16,
        layer_types=["full_attention", "linear_attention"],
        block_size=8,
    ),
    _other("phimoe", "Phimoe", intermediate_size=40, num_local_experts=8, num_experts_per_tok=2),
    _other(
        "qwen3_next",
        "Qwen3Next",
        **_EIGHT,
        intermediate_size=48,
        shared_expert_intermediate_size=40,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    _other(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        intermediate_size=48,
        moe_intermediate_size=24,
        moe_num_experts=8,
        moe_k=3,
        moe_num_shared_experts=2,
        moe_layer_start_index=0,
    ),
    _other(
        "cohere2_moe",
        "Cohere2Moe",
        intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        num_shared_experts=1,
        head_dim=16,
        sliding_window=16,
    ),
    _other(
        "nemotron_h",
        "NemotronH",
        intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
        layers_block_type=["moe", "attention", "moe", "mamba"],
        num_hidden_layers=4,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        head_dim=16,
        n_groups=2,
        use_mamba_kernels=False,
    ),
    _other(
        "laguna",
        "Laguna",
        **_EIGHT,
        intermediate_size=48,
        shared_expert_intermediate_size=40,
        head_dim=16,
        moe_routed_scaling_factor=1.7,
    ),
)
others = pytest.mark.parametrize("tiny", OTHERS, ids=lambda tiny: tiny.id)


def check_report(report: moetor.FusionReport) -> None:
    """What every line of a report promises."""
    assert report.blocks
    for block in report.blocks:
        assert block.level in ("block", "experts", "none")
        assert bool(block.reason) == (block.level != "block")
        assert (block.kernel is None) == (block.level == "none")
    assert report.count("block") + report.count("experts") + report.count("none") == len(
        report.blocks
    )


@others
@pytest.mark.parametrize("level", ["auto", "experts"])
def test_other_families(tiny: Tiny, level: Any) -> None:
    model = tiny.build()
    before, tensors = logits_of(model), tensors_of(model)
    report = moetor.fuse(model, level=level)
    check_report(report)
    assert {block.level for block in report.blocks} <= {"block", "experts"}
    for block in report.blocks:
        assert block.max_error is not None
        assert block.max_error <= bound(torch.float32)
    assert relative(logits_of(model), before) <= 1e-5
    assert same_tensors(tensors_of(model), tensors) == []
    moetor.unfuse(model)
    assert torch.equal(logits_of(model), before)


@others
def test_other_families_in_bfloat16_run(tiny: Tiny) -> None:
    """Each block agreed within the dtype's tolerance, or there would be an error."""
    model = tiny.build(dtype=torch.bfloat16)
    report = moetor.fuse(model)
    check_report(report)
    errors = [block.max_error for block in report.blocks]
    assert all(error is not None and error <= bound(torch.bfloat16) for error in errors)
    assert bool(torch.isfinite(logits_of(model)).all())


@pytest.mark.parametrize("tiny", [*FAMILIES, *OTHERS], ids=lambda tiny: tiny.id)
def test_without_verification_the_result_is_the_same(tiny: Tiny) -> None:
    model = tiny.build()
    before = logits_of(model)
    report = moetor.fuse(model, verify=False)
    check_report(report)
    assert {block.max_error for block in report.blocks} == {None}
    assert relative(logits_of(model), before) <= 1e-5


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_alone(tiny: Tiny, dtype: torch.dtype) -> None:
    model = tiny.build(dtype=dtype)
    before = logits_of(model)
    paths = block_paths(model, tiny)
    report = moetor.fuse(model, level="experts")
    check_report(report)
    assert [(b.name, b.level, b.family_block) for b in report.blocks] == [
        (path, "experts", tiny.block) for path in paths
    ]
    assert block_paths(model, tiny) == paths, "the blocks stay"
    for path in paths:
        assert isinstance(model.get_submodule(path).experts, FusedExperts)
    if dtype == torch.float32:
        assert relative(logits_of(model), before) <= 1e-5


def _dbrx() -> Any:
    return transformers.DbrxForCausalLM(
        transformers.DbrxConfig(
            vocab_size=97,
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=128,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={
                "ffn_hidden_size": 40,
                "moe_num_experts": 8,
                "moe_top_k": 3,
                "hidden_size": 64,
            },
        )
    )


def _llama4() -> Any:
    return transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=40,
            intermediate_size_mlp=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=8,
            num_experts_per_tok=2,
            interleave_moe_layer_step=1,
            pad_token_id=0,
            attention_chunk_size=32,
        )
    )


def _switch() -> Any:
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=97,
            d_model=64,
            d_kv=16,
            d_ff=40,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            num_experts=8,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def _gemma4() -> Any:
    return transformers.Gemma4ForCausalLM(
        transformers.Gemma4TextConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            global_head_dim=16,
            num_experts=8,
            top_k_experts=3,
            enable_moe_block=True,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=97,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
            num_kv_shared_layers=0,
        )
    )


AWKWARD = [_dbrx, _llama4, _switch, _gemma4]


def awkward_logits(model: Any) -> Tensor:
    more = {"decoder_input_ids": some_ids(2, 7)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=some_ids(), **more).logits
    return logits


@pytest.mark.parametrize("make", AWKWARD)
@pytest.mark.parametrize("level", ["auto", "experts"])
def test_awkward_families_stay_right(make: Callable[[], Any], level: Any) -> None:
    """Flat experts, weights on the input, capacity, no block: never an exception or a wrong number.

    Every block is in the report, also one that nothing could be done with.
    """
    model = make().eval()
    randomise(model, seed=0)
    before = awkward_logits(model)
    report = moetor.fuse(model, level=level)
    check_report(report)
    assert len(report.blocks) == 2
    after = awkward_logits(model)
    if report.count("none") == len(report.blocks):
        assert torch.equal(after, before)
    assert relative(after, before) <= 1e-5
    moetor.unfuse(model)
    assert torch.equal(awkward_logits(model), before)


def test_level_block_refuses_what_it_cannot_do() -> None:
    model = QWEN3.build(num_hidden_layers=2)
    model.model.layers[1].mlp.add_module("surprise", nn.Linear(4, 4))
    classes = classes_of(model)
    with pytest.raises(FusionError, match=r"cannot be fused.*nothing was changed"):
        moetor.fuse(model, level="block")
    assert classes_of(model) == classes


@pytest.mark.parametrize("make", AWKWARD)
@pytest.mark.parametrize("level", ["auto", "experts"])
def test_awkward_families_without_verification(make: Callable[[], Any], level: Any) -> None:
    model = make().eval()
    randomise(model, seed=0)
    before = awkward_logits(model)
    moetor.fuse(model, level=level, verify=False)
    assert relative(awkward_logits(model), before) <= 1e-5


def test_only_some_blocks_recognised() -> None:
    """One block of a model has a part that nobody knows: its experts alone are replaced."""
    model = QWEN3.build(num_hidden_layers=3)
    odd = model.model.layers[1].mlp
    odd.add_module("surprise", nn.Linear(4, 4))
    before = logits_of(model)
    report = moetor.fuse(model)
    check_report(report)
    assert [block.level for block in report.blocks] == ["block", "experts", "block"]
    assert "surprise" in report.blocks[1].reason
    assert relative(logits_of(model), before) <= 1e-5
    moetor.unfuse(model)
    assert model.model.layers[1].mlp is odd


def test_blocks_of_a_dense_layer_are_left_alone() -> None:
    model = QWEN2.build(num_hidden_layers=4, mlp_only_layers=[1], decoder_sparse_step=1)
    report = moetor.fuse(model)
    assert [block.name for block in report.blocks] == [
        f"model.layers.{layer}.mlp" for layer in (0, 2, 3)
    ]
    assert type(model.model.layers[1].mlp).__name__ == "Qwen2MoeMLP"


def test_any_module_that_holds_blocks() -> None:
    """The base model, or a single decoder layer, without a language model's head."""
    model = QWEN3.build()
    twin = copy.deepcopy(model)
    hidden = torch.randn(1, 5, 66, generator=torch.Generator().manual_seed(0))
    report = moetor.fuse(model.model.layers[0])
    assert [block.name for block in report.blocks] == ["mlp"]
    with torch.no_grad():
        ours = model.model.layers[0].mlp(hidden)
        theirs = twin.model.layers[0].mlp(hidden)
    assert relative(ours, theirs) <= 1e-5
    with pytest.raises(FusionError, match="fused already"):
        moetor.fuse(model)
    assert type(model.model.layers[1].mlp) is type(twin.model.layers[1].mlp)


def test_sizes_that_the_original_cannot_run() -> None:
    """The default of Transformers wants multiples of 16 bytes: with nothing to compare with, the
    block stays, and the report passes on what Transformers says.
    """
    model = QWEN3.build()
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="16 bytes"):
        logits_of(model)
    report = moetor.fuse(model)
    check_report(report)
    assert all(block.level == "block" or "16 bytes" in block.reason for block in report.blocks)
