"""The families that are one language model with one flat configuration."""

from __future__ import annotations

from moetor.tools.tiny.family import LATENT, Family, Settings

SPARSE = ["dense", "sparse", "sparse"]
# The usual indexed latent attention of the DeepSeek-V3.2 line.
INDEXED = {**LATENT, "mlp_layer_types": SPARSE}

# Without its latent experts: those are in `nemotron_h`, their absence in `nemotron_h_omni`.
NEMOTRON_SETTINGS: Settings = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
    "moe_shared_expert_intermediate_size": 52,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 8,
}


def _causal(prefix: str, **settings: object) -> Family:
    return Family(config=f"{prefix}Config", model=f"{prefix}ForCausalLM", settings=settings)


TEXT_FAMILIES: dict[str, Family] = {
    "afmoe": _causal("Afmoe", global_attn_every_n_layers=2),
    "axk1": _causal("AXK1", **LATENT, mlp_layer_types=SPARSE),
    "axk2": _causal("AXK2", **INDEXED, gated_norm_rank=4),
    "bailing_hybrid": _causal(
        "BailingHybrid", num_key_value_heads=4, layer_group_size=2, num_mtp_layers=0
    ),
    "beam": _causal("Beam", mlp_layer_types=SPARSE),
    "cohere2_moe": _causal(
        "Cohere2Moe",
        norm_topk_prob=False,
        mlp_layer_types=SPARSE,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "dbrx": Family(
        config="DbrxConfig",
        model="DbrxForCausalLM",
        settings={
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_act_fn": {"name": "silu"},
                "ffn_hidden_size": 40,
                "moe_num_experts": 8,
                "moe_top_k": 3,
            },
        },
    ),
    "deepseek_v2": _causal("DeepseekV2", **LATENT, topk_method="group_limited_greedy"),
    "deepseek_v3": _causal("DeepseekV3", **LATENT),
    "deepseek_v32": _causal("DeepseekV32", **INDEXED),
    "deepseek_v4": _causal(
        "DeepseekV4",
        num_hidden_layers=4,
        num_key_value_heads=1,
        layer_types=[
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
            "compressed_sparse_attention",
        ],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        mlp_layer_types=["hash_moe", "moe", "hash_moe", "moe"],
        o_groups=2,
        o_lora_rank=16,
        hc_sinkhorn_iters=4,
    ),
    "doge": _causal("Doge", is_moe=True, num_experts=16, keep_window_size=64),
    "dots1": _causal("Dots1", num_key_value_heads=2),
    "ernie4_5_moe": _causal("Ernie4_5_Moe", tie_word_embeddings=False),
    "exaone_moe": _causal("ExaoneMoe", mlp_layer_types=SPARSE),
    "flex_olmo": _causal("FlexOlmo"),
    "flint": _causal("Flint", mlp_only_layers=[0]),
    "glm4_moe": _causal("Glm4Moe", use_qk_norm=True),
    "glm4_moe_lite": _causal("Glm4MoeLite", **LATENT, mlp_layer_types=SPARSE),
    "glm_moe_dsa": _causal("GlmMoeDsa", **INDEXED),
    "gpt_oss": _causal("GptOss"),
    "granitemoe": _causal("GraniteMoe", residual_multiplier=0.8),
    "granitemoe_swa": _causal("GraniteMoeSWA", residual_multiplier=0.8),
    "granitemoehybrid": _causal(
        "GraniteMoeHybrid",
        residual_multiplier=0.8,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_chunk_size=8,
    ),
    "granitemoeshared": _causal("GraniteMoeShared", residual_multiplier=0.8),
    "hunyuan_v1_moe": _causal("HunYuanMoEV1"),
    "hy_v3": _causal("HYV3", mlp_layer_types=SPARSE),
    "hy_v4": _causal("HYV4", **INDEXED),
    "jamba": _causal(
        "Jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_dt_rank=8,
    ),
    "jetmoe": _causal("JetMoe", kv_channels=16),
    "kimi_linear": _causal(
        "KimiLinear",
        num_key_value_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=SPARSE,
    ),
    "kolibri1": _causal("Kolibri1"),
    "laguna": _causal("Laguna", moe_router_logit_softcapping=2.0, mlp_layer_types=SPARSE),
    "lfm2_moe": _causal("Lfm2Moe", layer_types=["conv", "full_attention", "conv"]),
    "longcat_flash": _causal(
        "LongcatFlash",
        **LATENT,
        num_layers=2,
        zero_expert_num=4,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=40,
    ),
    "mellum": _causal("Mellum", mlp_layer_types=SPARSE),
    "mimo_v2_flash": _causal("MiMoV2Flash", mlp_layer_types=SPARSE),
    "minimax": _causal(
        "MiniMax",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        block_size=8,
        mlp_alpha_factor=1.2,
        mlp_beta_factor=0.7,
    ),
    "minimax_m2": _causal("MiniMaxM2"),
    "mistral4": _causal("Mistral4", **LATENT),
    "mixtral": _causal("Mixtral"),
    "nemotron_h": _causal("NemotronH", **NEMOTRON_SETTINGS, moe_latent_size=48),
    "nllb_moe": Family(
        config="NllbMoeConfig",
        model="NllbMoeForConditionalGeneration",
        call="encoder_decoder",
        settings={
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "decoder_start_token_id": 2,
        },
    ),
    "olmoe": _causal("Olmoe"),
    "openai_privacy_filter": Family(
        config="OpenAIPrivacyFilterConfig",
        model="OpenAIPrivacyFilterForTokenClassification",
        settings={"num_labels": 9},
        generates=False,
    ),
    "phimoe": _causal("Phimoe", num_experts_per_tok=2, router_jitter_noise=0.05),
    "qwen2_moe": _causal("Qwen2Moe", mlp_only_layers=[0]),
    "qwen3_moe": _causal("Qwen3Moe", mlp_only_layers=[0]),
    "qwen3_next": _causal(
        "Qwen3Next",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_only_layers=[0],
    ),
    "solar_open": _causal("SolarOpen"),
    "switch_transformers": Family(
        config="SwitchTransformersConfig",
        model="SwitchTransformersForConditionalGeneration",
        call="encoder_decoder",
        settings={
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 40,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_heads": 4,
            # small enough that some tokens find their expert full
            "expert_capacity": 3,
            "decoder_start_token_id": 0,
        },
    ),
    "vitpose_backbone": Family(
        config="VitPoseBackboneConfig",
        model="VitPoseBackbone",
        call="image",
        generates=False,
        settings={
            "image_size": [32, 24],
            "patch_size": [8, 8],
            "num_hidden_layers": 2,
            "num_experts": 4,
            "part_features": 16,
        },
    ),
    "zaya": _causal(
        "Zaya",
        num_experts_per_tok=1,
        router_hidden_size=24,
        layer_types=["hybrid", "hybrid_sliding", "hybrid"],
    ),
}
