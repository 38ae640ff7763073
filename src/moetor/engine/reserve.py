"""How much of a GPU's memory the engine will need beside weights, from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moetor.engine.config import EngineConfig
from moetor.engine.memory import DEFAULT_LENGTH, step_reserve
from moetor.huggingface.loading import context_length
from moetor.offload_config import CpuExperts, OffloadConfig, offload_config

# Of the GPU's memory for keys and values, where not all sequences can have their full length.
_KV_SHARE = 0.1
# Tensors of hidden states that are alive at once in a layer, a generous bound.
_HIDDEN_COPIES = 40


@dataclass(frozen=True, slots=True)
class Reserve:
    """What is left free for the engine.

    Attributes:
        token_bytes: of one token's keys and values in all layers, at most: a layer without keys
            counts as one with them.
        tokens: whose keys and values have room.
        step_bytes: activations of a full step, sampling and CUDA graphs.
    """

    token_bytes: int
    tokens: int
    step_bytes: int

    @property
    def nbytes(self) -> int:
        """Of all."""
        return self.token_bytes * self.tokens + self.step_bytes

    def __str__(self) -> str:
        return (
            f"keys and values: {self.token_bytes / 1024:.3g} KiB a token, room for {self.tokens} "
            f"tokens; a step: {self.step_bytes / 2**30:.3g} GiB"
        )


def predict_reserve(
    config: EngineConfig, model_config: Any, dtype: torch.dtype, gpu_memory: int | None
) -> Reserve:
    """The least that the engine should have.

    Args:
        model_config: of the language model.
        gpu_memory: of which a share goes to keys and values; None: room for one sequence.
    """
    length = config.max_model_len or context_length(model_config) or DEFAULT_LENGTH
    each = token_bytes(model_config, dtype)
    if config.kv_cache_blocks is not None:
        tokens = config.kv_cache_blocks * config.block_size
    else:
        share = 0 if gpu_memory is None else int(gpu_memory * _KV_SHARE) // each
        whole = -(-length // config.block_size) * config.block_size
        tokens = min(config.max_num_seqs * whole, max(whole, share))
    hidden = int(model_config.hidden_size) * dtype.itemsize * _HIDDEN_COPIES
    step = config.max_num_batched_tokens * hidden
    return Reserve(each, tokens, step + step_reserve(config, int(model_config.vocab_size)))


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of one token's keys and values in all layers, of a language model's configuration; latents
    where the family caches these.
    """
    layers = int(config.num_hidden_layers)
    if getattr(config, "_heterogeneity_spec", None) is not None:  # such as Gemma 4
        return sum(_layer_token_bytes(config.per_layer_config[n], dtype) for n in range(layers))
    return layers * _layer_token_bytes(config, dtype)


def _layer_token_bytes(config: Any, dtype: torch.dtype) -> int:
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return (int(latent) + int(config.qk_rope_head_dim)) * dtype.itemsize
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    return 2 * heads * width * dtype.itemsize


def settle_offload(
    cpu_experts: CpuExperts | OffloadConfig | None,
    config: EngineConfig,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> OffloadConfig | None:
    """What is asked for, with the memory that the engine leaves to it and needs itself.

    Args:
        model_config: of the language model.
    """
    offload = offload_config(cpu_experts)
    if offload is None:
        return None
    gpu_memory = offload.gpu_memory
    if gpu_memory is None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
        gpu_memory = int(total * config.gpu_memory_utilization) - outside
    reserve = offload.reserve
    if reserve is None:
        reserve = predict_reserve(config, model_config, dtype, gpu_memory).nbytes
    return replace(offload, gpu_memory=gpu_memory, reserve=reserve)
