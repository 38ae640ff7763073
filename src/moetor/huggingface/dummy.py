"""Models with random weights, made on the device from a configuration alone: speed needs no
checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from moetor.errors import ConfigError
from moetor.huggingface.loading import model_class


def dummy_model(
    config: Any, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """A model of `config` in eval mode with random weights, drawn on `device` in `dtype`.

    The weights are those that the family starts training from, so that activations keep a sensible
    size and routing is nearly uniform.

    Raises:
        ConfigError: the family does not make a model of this configuration.
    """
    owner = model_class(config)
    make = getattr(owner, "from_config", None) or owner._from_config
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            with torch.device(device):
                model: PreTrainedModel = make(config, dtype=dtype)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"no model could be made of this configuration: {error}") from error
    return model.eval().requires_grad_(False)
