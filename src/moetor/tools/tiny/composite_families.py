"""The families whose language model is a part of a composite: with towers for images, video and
audio, whose parts are as small as they can be."""

from __future__ import annotations

from moetor.tools.tiny.family import HIDDEN, LATENT, VOCABULARY, Call, Family, Settings
from moetor.tools.tiny.text_families import NEMOTRON_SETTINGS

SPARSE = ["dense", "sparse", "sparse"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
# Ids of placeholders: in the vocabulary, and outside the ids that tests draw.
IMAGE, VIDEO, AUDIO, START = (VOCABULARY - number for number in (1, 2, 3, 4))


def _with_towers(
    prefix: str,
    text: Settings,
    *,
    vision: Settings | None = None,
    audio: Settings | None = None,
    call: Call = "text",
    **top: object,
) -> Family:
    settings = {"text_config": text, "vision_config": vision or {}, "image_token_id": IMAGE, **top}
    if audio is not None:
        settings["audio_config"] = audio
    return Family(
        config=f"{prefix}Config",
        model=f"{prefix}ForConditionalGeneration",
        settings=settings,
        call=call,
    )


# The optical-character families share their first tower.
SAM: Settings = {
    "output_channels": 16,
    "global_attn_indexes": [1],
    "window_size": 2,
    "mlp_dim": 48,
    "downsample_channels": [24, 32],
}
RELATIVE: Settings = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 8,
    "rel_extent": 32,
    "sliding_window_size": 16,
    "unpadded_vocab_size": VOCABULARY - 4,
}
ROPE: Settings = {"rope_type": "default", "rope_theta": 1e4}

