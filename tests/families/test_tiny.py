"""The tiny models: repeatable, without dead parts, in both dtypes."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

from moetor.errors import ConfigError
from moetor.tools.tiny import FAMILIES, logits_of, tiny_inputs, tiny_model
from moetor.tools.tiny.calls import NEW_TOKENS

# One family per clamp: the module's class, and the attribute that holds the limit.
CLAMPS = {
    "deepseek_v4": ("DeepseekV4Experts", "limit"),
    "glm5_next": ("Glm5NextTextExperts", "swiglu_limit"),
    "gpt_oss": ("GptOssExperts", "limit"),
    "hy_v4": ("HYV4Experts", "swiglu_limit"),
    "minimax_m3_vl": ("MiniMaxM3VLExperts", "swiglu_limit"),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", "limit"),
    "step3p7": ("Step3p7Experts", "limit"),
}


def test_every_family_is_there() -> None:
    assert len(FAMILIES) == 75
    assert {"mixtral", "deepseek_v3", "kimi_k25", "nemotron_h_omni"} <= set(FAMILIES)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ConfigError, match="'mixtrall'"):
        tiny_model("mixtrall")


def test_a_seed_repeats_and_another_differs() -> None:
    first, again, other = (
        tiny_model("qwen3_moe"),
        tiny_model("qwen3_moe"),
        tiny_model("qwen3_moe", seed=1),
    )
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert not torch.equal(parameter, other.get_parameter(name))


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    tiny_model("mixtral")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["deepseek_v3", "afmoe", "ernie4_5_moe", "zaya", "longcat_flash"])
def test_selection_biases_differ_and_some_are_negative(name: str) -> None:
    model = tiny_model(name)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    biases = [tensor for path, tensor in tensors if "bias" in path and "expert" in path]
    biases += [tensor for path, tensor in tensors if path.endswith(("correction_bias", "biases"))]
    assert biases
    for bias in biases:
        assert (bias < 0).any()
        assert (bias > 0).any()


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="limits that are fixed numbers in an older Transformers",
)
@pytest.mark.parametrize("name", list(CLAMPS))
def test_clamps_are_active(name: str) -> None:
    class_name, attribute = CLAMPS[name]
    model = tiny_model(name)
    inputs = tiny_inputs(name, model)
    before = logits_of(name, model, inputs)
    for module in model.modules():
        if type(module).__name__ == class_name:
            setattr(module, attribute, 1e3)
    assert (logits_of(name, model, inputs) - before).abs().max() > 0.1 * before.abs().max()


def test_group_limits_are_active() -> None:
    model = tiny_model("deepseek_v3")
    inputs = tiny_inputs("deepseek_v3", model)
    before = logits_of("deepseek_v3", model, inputs)
    for module in model.modules():
        if type(module).__name__ == "DeepseekV3TopkRouter":
            module.topk_group = module.num_group
    assert (logits_of("deepseek_v3", model, inputs) - before).abs().max() > 0.1 * before.abs().max()


def test_token_tables_hold_distinct_experts() -> None:
    tables = [
        t for path, t in tiny_model("deepseek_v4").named_buffers() if path.endswith("tid2eid")
    ]
    assert tables
    for table in tables:
        assert 0 <= table.min() <= table.max() < 8
        for ids in table:
            assert len(set(ids.tolist())) == len(ids)


def test_bfloat16_keeps_what_the_family_keeps() -> None:
    model = tiny_model("deepseek_v3", torch.bfloat16)
    assert model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    exact = tiny_model("deepseek_v3").model.layers[1].mlp.gate.e_score_correction_bias
    kept = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(kept, exact)


def test_generation_is_long_enough_to_tell() -> None:
    assert NEW_TOKENS >= 8
