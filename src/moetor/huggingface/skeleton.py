"""A model without weights, and what Transformers does to it once they are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import LoadStateDictConfig
from transformers.monkey_patching import patch_output_recorders
from transformers.utils.generic import ContextManagers

from moetor.errors import CheckpointError
from moetor.huggingface.load_steps import LoadPlan


def concrete_class(maker: Any, config: Any, source: str, *, revision: str | None) -> Any:
    """The model class behind an auto class, or the class itself.

    Args:
        source: where a class outside of Transformers comes from; the configuration has been loaded
            with `trust_remote_code` if it names one.
    """
    if not hasattr(maker, "from_config"):
        return maker
    reference = getattr(config, "auto_map", {}).get(maker.__name__)
    if reference is not None and type(config) not in maker._model_mapping:
        return get_class_from_dynamic_module(reference, source, revision=revision)
    if type(config) not in maker._model_mapping:
        raise CheckpointError(
            f"{source!r} is a {type(config).__name__}, for which Transformers has no "
            f"{maker.__name__}"
        )
    found = maker._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def settle_dtype(config: Any, wanted: torch.dtype | None, found: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, else the configuration's, else the checkpoint's; set in the
    configuration and its parts, as Transformers does.
    """
    stated = getattr(config, "dtype", None)
    if isinstance(stated, str):
        stated = getattr(torch, stated)
    dtype = wanted or stated or found or torch.float32
    config.dtype = dtype
    for name in config.sub_configs:
        part = getattr(config, name)
        if part is not None:
            part.dtype = dtype
    return dtype


def empty_model(model_class: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, as `from_pretrained` builds it."""
    contexts = model_class.get_init_context(dtype, False, False, None)
    with ContextManagers(contexts):
        model: PreTrainedModel = model_class(config)
        patch_output_recorders(model)
    return model


def finish_model(
    model: PreTrainedModel,
    plan: LoadPlan,
    *,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Makes what a checkpoint does not hold (tied weights, buffers), and loads the settings of
    generation.
    """
    settings = LoadStateDictConfig(
        pretrained_model_name_or_path=source, device_map={"": device}, dtype=dtype
    )
    if plan.conversions is not None:
        model._weight_conversions = plan.conversions
    model._finalize_model_loading(model, settings, plan.info)
    left = [name for name, tensor in tensors_of(model) if tensor.is_meta]
    if left:
        raise CheckpointError(f"{source!r}: nothing was loaded into {', '.join(left[:3])}")
    model.eval()
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        model.adjust_generation_fn(
            None,
            False,
            None,
            source,
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=False,
            token=None,
            revision=revision,
            subfolder="",
            trust_remote_code=trust_remote_code,
        )
    return model


def tensors_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, those that are not saved included."""
    return [*model.named_parameters(), *model.named_buffers()]
