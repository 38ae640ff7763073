"""Tiny random models of every MoE family of Transformers, by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from moetor.errors import ConfigError, UnsupportedError
from moetor.huggingface.composites import images_named
from moetor.tools.tiny.composite_families import COMPOSITE_FAMILIES
from moetor.tools.tiny.family import TEXT_SETTINGS, TOWER_SETTINGS, Family, Settings
from moetor.tools.tiny.text_families import TEXT_FAMILIES
from moetor.tools.tiny.weights import copy_rounded, randomise

FAMILIES: Mapping[str, Family] = dict(sorted({**TEXT_FAMILIES, **COMPOSITE_FAMILIES}.items()))


def family_of(name: str) -> Family:
    """The description of a family.

    Raises:
        ConfigError: there is no family of this name.
    """
    if name not in FAMILIES:
        raise ConfigError(f"no family {name!r}; the families are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def tiny_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    settings: Settings | None = None,
) -> Any:
    """A tiny random model of a family, in eval mode, with nothing degenerate.

    Args:
        name: of the family, as in `FAMILIES`.
        dtype: of the parameters; those that the family keeps in float32 stay so.
        seed: of the weights.
        settings: of the configuration, on top of those of the family: another variant of it.

    Returns:
        A `PreTrainedModel`.

    Raises:
        ConfigError: there is no family of this name.
        UnsupportedError: the installed Transformers does not have the family.
    """
    family = family_of(name)
    model_class = family_class(name, "modeling", family.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(tiny_config(name, settings), dtype=torch.float32)
    randomise(model, seed)
    if dtype != torch.float32:
        rounded = model_class._from_config(tiny_config(name, settings), dtype=dtype)
        copy_rounded(model, rounded)
        model = rounded
    images_named(model)
    return model.eval().requires_grad_(False)


def tiny_config(name: str, settings: Settings | None = None) -> Any:
    """The configuration of a family's tiny model, with further settings on top."""
    family = family_of(name)
    config_class = family_class(name, "configuration", family.config)
    own = {**family.settings, **(settings or {})}
    return config_class(**_settings(config_class, TEXT_SETTINGS, own))


def family_class(name: str, kind: str, class_name: str) -> Any:
    """A class of the family's own module; nothing else of Transformers is imported.

    Raises:
        UnsupportedError: the installed Transformers does not have it.
    """
    folder = family_of(name).module or name
    path = f"transformers.models.{folder}.{kind}_{folder}"
    try:
        return getattr(importlib.import_module(path), class_name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"the installed Transformers has no {class_name} in {path} ({error}); "
            f"family {name!r} needs a newer one"
        ) from error


def _settings(config_class: Any, shared: Settings, own: Settings) -> dict[str, Any]:
    """The shared settings that the configuration has, and the family's own, part by part."""
    known = {field.name for field in fields(config_class)}
    settings = {name: value for name, value in shared.items() if name in known} | dict(own)
    parts = {
        key: settings[key]
        for key in config_class.sub_configs
        if isinstance(settings.get(key), Mapping)
    }
    # A composite cannot tell the class of a part that may be of any family: it gets objects.
    # Where it can, it gets settings; some composites of older releases take nothing else.
    make_objects = any("model_type" in part for part in parts.values())
    for key, part in parts.items():
        part_class = _part_class(config_class.sub_configs[key], part)
        shared_by_part = TEXT_SETTINGS if key == "text_config" else TOWER_SETTINGS
        own_by_part = {name: value for name, value in part.items() if name != "model_type"}
        given = _settings(part_class, shared_by_part, own_by_part)
        settings[key] = part_class(**given) if make_objects else given
    return settings


def _part_class(declared: Any, settings: Settings) -> Any:
    if "model_type" not in settings:
        return declared
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    return auto.CONFIG_MAPPING[settings["model_type"]]
