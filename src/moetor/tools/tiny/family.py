"""How a tiny model of a family is described: its classes, and the settings that are its own.

A description names only what differs from the shared settings below; a shared setting is used
where the family's configuration has it. Shape letters: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Settings = Mapping[str, Any]
Call = Literal["text", "encoder_decoder", "image", "diffusion", "modalities", "omni"]
"""What a forward of the family is given, see `calls.py`."""

VOCABULARY = 131
HIDDEN = 64

TEXT_SETTINGS: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    # a multiple of 16 bytes in bfloat16, as the grouped product of Transformers wants it
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    # 8 experts, 3 of them per token
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "top_k_experts": 3,
    # 4 groups of which 2 are taken: 3 experts never fit into one group, and rarely stay unlimited
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "router_scaling_factor": 1.7,
    "route_scale": 1.7,
    "moe_routed_scaling_factor": 1.7,
    "moe_router_scaling_factor": 1.7,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 52,
    "shared_intermediate_size": 52,
    "swiglu_limit": 1.1,
    # one dense layer in front, where the family has them
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # attention by an index of the most relevant positions
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention and state spaces
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    # hyper-connections
    "hc_mult": 2,
    # layers that only predict further tokens in training
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}

# Settings of latent attention with as many key as query heads.
LATENT: Settings = {"num_key_value_heads": 4, "head_dim": 8}

TOWER_SETTINGS: Settings = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family.

    Attributes:
        config: name of the configuration class.
        model: name of the model class.
        settings: on top of the shared ones. The settings of a sub-configuration are a mapping
            under its key; `text_config` shares the settings of language models, the others those
            of towers. A sub-configuration of another family names its `model_type`.
        call: what its forward is given.
        generates: whether `generate` gives tokens greedily.
        module: the folder of the family, where it is not called as the family.
    """

    config: str
    model: str
    settings: Settings = field(default_factory=dict)
    call: Call = "text"
    generates: bool = True
    module: str = ""
