"""Tiny random models of every MoE family of Transformers, and how each is called."""

from moetor.tools.tiny.calls import generate_of, logits_of, tiny_inputs
from moetor.tools.tiny.models import FAMILIES, family_of, tiny_config, tiny_model

__all__ = [
    "FAMILIES",
    "family_of",
    "generate_of",
    "logits_of",
    "tiny_config",
    "tiny_inputs",
    "tiny_model",
]
