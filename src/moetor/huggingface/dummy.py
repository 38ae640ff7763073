"""Models with random weights, made on the device from a configuration alone: speed needs no
checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from moetor.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _qwen3_30b_a3b() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
    )


CONFIGS: dict[str, Callable[[], Any]] = {"qwen3-30b-a3b": _qwen3_30b_a3b}
"""Configurations that need no files, by the name that a command takes."""


def dummy_model(
    config: Any, model_class: Any, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """A model of `config` in eval mode with random weights, drawn on `device` in `dtype`.

    Weights are those that the family starts training from, so that activations keep a sensible size
    and routing is nearly uniform.

    Args:
        model_class: a class of Transformers, or an Auto class, of the configuration's family.

    Raises:
        ConfigError: the family does not make a model of this configuration.
    """
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            with torch.device(device):
                model: PreTrainedModel = make(config, dtype=dtype)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"no model could be made of this configuration: {error}") from error
    return model.eval().requires_grad_(False)