COMPOSITE_FAMILIES: dict[str, Family] = {
    "aria": _with_towers(
        "Aria",
        {"intermediate_size": 40},
        vision={"model_type": "idefics3_vision"},
        projector_patch_to_query_dict={16: 4},
    ),
    "deepseek_ocr2": _with_towers(
        "DeepseekOcr2",
        {"mlp_layer_types": SPARSE, "topk_method": "group_limited_greedy", "head_dim": None},
        vision={"sam_config": SAM, "encoder_config": {"vocab_size": VOCABULARY}},
    ),
    "diffusion_gemma": Family(
        config="DiffusionGemmaConfig",
        model="DiffusionGemmaForBlockDiffusion",
        settings={
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "num_hidden_layers": 2,
            },
            "vision_config": {"model_type": "gemma4_vision"},
            "image_token_id": IMAGE,
            "canvas_length": 8,
        },
        call="diffusion",
        generates=False,
    ),
    "dots3_note": _with_towers(
        "Dots3Note",
        {
            **LATENT,
            "head_dim": 24,
            "shared_experts_intermediate_size": 52,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 24,
            "swa_kv_lora_rank": 32,
            "swa_head_dim": 24,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        },
        # its vision tower is MoE too, with a number of experts of its own in every layer
        vision={
            "num_hidden_layers": 3,
            "pyramid_num_routed": [-1, 4, 6],
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "adapter_in_dim": 32,
            "adapter_out_dim": HIDDEN,
        },
        audio={"downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": HIDDEN},
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    ),
    "ernie4_5_vl_moe": _with_towers(
        "Ernie4_5_VLMoe",
        {
            "mlp_layer_types": SPARSE,
            "moe_intermediate_size": [40, 24],
            "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
        },
        call="modalities",
        video_token_id=VIDEO,
    ),
    "gemma4": _with_towers(
        "Gemma4",
        {
            "enable_moe_block": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
        audio={},
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    ),
    "glm4v_moe": _with_towers(
        "Glm4vMoe",
        {
            "rope_parameters": {
                **ROPE,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            }
        },
        video_token_id=VIDEO,
    ),
    "glm5_next": _with_towers(
        "Glm5Next",
        {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "layer_types": LINEAR,
            "mlp_layer_types": SPARSE,
            "index_kpool": 2,
        },
        vision={"projection_intermediate_size": 48},
        video_token_id=VIDEO,
    ),
    # The language model alone: building its vision tower needs SciPy.
    "inkling": Family(
        config="InklingTextConfig",
        model="InklingForCausalLM",
        settings={
            **RELATIVE,
            "mlp_layer_types": SPARSE,
            "logits_mup_width_multiplier": 1.3,
        },
    ),
    "inkling2": _with_towers(
        "Inkling2",
        {**RELATIVE, "mlp_gate_softcap": 0.9, "mlp_up_softcap": 1.4},
        vision={"projection_hidden_dim": 32},
    ),
    "kimi_k25": Family(
        config="Kimi_K25Config",
        model="Kimi_K25ForConditionalGeneration",
        settings={
            "text_config": {"model_type": "deepseek_v3", **LATENT},
            "vision_config": {},
            "projection_hidden_size": 32,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
    ),
    "llama4": _with_towers(
        "Llama4",
        {"moe_layers": [1, 2], "intermediate_size": 40, "intermediate_size_mlp": 96},
        # as wide as four patches, which its pixel shuffle joins
        vision={
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    ),
    "minimax_m3_vl": Family(
        config="MiniMaxM3VLConfig",
        model="MiniMaxM3SparseForConditionalGeneration",
        settings={
            "text_config": {
                "model_type": "minimax_m3_vl_text",
                "mlp_layer_types": SPARSE,
                "dense_intermediate_size": 96,
                "rotary_dim": 8,
            },
            "vision_config": {"model_type": "minimax_m3_vl_vision"},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "projector_hidden_size": 32,
        },
    ),
    "mistral_large4": _with_towers(
        "MistralLarge4",
        {**LATENT, "mlp_layer_types": SPARSE},
        vision={"model_type": "pixtral"},
    ),
    "muse_spark": _with_towers(
        "MuseSpark",
        {"mlp_layer_types": SPARSE, "moe_hidden_size": 48, "output_multiplier": 0.9},
        audio={"patch_sizes": [16, 6], "hidden_sizes": [16, 32], "depths": [1, 1]},
        out_hidden_size=48,
        projector_hidden_size=32,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    ),
    "nemotron_h_omni": Family(
        config="NemotronH_Omni_Reasoning_V3_Config",
        model="NemotronH_Omni_Reasoning_V3",
        settings={
            "text_config": {"model_type": "nemotron_h", **NEMOTRON_SETTINGS},
            "vision_config": {
                "model_type": "radio",
                "video_temporal_patch_size": 2,
                "max_img_size": 64,
            },
            "image_token_id": IMAGE,
            "vision_hidden_size": 32,
            "projector_hidden_size": 32,
        },
    ),
    "qwen3_5_moe": _with_towers("Qwen3_5Moe", {"layer_types": LINEAR}),
    "qwen3_omni_moe": Family(
        config="Qwen3OmniMoeConfig",
        model="Qwen3OmniMoeForConditionalGeneration",
        call="omni",
        settings={
            "thinker_config": {
                "text_config": {"mlp_only_layers": [0]},
                "vision_config": {},
                "audio_config": {
                    "encoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 48,
                    "d_model": 32,
                    "output_dim": HIDDEN,
                    "downsample_hidden_size": 8,
                },
                "image_token_id": IMAGE,
                "video_token_id": VIDEO,
                "audio_token_id": AUDIO,
                "vision_start_token_id": START,
            },
            "talker_config": {
                # its shared expert's size is no declared setting, and so not among the shared ones
                "text_config": {"num_hidden_layers": 2, "shared_expert_intermediate_size": 52},
                "code_predictor_config": {"vocab_size": 32, "num_code_groups": 2},
                "num_code_groups": 2,
                "thinker_hidden_size": HIDDEN,
                "accept_hidden_layer": 1,
                "spatial_merge_size": 2,
            },
            "code2wav_config": {
                "codebook_size": 32,
                "num_quantizers": 2,
                "upsample_rates": [2],
                "upsampling_ratios": [2],
                "decoder_dim": 32,
            },
        },
    ),
    "qwen3_vl_moe": _with_towers("Qwen3VLMoe", {"mlp_only_layers": [0]}, video_token_id=VIDEO),
    "qwen4_exp": _with_towers(
        "Qwen4Exp",
        {
            "hc_lowrank": 16,
            "layer_types": LINEAR,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        video_token_id=VIDEO,
    ),
    "step3p7": _with_towers(
        "Step3p7",
        {
            "mlp_layer_types": SPARSE,
            # 0: no limit
            "swiglu_limits": [0.0, 0.8, 0.0],
            "swiglu_limits_shared": [0.0, 0.0, 0.6],
        },
    ),
    "unlimited_ocr": _with_towers(
        "UnlimitedOcr",
        {"mlp_layer_types": SPARSE, "topk_method": "group_limited_greedy", "head_dim": None},
        vision={"sam_config": SAM, "encoder_config": {}},
    ),
}
