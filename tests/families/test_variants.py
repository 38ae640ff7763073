"""Settings that change how a family's block computes: each variant is fused whole, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import moetor
from moetor.errors import UnsupportedError
from moetor.huggingface.trial import relative_error
from moetor.tools.tiny import logits_of, tiny_inputs, tiny_model

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    # renormalisation, against the family's default
    ("axk2", {"norm_topk_prob": False}),
    ("bailing_hybrid", {"norm_topk_prob": False}),
    ("beam", {"norm_topk_prob": False}),
    ("cohere2_moe", {"norm_topk_prob": True}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("dots1", {"norm_topk_prob": True}),
    ("ernie4_5_moe", {"moe_norm_min": 0.6}),
    ("flex_olmo", {"norm_topk_prob": True}),
    ("flint", {"norm_topk_prob": False}),
    ("kimi_linear", {"norm_topk_prob": False}),
    ("kolibri1", {"norm_topk_prob": True}),
    ("lfm2_moe", {"norm_topk_prob": False}),
    ("mellum", {"norm_topk_prob": False}),
    ("mistral4", {"norm_topk_prob": False}),
    ("nemotron_h", {"norm_topk_prob": False}),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen3_next", {"norm_topk_prob": False}),
    ("solar_open", {"norm_topk_prob": False}),
    # what is chosen, and how it is scored
    ("axk2", {"n_group": None, "topk_group": None}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid"}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("deepseek_v2", {"topk_method": "greedy", "n_group": None, "topk_group": None}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("hunyuan_v1_moe", {"moe_topk": 1}),
    ("jamba", {"num_experts_per_tok": 1}),
    ("laguna", {"moe_router_logit_softcapping": 0.0}),
    ("lfm2_moe", {"use_expert_bias": False}),
    ("longcat_flash", {"zero_expert_num": 0}),
    ("mimo_v2_flash", {"n_group": 1, "topk_group": 1}),
    ("minimax_m2", {"num_experts_per_tok": 1}),
    ("mistral4", {"n_group": 1, "topk_group": 1}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral", {"num_experts_per_tok": 8}),
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    ("phimoe", {"router_jitter_noise": 0.2}),
    ("zaya", {"num_experts": 4}),
    # scales
    ("beam", {"routed_scaling_factor": 1.0}),
    ("deepseek_v3", {"routed_scaling_factor": 1.0}),
    ("lfm2_moe", {"routed_scaling_factor": 1.0}),
    ("longcat_flash", {"routed_scaling_factor": 6.0}),
    # shared experts
    ("afmoe", {"num_shared_experts": 2}),
    ("cohere2_moe", {"num_shared_experts": 0}),
    ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}),
    ("deepseek_v3", {"n_shared_experts": 2}),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    ("ernie4_5_moe", {"use_bias": True}),
    ("exaone_moe", {"num_shared_experts": 2}),
    ("granitemoeshared", {"shared_intermediate_size": 0}),
    ("hunyuan_v1_moe", {"mlp_bias": True}),
    ("hy_v3", {"enable_moe_fp32_combine": False}),
    ("nemotron_h", {"moe_latent_size": None}),
    ("nemotron_h", {"mlp_bias": True}),
    # activations
    ("deepseek_v3", {"hidden_act": "gelu"}),
    ("gpt_oss", {"swiglu_alpha": 1.3}),
    ("gpt_oss", {"swiglu_limit": 7.0}),
    ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}),
    ("mixtral", {"hidden_act": "quick_gelu"}),
    ("mixtral", {"hidden_act": "relu2"}),
    ("mixtral", {"hidden_act": "tanh"}),
    ("qwen3_moe", {"hidden_act": "gelu_new"}),
]


def _name(variant: tuple[str, dict[str, Any]]) -> str:
    family, settings = variant
    return family + "".join(f"-{key}={value}" for key, value in settings.items())


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="settings of a newer Transformers",
)
@pytest.mark.parametrize("variant", VARIANTS, ids=_name)
def test_a_variant_is_fused_whole(variant: tuple[str, dict[str, Any]]) -> None:
    family, settings = variant
    try:
        model = tiny_model(family, settings=settings)
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    inputs = tiny_inputs(family, model)
    before = logits_of(family, model, inputs)
    assert torch.isfinite(before).all()
    report = moetor.fuse(model)
    assert {block.level for block in report.blocks} == {"block"}, str(report)
    assert relative_error(logits_of(family, model, inputs), before) <= 1e-5
